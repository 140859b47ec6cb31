//! Mixtures of experts: Qwen1.5-MoE and Qwen2-57B-A14B (`Qwen2MoeForCausalLM`), Qwen3-30B-A3B and
//! -235B-A22B (`Qwen3MoeForCausalLM`).
//!
//! Quirks: a layer has experts unless `mlp_only_layers` names it or `decoder_sparse_step` passes it
//! by. The softmax is over all experts, before k are chosen. Qwen2 adds an expert for every token,
//! behind a gate. GGUF files hold each matrix of a layer's experts as one tensor, and do not say
//! whether weights are normalised: Qwen3 does, Qwen2 does not.

use serde_json::json;

use crate::{
    ModelError,
    config::{DecoderConfig, Experts, Fields},
    families::Family,
    qwen2,
    weights::{ExpertNames, FfnNames},
};

/// Checkpoint names.
pub(crate) const NAMES: ExpertNames = ExpertNames {
    router: "mlp.gate",
    shared_gate: "mlp.shared_expert_gate",
    shared: FfnNames {
        gate: "mlp.shared_expert.gate_proj",
        up: "mlp.shared_expert.up_proj",
        down: "mlp.shared_expert.down_proj",
    },
    folder: Some("mlp.experts"),
    each: FfnNames { gate: "gate_proj", up: "up_proj", down: "down_proj" },
};

/// Settings of `config.json` of Qwen2.
pub(crate) fn qwen2(family: &'static Family, fields: &Fields) -> Result<DecoderConfig, ModelError> {
    fields.require("qkv_bias", &json!(true))?;
    let shared = fields.size(&["shared_expert_intermediate_size"])?;
    let like = qwen2::config(family, fields)?;
    let experts = experts(fields, like.layers, Some(shared))?;
    Ok(DecoderConfig { experts: Some(experts), ..like })
}

/// Settings of `config.json` of Qwen3.
pub(crate) fn qwen3(family: &'static Family, fields: &Fields) -> Result<DecoderConfig, ModelError> {
    fields.require("attention_bias", &json!(false))?;
    let like = qwen2::config(family, fields)?;
    let experts = experts(fields, like.layers, None)?;
    Ok(DecoderConfig { experts: Some(experts), qkv_bias: false, qk_norm: true, ..like })
}

/// What GGUF files of Qwen3 leave unsaid.
pub(crate) fn complete_qwen3(config: DecoderConfig) -> DecoderConfig {
    let experts = config.experts.map(|experts| Experts { normalise: true, ..experts });
    DecoderConfig { experts, qk_norm: true, ..config }
}

fn experts(fields: &Fields, layers: usize, shared: Option<usize>) -> Result<Experts, ModelError> {
    let step = fields.size_or_none(&["decoder_sparse_step"])?.unwrap_or(1);
    let dense = fields.sizes("mlp_only_layers")?.unwrap_or_default();
    let is_sparse =
        |layer: usize| !dense.contains(&layer) && step > 0 && (layer + 1).is_multiple_of(step);
    Ok(Experts {
        count: fields.size(&["num_experts"])?,
        per_token: fields.size(&["num_experts_per_tok"])?,
        intermediate: fields.size(&["moe_intermediate_size"])?,
        normalise: fields.flag("norm_topk_prob", false)?,
        shared,
        sparse: (0..layers).map(is_sparse).collect(),
    })
}
