//! Qwen1.5, Qwen2 and Qwen2.5 (`Qwen2ForCausalLM`).
//!
//! Quirks: biases on Q, K and V and nowhere else; grouped KV heads (all heads in Qwen1.5-72B); the
//! smallest models tie the output matrix to the embeddings; `sliding_window` is written into every
//! configuration and only counts where `use_sliding_window` says so.

use serde_json::json;

use crate::{
    ModelError,
    config::{DecoderConfig, Fields},
    families::Family,
    moe,
    weights::{FfnNames, Qkv, TensorNames},
};

/// Checkpoint names, shared by Qwen3, Llama and the mixtures of experts.
pub(crate) const NAMES: TensorNames = TensorNames {
    embed: "model.embed_tokens",
    final_norm: "model.norm.weight",
    lm_head: "lm_head",
    layer: "model.layers.",
    input_norm: "input_layernorm.weight",
    post_norm: "post_attention_layernorm.weight",
    qkv: Qkv::Separate(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    q_norm: "self_attn.q_norm.weight",
    k_norm: "self_attn.k_norm.weight",
    attn_out: "self_attn.o_proj",
    ffn: FfnNames { gate: "mlp.gate_proj", up: "mlp.up_proj", down: "mlp.down_proj" },
    experts: moe::NAMES,
    interleaved_rope: false,
    ignored: &[".rotary_emb.inv_freq"],
};

/// Settings of `config.json`.
pub(crate) fn config(
    family: &'static Family,
    fields: &Fields,
) -> Result<DecoderConfig, ModelError> {
    fields.require("hidden_act", &json!("silu"))?;
    let hidden = fields.size(&["hidden_size"])?;
    let layers = fields.layers(&["num_hidden_layers"])?;
    let q_heads = fields.size(&["num_attention_heads"])?;
    let vocab = fields.size(&["vocab_size"])?;
    let (rope, context_max) = fields.rope(fields.size(&["max_position_embeddings"])?)?;
    let head_dim = fields.size_or_none(&["head_dim"])?;
    Ok(DecoderConfig {
        family,
        hidden,
        layers,
        q_heads,
        kv_heads: fields.size_or_none(&["num_key_value_heads"])?.unwrap_or(q_heads),
        head_dim: head_dim.unwrap_or(hidden / q_heads.max(1)),
        intermediate: fields.size(&["intermediate_size"])?,
        experts: None,
        vocab,
        sampled_vocab: vocab,
        norm_eps: fields.number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        rope,
        logn: None,
        qkv_bias: true,
        qk_norm: false,
        tied: fields.flag("tie_word_embeddings", false)?,
        window: fields.windows(layers)?,
        context_max,
        eos_ids: fields.eos_ids()?,
    })
}
