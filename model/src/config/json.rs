//! `config.json` of Hugging Face checkpoints, read by key with errors that name the key.

use serde_json::{Map, Value};

use super::{Rope, RopeScaling};
use crate::ModelError;

/// The settings of one `config.json`, or of an object inside it.
pub(crate) struct Fields(Map<String, Value>);

impl Fields {
    pub(crate) fn parse(text: &[u8]) -> Result<Self, ModelError> {
        formats::json::parse(text)
            .map(Self)
            .map_err(|reason| ModelError::Checkpoint(format!("config.json: {reason}")))
    }

    /// The value of the first of `keys` that is present and not null.
    fn find<'a>(&self, keys: &[&'a str]) -> Option<(&'a str, &Value)> {
        keys.iter().find_map(|key| {
            self.0.get(*key).filter(|value| !value.is_null()).map(|value| (*key, value))
        })
    }

    fn typed<T>(
        &self,
        keys: &[&str],
        wanted: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        self.find(keys)
            .map(|(key, value)| {
                read(value).ok_or_else(|| {
                    let found = shown(&value.to_string());
                    ModelError::Checkpoint(format!("config.json: {key} is {found}, not {wanted}"))
                })
            })
            .transpose()
    }

    /// A required size; `keys` are its names over the years.
    pub(crate) fn size(&self, keys: &[&str]) -> Result<usize, ModelError> {
        self.size_or_none(keys)?
            .ok_or_else(|| ModelError::Checkpoint(format!("config.json lacks {}", keys[0])))
    }

    /// The number of layers, bounded so that lists of layers are.
    pub(crate) fn layers(&self, keys: &[&str]) -> Result<usize, ModelError> {
        let layers = self.size(keys)?;
        super::check_layers(layers).map(|()| layers)
    }

    pub(crate) fn size_or_none(&self, keys: &[&str]) -> Result<Option<usize>, ModelError> {
        self.typed(keys, "a whole number", |v| usize::try_from(whole(v)?).ok())
    }

    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        self.typed(&[key], "a number", Value::as_f64)
    }

    pub(crate) fn flag(&self, key: &str, default: bool) -> Result<bool, ModelError> {
        Ok(self.typed(&[key], "true or false", Value::as_bool)?.unwrap_or(default))
    }

    pub(crate) fn text(&self, keys: &[&str]) -> Result<Option<String>, ModelError> {
        self.typed(keys, "a name", name)
    }

    pub(crate) fn object(&self, key: &str) -> Result<Option<Self>, ModelError> {
        self.typed(&[key], "an object", |v| v.as_object().cloned().map(Self))
    }

    /// The objects in an object, whatever they are called.
    pub(crate) fn objects(&self, key: &str) -> Result<Vec<Self>, ModelError> {
        let found = self.typed(&[key], "an object of objects", |v| {
            v.as_object()?.values().map(|v| v.as_object().cloned().map(Self)).collect()
        })?;
        Ok(found.unwrap_or_default())
    }

    pub(crate) fn sizes(&self, key: &str) -> Result<Option<Vec<usize>>, ModelError> {
        self.typed(&[key], "a list of few whole numbers", |v| {
            let list = v.as_array().filter(|list| list.len() <= NAME_MAX)?;
            list.iter().map(|v| usize::try_from(whole(v)?).ok()).collect()
        })
    }

    /// Refuses the model unless the setting is absent or as wanted.
    pub(crate) fn require(&self, key: &str, wanted: &Value) -> Result<(), ModelError> {
        match self.find(&[key]) {
            Some((_, found)) if found != wanted => Err(ModelError::Unsupported(format!(
                "{key} = {} in config.json; only {wanted} is supported",
                shown(&found.to_string())
            ))),
            _ => Ok(()),
        }
    }

    /// `eos_token_id`: one id, several or none.
    pub(crate) fn eos_ids(&self) -> Result<Vec<u32>, ModelError> {
        let id = |v: &Value| u32::try_from(whole(v)?).ok();
        let ids = self.typed(&["eos_token_id"], "a token id or a list of them", |v| match v {
            Value::Array(list) => list.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        })?;
        Ok(ids.unwrap_or_default())
    }

    /// The rotary settings of the Llama and Qwen2 line, in both layouts that are in use: beside the
    /// other settings (`rope_theta`, `rope_scaling`) and gathered in `rope_parameters`. With them,
    /// the context that stretching gives.
    pub(crate) fn rope(&self, context: usize) -> Result<(Rope, usize), ModelError> {
        let gathered = self.object("rope_parameters")?;
        let scaling = gathered.as_ref();
        let base = match scaling.map(|s| s.number("rope_theta")).transpose()?.flatten() {
            Some(base) => base,
            None => self.number("rope_theta")?.unwrap_or(10_000.0),
        };
        let old = self.object("rope_scaling")?;
        let (scaling, context) = match old.as_ref().or(scaling) {
            Some(fields) => fields.rope_scaling(context)?,
            None => (RopeScaling::None, context),
        };
        Ok((Rope { base, scaling, dynamic_ntk: None }, context))
    }

    fn rope_scaling(&self, context: usize) -> Result<(RopeScaling, usize), ModelError> {
        let needed = |key: &str| {
            self.number(key)?.ok_or_else(|| {
                ModelError::Checkpoint(format!("config.json: the rope scaling lacks {key}"))
            })
        };
        let original_context =
            self.size_or_none(&["original_max_position_embeddings"])?.unwrap_or(context);
        let stretched = |factor: f64| context.max((original_context as f64 * factor) as usize);
        let kind = self.text(&["rope_type", "type"])?;
        match kind.as_deref().unwrap_or("default") {
            "default" => Ok((RopeScaling::None, context)),
            "linear" => {
                let factor = needed("factor")?;
                Ok((RopeScaling::Linear { factor }, stretched(factor)))
            }
            "yarn" => {
                for key in ["mscale", "mscale_all_dim"] {
                    if self.number(key)?.is_some() {
                        return Err(ModelError::Unsupported(format!("rope scaling with {key}")));
                    }
                }
                let factor = needed("factor")?;
                let attention_factor = self.number("attention_factor")?;
                let yarn = RopeScaling::Yarn {
                    factor,
                    original_context,
                    beta_fast: self.number("beta_fast")?.unwrap_or(32.0),
                    beta_slow: self.number("beta_slow")?.unwrap_or(1.0),
                    attention_factor: attention_factor.unwrap_or_else(|| yarn_attention(factor)),
                    truncate: self.flag("truncate", true)?,
                };
                Ok((yarn, stretched(factor)))
            }
            "llama3" => {
                let llama3 = RopeScaling::Llama3 {
                    factor: needed("factor")?,
                    low_freq_factor: needed("low_freq_factor")?,
                    high_freq_factor: needed("high_freq_factor")?,
                    original_context,
                };
                Ok((llama3, context))
            }
            other => Err(ModelError::Unsupported(format!(
                "rope scaling {other}; supported are linear, yarn and llama3"
            ))),
        }
    }

    /// Attention windows by layer: `layer_types` where given, else the layers from
    /// `max_window_layers` up, and none at all without `use_sliding_window`.
    pub(crate) fn windows(&self, layers: usize) -> Result<Vec<Option<usize>>, ModelError> {
        let window = match self.flag("use_sliding_window", false)? {
            true => self.size_or_none(&["sliding_window"])?,
            false => None,
        };
        let kinds = self.typed(&["layer_types"], "a list of names", |v| {
            v.as_array()?.iter().map(name).collect()
        })?;
        let Some(kinds): Option<Vec<String>> = kinds else {
            let first = self.size_or_none(&["max_window_layers"])?.unwrap_or(0);
            return Ok((0..layers).map(|layer| window.filter(|_| layer >= first)).collect());
        };
        if kinds.len() != layers {
            return Err(ModelError::Checkpoint(format!(
                "config.json: layer_types has {} entries for {layers} layers",
                kinds.len()
            )));
        }
        let of_kind = |kind: &String| match kind.as_str() {
            "full_attention" => Ok(None),
            "sliding_attention" if window.is_some() => Ok(window),
            other => Err(ModelError::Unsupported(format!("layer type {other}"))),
        };
        kinds.iter().map(of_kind).collect()
    }
}

/// Names and lists of sizes longer than this are none: messages repeat them.
const NAME_MAX: usize = 80;

/// The start of what a file says, for a message.
pub(crate) fn shown(found: &str) -> String {
    found.chars().take(NAME_MAX).collect()
}

fn name(value: &Value) -> Option<String> {
    value.as_str().filter(|name| name.len() <= NAME_MAX).map(str::to_owned)
}

/// A size or an id; Python does not tell 50.0 from 50 everywhere, so files hold either.
fn whole(value: &Value) -> Option<u64> {
    let float = || value.as_f64().filter(|n| n.fract() == 0.0 && (0.0..1e15).contains(n));
    value.as_u64().or_else(|| float().map(|n| n as u64))
}

/// YaRN's recommended attention factor, 0.1·ln(factor) + 1.
pub(super) fn yarn_attention(factor: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 }
}

/// The class that the checkpoint was saved from.
pub(super) fn architecture(fields: &Fields) -> Result<&str, ModelError> {
    let list = fields.find(&["architectures"]).and_then(|(_, value)| value.as_array());
    match list.map(Vec::as_slice) {
        Some([Value::String(name)]) => Ok(name),
        _ => Err(ModelError::Checkpoint("config.json does not name one architecture".into())),
    }
}
