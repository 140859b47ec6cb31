//! What the forward pass needs to know of a model, whatever family and file it came from.
//!
//! Families differ by data, not by branches: a family file maps its own settings to
//! [`DecoderConfig`] and everything after that reads this one type. Settings that the forward pass
//! does not honour are refused here by name, never ignored.

mod json;
mod metadata;
mod quantisation;

use crate::{ModelError, families::Family};
use json::architecture;
pub(crate) use json::{Fields, shown};
use kernels::{Routing, shape};
pub(crate) use quantisation::Quantisation;

/// Rotary position embedding, rotate-half.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the geometric series of wavelengths, θ.
    pub base: f64,
    pub scaling: RopeScaling,
    /// Original Qwen: prompts longer than this many tokens raise the base.
    pub dynamic_ntk: Option<usize>,
}

/// How the frequencies of [`Rope`] are stretched for contexts beyond the trained one.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    /// Positions divided by `factor`.
    Linear {
        factor: f64,
    },
    /// YaRN (Peng et al., 2023): frequencies between the two betas are blended.
    Yarn {
        factor: f64,
        /// Tokens of context before stretching.
        original_context: usize,
        beta_fast: f64,
        beta_slow: f64,
        /// Scales cosines and sines; 0.1·ln(factor) + 1 unless the model says otherwise.
        attention_factor: f64,
        /// Whether the correction range is rounded to whole dimensions.
        truncate: bool,
    },
    /// The rule of Llama 3.1: long wavelengths divided by `factor`, middle ones blended.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_context: usize,
    },
    /// [D/2] divisors of the frequencies, as GGUF stores the outcome of the Llama 3.1 rule.
    Divisors(Vec<f32>),
}

/// One decoder-only transformer of the Qwen kind.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    pub family: &'static Family,
    /// H.
    pub hidden: usize,
    pub layers: usize,
    pub q_heads: usize,
    /// Divides `q_heads`.
    pub kv_heads: usize,
    /// D, even.
    pub head_dim: usize,
    /// I, the real width of the feed-forward layer.
    pub intermediate: usize,
    /// Some layers choose between experts instead.
    pub experts: Option<Experts>,
    /// V, rows of the embedding table.
    pub vocab: usize,
    /// Ids from here up are padding rows of the table and never sampled; at most `vocab`.
    pub sampled_vocab: usize,
    pub norm_eps: f32,
    pub rope: Rope,
    /// Queries at positions beyond this are scaled by log_{logn}(position).
    pub logn: Option<usize>,
    pub qkv_bias: bool,
    /// Root-mean-square norm of every query and key head before the rotation.
    pub qk_norm: bool,
    /// The output matrix is the embedding table.
    pub tied: bool,
    /// [layers] keys that a query sees, itself included; `None` is all.
    pub window: Vec<Option<usize>>,
    /// Tokens of prompt and answer together.
    pub context_max: usize,
    /// Tokens that end an answer, as far as the model's configuration names them.
    pub eos_ids: Vec<u32>,
}

/// Mixtures of experts, in place of the feed-forward halves of some layers.
#[derive(Clone, Debug, PartialEq)]
pub struct Experts {
    /// E.
    pub count: usize,
    /// Experts that a token goes to, k.
    pub per_token: usize,
    /// Width of one expert.
    pub intermediate: usize,
    /// The weights of a token's experts are divided by their sum.
    pub normalise: bool,
    /// Width of the expert that every token goes to as well.
    pub shared: Option<usize>,
    /// [layers] whether the layer has experts.
    pub sparse: Vec<bool>,
}

impl Experts {
    pub(crate) fn routing(&self) -> Routing {
        Routing {
            experts: self.count,
            per_token: self.per_token,
            normalise: self.normalise,
            shared: self.shared.is_some(),
        }
    }
}

/// Sizes beyond these are taken for a damaged file rather than a model.
const LAYERS_MAX: usize = 4096;
const DIMENSION_MAX: usize = 1 << 24;

impl DecoderConfig {
    /// The experts of a layer, where it has some.
    pub(crate) fn experts_of(&self, layer: usize) -> Option<&Experts> {
        self.experts.as_ref().filter(|experts| experts.sparse.get(layer) == Some(&true))
    }

    /// Whether some layer has a feed-forward half without experts.
    pub(crate) fn has_dense_layers(&self) -> bool {
        self.experts.as_ref().is_none_or(|experts| experts.sparse.contains(&false))
    }

