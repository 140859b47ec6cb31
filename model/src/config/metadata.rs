//! The metadata of GGUF files, whose keys are the same for every family but for a prefix.

use formats::{Tensors, gguf::Metadata};

use super::{
    DecoderConfig, Experts, Rope, RopeScaling, check_layers,
    json::{shown, yarn_attention},
};
use crate::{ModelError, families::Family, weights::GGUF};

impl DecoderConfig {
    /// Reads the metadata of a GGUF file. What the metadata leaves open the tensors tell: rows of
    /// the vocabulary, whether there are biases and an output matrix.
    ///
    /// # Errors
    /// `Unsupported` names the architecture or setting; `Checkpoint` what is missing or senseless.
    pub fn from_gguf(metadata: &Metadata, tensors: &Tensors) -> Result<Self, ModelError> {
        let architecture = metadata.string("general.architecture")?.unwrap_or("");
        let family =
            Family::find("GGUF architecture", |family| family.gguf_architecture, architecture)?;
        let config = Keys { metadata, architecture }.config(family, tensors)?;
        (family.complete)(config).validated()
    }
}

struct Keys<'a> {
    metadata: &'a Metadata,
    architecture: &'a str,
}

impl Keys<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn size_or_none(&self, key: &str) -> Result<Option<usize>, ModelError> {
        let value = self.metadata.unsigned(&self.key(key))?;
        Ok(value.map(|n| usize::try_from(n).unwrap_or(usize::MAX)))
    }

    fn size(&self, key: &str) -> Result<usize, ModelError> {
        self.size_or_none(key)?
            .ok_or_else(|| ModelError::Checkpoint(format!("the metadata lacks {}", self.key(key))))
    }

    fn number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        Ok(self.metadata.number(&self.key(key))?)
    }

    fn config(
        &self,
        family: &'static Family,
        tensors: &Tensors,
    ) -> Result<DecoderConfig, ModelError> {
        let layers = self.size("block_count")?;
        check_layers(layers)?;
        let hidden = self.size("embedding_length")?;
        let q_heads = self.size("attention.head_count")?;
        let head_dim = self.head_dim(hidden / q_heads.max(1))?;
        let (rope, context_max) = self.rope(self.size("context_length")?)?;
        self.refuse_windows(context_max)?;
        let embed = format!("{}.weight", GGUF.embed);
        let rows = tensors.get(&embed).and_then(|info| info.shape.first().copied());
        let vocab = rows
            .and_then(|rows| usize::try_from(rows).ok())
            .ok_or_else(|| ModelError::Checkpoint(format!("the file has no tensor {embed}")))?;
        let tokens = self.metadata.array("tokenizer.ggml.tokens")?.map_or(vocab, |t| t.len());
        let width = self.size("feed_forward_length")?;
        let eos = self.metadata.unsigned("tokenizer.ggml.eos_token_id")?;
        let sampled_vocab = tokens.clamp(1, vocab.max(1));
        Ok(DecoderConfig {
            family,
            hidden,
            layers,
            q_heads,
            kv_heads: self.size_or_none("attention.head_count_kv")?.unwrap_or(q_heads),
            head_dim,
            intermediate: width,
            experts: self.experts(family, tensors, layers)?,
            vocab,
            sampled_vocab,
            norm_eps: self.number("attention.layer_norm_rms_epsilon")?.unwrap_or(1e-6) as f32,
            rope,
            // The files do not say how the original models treat long prompts.
            logn: None,
            qkv_bias: ["blk.0.attn_q.bias", "blk.0.attn_qkv.bias"]
                .iter()
                .any(|bias| tensors.get(bias).is_some()),
            qk_norm: false,
            tied: tensors.get("output.weight").is_none(),
            window: vec![None; layers],
            context_max,
            eos_ids: eos.and_then(|id| u32::try_from(id).ok()).into_iter().collect(),
        })
    }

    fn head_dim(&self, default: usize) -> Result<usize, ModelError> {
        let head_dim = self.size_or_none("attention.key_length")?.unwrap_or(default);
        for key in ["attention.value_length", "rope.dimension_count"] {
            if let Some(found) = self.size_or_none(key)?.filter(|found| *found != head_dim) {
                let key = self.key(key);
                return Err(ModelError::Unsupported(format!(
                    "{key} of {found} with heads of {head_dim}"
                )));
            }
        }
        Ok(head_dim)
    }

    fn rope(&self, context: usize) -> Result<(Rope, usize), ModelError> {
        let base = self.number("rope.freq_base")?.unwrap_or(10_000.0);
        let (scaling, context_max) = self.rope_scaling(context)?;
        Ok((Rope { base, scaling, dynamic_ntk: None }, context_max))
    }

    fn rope_scaling(&self, context: usize) -> Result<(RopeScaling, usize), ModelError> {
        let factor = match self.number("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => self.number("rope.scale_linear")?,
        };
        let original = self.size_or_none("rope.scaling.original_context_length")?;
        let original_context = original.unwrap_or(context);
        let key = self.key("rope.scaling.type");
        let kind = self.metadata.string(&key)?.unwrap_or("linear");
        let Some(factor) = factor.filter(|factor| kind != "none" && *factor != 1.0) else {
            return Ok((RopeScaling::None, context));
        };
        let context_max = context.max((original_context as f64 * factor) as usize);
        let scaling = match kind {
            "linear" => RopeScaling::Linear { factor },
            "yarn" => {
                for key in ["rope.scaling.yarn_log_multiplier", "rope.scaling.yarn_ext_factor"] {
                    if self.number(key)?.is_some() {
                        return Err(ModelError::Unsupported(self.key(key)));
                    }
                }
                let own = self.number("rope.scaling.attn_factor")?.unwrap_or(1.0);
                RopeScaling::Yarn {
                    factor,
                    original_context,
                    beta_fast: self.number("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                    beta_slow: self.number("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
                    attention_factor: own * yarn_attention(factor),
                    truncate: true,
                }
            }
            other => {
                return Err(ModelError::Unsupported(format!(
                    "{key} = {:?}; supported are linear and yarn",
                    shown(other)
                )));
            }
        };
        Ok((scaling, context_max))
    }

    /// What a mixture of experts is like, as far as the tensors of its layers do not tell.
    fn experts(
        &self,
        family: &Family,
        tensors: &Tensors,
        layers: usize,
    ) -> Result<Option<Experts>, ModelError> {
        let count = self.size_or_none("expert_count")?.unwrap_or(0);
        if count > 0 && !family.experts {
            let key = self.key("expert_count");
            return Err(ModelError::Unsupported(format!(
                "a mixture of experts ({key} = {count}) in a {} model",
                family.name
            )));
        }
        if !family.experts {
            return Ok(None);
        }
        let names = GGUF.experts;
        let shape = |layer: usize, name: &str| {
            let info = tensors.get(&format!("{}.weight", GGUF.of_layer(layer, name)))?;
            info.shape.iter().map(|n| usize::try_from(*n).ok()).collect::<Option<Vec<usize>>>()
        };
        let sparse: Vec<bool> =
            (0..layers).map(|layer| shape(layer, names.router).is_some()).collect();
        let one = sparse.iter().position(|sparse| *sparse).unwrap_or(0);
        let Some(&[_, intermediate, _]) = shape(one, names.each.gate).as_deref() else {
            return Err(ModelError::Checkpoint(format!(
                "tensor {}.weight [experts, width, hidden] is missing",
                GGUF.of_layer(one, names.each.gate)
            )));
        };
        Ok(Some(Experts {
            count: self.size("expert_count")?,
            per_token: self.size("expert_used_count")?,
            intermediate,
            normalise: false,
            shared: shape(one, names.shared.gate).and_then(|shape| shape.first().copied()),
            sparse,
        }))
    }

    /// Windows, which no GGUF file says the layers of.
    fn refuse_windows(&self, context_max: usize) -> Result<(), ModelError> {
        match self.size_or_none("attention.sliding_window")? {
            Some(window) if (1..context_max).contains(&window) => Err(ModelError::Unsupported(
                format!("{} = {window}", self.key("attention.sliding_window")),
            )),
            _ => Ok(()),
        }
    }
}
