//! Every model family that is run, and all that tells one from another.

use std::fmt;

use crate::{
    DecoderConfig, ModelError,
    config::{Fields, shown},
    llama, moe, qwen1, qwen2, qwen3,
    weights::{GGUF, Qkv, TensorNames},
};

/// One family: what its checkpoints are called in either file format, and how its settings become
/// a [`DecoderConfig`].
pub struct Family {
    /// As messages say it.
    pub name: &'static str,
    /// The class that `config.json` names.
    pub architecture: &'static str,
    /// `general.architecture` of GGUF files.
    pub gguf_architecture: &'static str,
    pub(crate) names: TensorNames,
    pub(crate) gguf_names: TensorNames,
    /// Layers choose between experts.
    pub(crate) experts: bool,
    /// From `config.json`.
    pub(crate) config: fn(&'static Self, &Fields) -> Result<DecoderConfig, ModelError>,
    /// What GGUF metadata leaves unsaid of the family.
    pub(crate) complete: fn(DecoderConfig) -> DecoderConfig,
}

/// All of them.
pub static FAMILIES: [Family; 6] = [
    Family {
        name: "qwen1",
        architecture: "QWenLMHeadModel",
        gguf_architecture: "qwen",
        names: qwen1::NAMES,
        gguf_names: TensorNames { qkv: Qkv::Packed("attn_qkv"), ..GGUF },
        experts: false,
        config: qwen1::config,
        complete: qwen1::complete,
    },
    Family {
        name: "qwen2",
        architecture: "Qwen2ForCausalLM",
        gguf_architecture: "qwen2",
        names: qwen2::NAMES,
        gguf_names: GGUF,
        experts: false,
        config: qwen2::config,
        complete: |config| config,
    },
    Family {
        name: "qwen3",
        architecture: "Qwen3ForCausalLM",
        gguf_architecture: "qwen3",
        names: qwen2::NAMES,
        gguf_names: GGUF,
        experts: false,
        config: qwen3::config,
        complete: |config| DecoderConfig { qk_norm: true, ..config },
    },
    Family {
        name: "qwen2-moe",
        architecture: "Qwen2MoeForCausalLM",
        gguf_architecture: "qwen2moe",
        names: qwen2::NAMES,
        gguf_names: GGUF,
        experts: true,
        config: moe::qwen2,
        complete: |config| config,
    },
    Family {
        name: "qwen3-moe",
        architecture: "Qwen3MoeForCausalLM",
        gguf_architecture: "qwen3moe",
        names: qwen2::NAMES,
        gguf_names: GGUF,
        experts: true,
        config: moe::qwen3,
        complete: moe::complete_qwen3,
    },
    Family {
        name: "llama",
        architecture: "LlamaForCausalLM",
        gguf_architecture: "llama",
        names: qwen2::NAMES,
        gguf_names: TensorNames { interleaved_rope: true, ..GGUF },
        experts: false,
        config: llama::config,
        complete: |config| config,
    },
];

impl Family {
    /// The family whose `name` (one of the fields) is `wanted`.
    ///
    /// # Errors
    /// `Unsupported` lists those that there are.
    pub(crate) fn find(
        what: &str,
        name: fn(&Self) -> &'static str,
        wanted: &str,
    ) -> Result<&'static Self, ModelError> {
        FAMILIES.iter().find(|family| name(family) == wanted).ok_or_else(|| {
            let known: Vec<&str> = FAMILIES.iter().map(name).collect();
            let (last, others) = known.split_last().unwrap_or((&"none", &[]));
            let known = format!("{} and {last}", others.join(", "));
            ModelError::Unsupported(format!("{what} {:?}; supported are {known}", shown(wanted)))
        })
    }
}

impl PartialEq for Family {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl fmt::Debug for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}
