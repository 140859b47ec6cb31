//! Checkpoints of the Llama architecture (`LlamaForCausalLM`), such as SmolLM2.
//!
//! Quirks: Qwen2 without biases. GGUF files of this architecture store the rows of Q and K in the
//! order that an interleaved rotation wants; they are put back while they are read.

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
    for key in ["attention_bias", "mlp_bias", "rope_interleaved"] {
        fields.require(key, &json!(false))?;
    }
    let like = qwen2::config(family, fields)?;
    Ok(DecoderConfig { qkv_bias: false, ..like })
}
