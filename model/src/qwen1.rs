//! Original Qwen (`QWenLMHeadModel`, 1.8B to 72B).
//!
//! Quirks: one packed `c_attn` with the only biases; `w2` is the gate and `w1` the up projection;
//! `intermediate_size` is twice the real width; every query head has a KV head of its own. Past
//! `seq_length`, queries are scaled by the logarithm of their position (`use_logn_attn`) and the
//! rotary base grows with the prompt (`use_dynamic_ntk`); 72B has neither.

use serde_json::json;

use crate::{
    ModelError,
    config::{DecoderConfig, Fields, Rope, RopeScaling},
    families::Family,
    qwen2,
    weights::{FfnNames, Qkv, TensorNames},
};

/// Rows of the real vocabularies from here up are padding.
const TOKENS: usize = 151_851;

/// Checkpoint names.
pub(crate) const NAMES: TensorNames = TensorNames {
    embed: "transformer.wte",
    final_norm: "transformer.ln_f.weight",
    lm_head: "lm_head",
    layer: "transformer.h.",
    input_norm: "ln_1.weight",
    post_norm: "ln_2.weight",
    qkv: Qkv::Packed("attn.c_attn"),
    q_norm: "attn.q_norm.weight",
    k_norm: "attn.k_norm.weight",
    attn_out: "attn.c_proj",
    ffn: FfnNames { gate: "mlp.w2", up: "mlp.w1", down: "mlp.c_proj" },
    ignored: &[".rotary_emb.inv_freq", ".attn.masked_bias"],
    ..qwen2::NAMES
};

/// Settings of `config.json`; the oldest files use other names for some.
pub(crate) fn config(
    family: &'static Family,
    fields: &Fields,
) -> Result<DecoderConfig, ModelError> {
    fields.require("no_bias", &json!(true))?;
    fields.require("scale_attn_weights", &json!(true))?;
    if fields.number("rotary_pct")?.is_some_and(|part| part != 1.0) {
        return Err(ModelError::Unsupported("rotary_pct other than 1 in config.json".into()));
    }
    let hidden = fields.size(&["hidden_size", "n_embd"])?;
    let layers = fields.layers(&["num_hidden_layers", "n_layer"])?;
    let heads = fields.size(&["num_attention_heads", "n_head"])?;
    let doubled = fields.size(&["intermediate_size", "ffn_hidden_size"])?;
    let vocab = fields.size(&["vocab_size", "padded_vocab_size"])?;
    let trained = fields.size_or_none(&["seq_length"])?.unwrap_or(8192);
    let head_dim = fields.size_or_none(&["kv_channels"])?.unwrap_or(hidden / heads.max(1));
    let dynamic_ntk = fields.flag("use_dynamic_ntk", true)?.then_some(trained);
    let logn = fields.flag("use_logn_attn", true)?.then_some(trained);
    let positions = fields.size_or_none(&["max_position_embeddings", "n_positions"])?;
    // Either of the two carries the model past its trained length.
    let stretched = dynamic_ntk.or(logn).and(positions).unwrap_or(trained);
    Ok(DecoderConfig {
        family,
        hidden,
        layers,
        q_heads: heads,
        kv_heads: heads,
        head_dim,
        intermediate: doubled / 2,
        experts: None,
        vocab,
        sampled_vocab: sampled_vocab(vocab),
        norm_eps: fields.number("layer_norm_epsilon")?.unwrap_or(1e-6) as f32,
        rope: Rope {
            base: fields.number("rotary_emb_base")?.unwrap_or(10_000.0),
            scaling: RopeScaling::None,
            dynamic_ntk,
        },
        logn,
        qkv_bias: true,
        qk_norm: false,
        tied: fields.flag("tie_word_embeddings", false)?,
        window: vec![None; layers],
        context_max: stretched.max(trained),
        eos_ids: fields.eos_ids()?,
    })
}

/// GGUF files carry the doubled width of the configuration, and every row as a token.
pub(crate) fn complete(config: DecoderConfig) -> DecoderConfig {
    let (intermediate, vocab) = (config.intermediate / 2, sampled_vocab(config.sampled_vocab));
    DecoderConfig { intermediate, sampled_vocab: vocab, ..config }
}

/// How many of `vocab` rows are tokens.
fn sampled_vocab(vocab: usize) -> usize {
    vocab.min(TOKENS)
}
