//! Qwen3, the dense models (`Qwen3ForCausalLM`).
//!
//! Quirks: no biases; every query and key head is normalised before the rotation; `head_dim` is
//! given and need not be hidden / heads.

use serde_json::json;

use crate::{
    ModelError,
    config::{DecoderConfig, Fields},
    families::Family,
    qwen2,
};

/// Settings of `config.json`.
pub(crate) fn config(
    family: &'static Family,
    fields: &Fields,
) -> Result<DecoderConfig, ModelError> {
    fields.require("attention_bias", &json!(false))?;
    let like = qwen2::config(family, fields)?;
    let head_dim = fields.size_or_none(&["head_dim"])?.unwrap_or(128);
    Ok(DecoderConfig { qkv_bias: false, qk_norm: true, head_dim, ..like })
}