    /// Reads a Hugging Face `config.json`.
    ///
    /// # Errors
    /// `Unsupported` names the architecture or setting; `Checkpoint` what is missing or invalid.
    pub fn from_json(text: &[u8]) -> Result<Self, ModelError> {
        let fields = Fields::parse(text)?;
        let name = architecture(&fields)?;
        let family = Family::find("architecture", |family| family.architecture, name)?;
        (family.config)(family, &fields)?.validated()
    }

    /// Checks that the numbers fit each other and a machine's arithmetic.
    pub(crate) fn validated(self) -> Result<Self, ModelError> {
        let sizes = [
            ("hidden size", self.hidden),
            ("query heads", self.q_heads),
            ("kv heads", self.kv_heads),
            ("head size", self.head_dim),
            ("feed-forward width", self.intermediate),
            ("vocabulary", self.vocab),
            ("context", self.context_max),
        ];
        if let Some((what, value)) = sizes.iter().find(|(_, v)| *v == 0 || *v > DIMENSION_MAX) {
            return Err(invalid(format!("{what} of {value}")));
        }
        check_layers(self.layers)?;
        if !self.q_heads.is_multiple_of(self.kv_heads) {
            return Err(invalid(format!(
                "{} query heads that {} kv heads cannot share evenly",
                self.q_heads, self.kv_heads
            )));
        }
        if !self.head_dim.is_multiple_of(2) || self.head_dim > 1 << 16 {
            return Err(invalid(format!("heads of {} dimensions", self.head_dim)));
        }
        if self.window.len() != self.layers || self.window.contains(&Some(0)) {
            return Err(invalid("an attention window of no tokens".into()));
        }
        if !(self.norm_eps.is_finite() && self.norm_eps > 0.0) {
            return Err(invalid(format!("a norm epsilon of {}", self.norm_eps)));
        }
        self.rope.validate(self.head_dim)?;
        self.experts.as_ref().map_or(Ok(()), |experts| experts.validate(self.layers))?;
        let lengths = [self.rope.dynamic_ntk, self.logn];
        if lengths.iter().flatten().any(|length| *length < 2) {
            return Err(invalid("a trained length below 2 tokens".into()));
        }
        Ok(self)
    }
}

impl Experts {
    fn validate(&self, layers: usize) -> Result<(), ModelError> {
        let widths = [Some(self.intermediate), self.shared];
        if let Some(width) = widths.iter().flatten().find(|n| **n == 0 || **n > DIMENSION_MAX) {
            return Err(invalid(format!("experts of width {width}")));
        }
        if self.sparse.len() != layers {
            return Err(invalid(format!("{} kinds of {layers} layers", self.sparse.len())));
        }
        shape::routing("config", self.routing()).map_err(|error| invalid(error.detail))
    }
}

impl Rope {
    pub(crate) fn validate(&self, head_dim: usize) -> Result<(), ModelError> {
        let positive = |what: &str, value: f64| match value.is_finite() && value > 0.0 {
            true => Ok(()),
            false => Err(invalid(format!("a rope {what} of {value}"))),
        };
        positive("base", self.base)?;
        match &self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => positive("factor", *factor),
            RopeScaling::Yarn {
                factor,
                original_context,
                beta_fast,
                beta_slow,
                attention_factor,
                ..
            } => {
                positive("factor", *factor)?;
                positive("original context", *original_context as f64)?;
                positive("beta_fast", *beta_fast)?;
                positive("beta_slow", *beta_slow)?;
                positive("attention factor", *attention_factor)
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                positive("factor", *factor)?;
                positive("low_freq_factor", *low_freq_factor)?;
                positive("high_freq_factor", *high_freq_factor - *low_freq_factor)?;
                positive("original context", *original_context as f64)
            }
            RopeScaling::Divisors(divisors) => {
                if divisors.len() != head_dim / 2 {
                    return Err(invalid(format!(
                        "{} rope divisors for heads of {head_dim}",
                        divisors.len()
                    )));
                }
                divisors.iter().try_for_each(|d| positive("divisor", f64::from(*d)))
            }
        }
    }
}

/// Before anything is allocated by the layer.
fn check_layers(layers: usize) -> Result<(), ModelError> {
    match layers {
        1..=LAYERS_MAX => Ok(()),
        _ => Err(invalid(format!("{layers} layers"))),
    }
}

fn invalid(what: String) -> ModelError {
    ModelError::Checkpoint(format!("the configuration gives {what}; the file is damaged"))
}

#[cfg(test)]
mod tests;
