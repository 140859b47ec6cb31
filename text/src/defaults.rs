//! How a model wants to be sampled when the client does not say.
//!
//! From generation_config.json, else config.json, else GGUF metadata. What is no number at all is
//! refused by name when the model is loaded; a number out of range, which published models have,
//! is brought into it with a warning.

use engine::plan::SamplingParams;
use formats::gguf::Metadata;
use serde_json::{Map, Value};

use crate::error::TextError;
use crate::language::{Files, json};
use crate::tokenizer::{Vocabulary, gguf};

const GENERATION_CONFIG: &str = "generation_config.json";
const METADATA: &str = "metadata.gguf";

/// Tokens that end an answer wherever they are special, though some files forget to say so.
const END_NAMES: [&str; 4] = ["<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>"];

/// The model's own settings.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationDefaults {
    /// Every token that ends an answer, in order.
    pub eos_ids: Vec<u32>,
    /// Neutral where the model has no opinion; greedy where it says not to sample.
    pub params: SamplingParams,
}

impl Default for GenerationDefaults {
    fn default() -> Self {
        Self { eos_ids: Vec::new(), params: SamplingParams::NEUTRAL }
    }
}

#[derive(Default)]
struct Config {
    eos_ids: Option<Vec<u32>>,
    do_sample: Option<bool>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<i64>,
    min_p: Option<f64>,
    repetition_penalty: Option<f64>,
}

impl GenerationDefaults {
    /// With what is wrong with the settings, one sentence each.
    pub(crate) fn load(
        files: &Files,
        metadata: Option<&Metadata>,
        vocabulary: Option<&Vocabulary>,
    ) -> Result<(Self, Vec<String>), TextError> {
        let (file, mut config) = match metadata {
            Some(metadata) => (METADATA, from_metadata(metadata)?),
            None => (GENERATION_CONFIG, from_json(files)?),
        };
        if config.eos_ids.is_none() && metadata.is_none() {
            config.eos_ids = Fields::read(files, "config.json")?.ids("eos_token_id")?;
        }
        let mut eos_ids = config.eos_ids.take().unwrap_or_default();
        if let Some(vocabulary) = vocabulary {
            eos_ids.extend(END_NAMES.iter().filter_map(|name| vocabulary.specials.id(name)));
            if files.keys().any(|name| name.ends_with(".tiktoken")) {
                // The original Qwen also ends where it would begin another's turn.
                eos_ids.extend(vocabulary.specials.id("<|im_start|>"));
            }
        }
        eos_ids.sort_unstable();
        eos_ids.dedup();
        let (params, warnings) = config.params(file);
        Ok((Self { eos_ids, params }, warnings))
    }
}

impl Config {
    /// What a sampler can use of the settings, and one sentence for each that it cannot.
    fn params(self, file: &str) -> (SamplingParams, Vec<String>) {
        let neutral = SamplingParams::NEUTRAL;
        let or = |value: Option<f64>, neutral: f32| value.map_or(neutral, |value| value as f32);
        let temperature = match self.do_sample {
            Some(false) => 0.0,
            _ => or(self.temperature, neutral.temperature),
        };
        let mut params = SamplingParams {
            temperature,
            top_p: or(self.top_p, neutral.top_p),
            // Negative is off, as 0 is.
            top_k: self.top_k.map_or(0, |k| u32::try_from(k.max(0)).unwrap_or(u32::MAX)),
            min_p: or(self.min_p, neutral.min_p),
            repetition_penalty: or(self.repetition_penalty, neutral.repetition_penalty),
            ..neutral
        };
        params.settle_top_p();
        let told = |(error, now)| format!("{file}: {error}; {now} is used instead");
        let warnings = params.clamp().into_iter().map(told).collect();
        (params, warnings)
    }
}

fn from_json(files: &Files) -> Result<Config, TextError> {
    let fields = Fields::read(files, GENERATION_CONFIG)?;
    Ok(Config {
        eos_ids: fields.ids("eos_token_id")?,
        do_sample: fields.typed("do_sample", "true or false", Value::as_bool)?,
        temperature: fields.typed("temperature", "a number", Value::as_f64)?,
        top_p: fields.typed("top_p", "a number", Value::as_f64)?,
        top_k: fields.typed("top_k", "a whole number", whole)?,
        min_p: fields.typed("min_p", "a number", Value::as_f64)?,
        repetition_penalty: fields.typed("repetition_penalty", "a number", Value::as_f64)?,
    })
}

/// The settings of one file, none where it is not there.
struct Fields<'a> {
    file: &'a str,
    map: Map<String, Value>,
}

impl<'a> Fields<'a> {
    fn read(files: &Files, file: &'a str) -> Result<Self, TextError> {
        Ok(Self { file, map: json(files, file)?.unwrap_or_default() })
    }

    /// A setting; null is none.
    fn typed<T>(
        &self,
        name: &str,
        wanted: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, TextError> {
        let Some(value) = self.map.get(name).filter(|value| !value.is_null()) else {
            return Ok(None);
        };
        read(value).map(Some).ok_or_else(|| {
            let found: String = value.to_string().chars().take(80).collect();
            TextError::file(self.file, format!("{name} is {found}, not {wanted}"))
        })
    }

    /// One id or a list of them.
    fn ids(&self, name: &str) -> Result<Option<Vec<u32>>, TextError> {
        let id = |value: &Value| u32::try_from(whole(value)?).ok();
        self.typed(name, "a token id or a list of them", |value| match value {
            Value::Array(list) => list.iter().map(id).collect(),
            one => Some(vec![id(one)?]),
        })
    }
}

/// Python does not tell 50.0 from 50 everywhere, so files hold either.
fn whole(value: &Value) -> Option<i64> {
    let float = || value.as_f64().filter(|n| n.fract() == 0.0 && n.abs() < 1e15);
    value.as_i64().or_else(|| float().map(|n| n as i64))
}

fn from_metadata(metadata: &Metadata) -> Result<Config, TextError> {
    let broken = |error: formats::FormatError| TextError::file(METADATA, error);
    let number = |key: &str| metadata.number(key).map_err(broken);
    let mut ids = Vec::new();
    for name in ["eos", "eot", "eom"] {
        ids.extend(gguf::id(metadata, &format!("tokenizer.ggml.{name}_token_id"))?);
    }
    Ok(Config {
        eos_ids: Some(ids),
        do_sample: None,
        temperature: number("general.sampling.temp")?,
        top_p: number("general.sampling.top_p")?,
        top_k: number("general.sampling.top_k")?.map(|k| k as i64),
        min_p: number("general.sampling.min_p")?,
        repetition_penalty: number("general.sampling.penalty_repeat")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(json: &str) -> Result<GenerationDefaults, TextError> {
        let files = Files::from([("generation_config.json".to_owned(), json.into())]);
        GenerationDefaults::load(&files, None, None).map(|(defaults, _)| defaults)
    }

    fn warnings(json: &str) -> Vec<String> {
        let files = Files::from([("generation_config.json".to_owned(), json.into())]);
        GenerationDefaults::load(&files, None, None).unwrap().1
    }

    #[test]
    fn what_the_file_says_is_the_default() {
        let defaults = load(
            r#"{"eos_token_id": [151645, 151643], "do_sample": true, "temperature": 0.7,
                "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "future": [1]}"#,
        );
        let expected = GenerationDefaults {
            eos_ids: vec![151643, 151645],
            params: SamplingParams {
                temperature: 0.7,
                top_p: 0.8,
                top_k: 20,
                repetition_penalty: 1.05,
                ..SamplingParams::NEUTRAL
            },
        };
        assert_eq!(defaults.unwrap(), expected);
        let greedy = load(r#"{"eos_token_id": 2, "do_sample": false, "top_k": -1}"#).unwrap();
        assert_eq!((greedy.params.temperature, greedy.params.top_k), (0.0, 0));
        assert_eq!(greedy.eos_ids, [2]);
        let floats = load(r#"{"eos_token_id": [2.0, 3], "top_k": 50.0, "top_p": null}"#).unwrap();
        let SamplingParams { top_k, top_p, .. } = floats.params;
        assert_eq!((floats.eos_ids, top_k, top_p), (vec![2, 3], 50, 1.0));
    }

    #[test]
    fn numbers_out_of_range_are_brought_into_it_with_a_warning() {
        let json = r#"{"temperature": 2.5, "top_p": 1.5, "min_p": -1, "repetition_penalty": 0}"#;
        let SamplingParams { temperature, top_p, min_p, repetition_penalty, .. } =
            load(json).unwrap().params;
        assert_eq!((temperature, top_p, min_p, repetition_penalty), (2.0, 1.0, 0.0, 1.0));
        assert_eq!(
            warnings(json),
            [
                "generation_config.json: temperature must be in [0, 2], not 2.5; 2 is used instead",
                "generation_config.json: top_p must be in (0, 1], not 1.5; 1 is used instead",
                "generation_config.json: min_p must be in [0, 1], not -1; 0 is used instead",
                "generation_config.json: repetition_penalty must be in (0, 100], not 0; 1 is used \
                 instead",
            ]
        );
        let likeliest = load(r#"{"top_p": 0}"#).unwrap().params;
        assert_eq!((likeliest.top_p, likeliest.top_k), (1.0, 1));
        assert!(warnings(r#"{"temperature": 2, "top_p": 0}"#).is_empty());
    }

    #[test]
    fn values_that_no_sampler_can_use_are_refused_by_name() {
        for (name, value) in [
            ("temperature", "\"hot\""),
            ("top_k", "50.5"),
            ("eos_token_id", "-1"),
            ("do_sample", "1"),
            ("top_p", "NaN"),
        ] {
            let error = load(&format!(r#"{{"{name}": {value}}}"#)).unwrap_err().to_string();
            assert!(error.contains("generation_config.json"), "{error}");
            assert!(error.contains(name) || error.contains("NaN"), "{error}");
        }
    }
}
