//! Sampling parameters and options that chat and text completions share.

use super::fields::{Fields, as_uint, wrong};
use crate::{RouterError, sampling::SamplingInput};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// How the answer is delivered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Delivery {
    pub stream: bool,
    /// A last chunk with the usage.
    pub include_usage: bool,
    /// Chunks without choices that say how far each has come.
    pub include_progress: bool,
}

/// Everything about sampling but `logprobs`, which the two routes spell differently.
pub(crate) fn sampling(fields: &mut Fields) -> Result<SamplingInput, RouterError> {
    Ok(SamplingInput {
        max_tokens: fields.uint("max_tokens")?,
        temperature: fields.float("temperature")?,
        top_p: fields.float("top_p")?,
        top_k: top_k(fields)?,
        min_p: fields.float("min_p")?,
        repetition_penalty: fields.float("repetition_penalty")?,
        presence_penalty: fields.float("presence_penalty")?,
        frequency_penalty: fields.float("frequency_penalty")?,
        seed: seed(fields)?,
        stop: stop(fields)?,
        stop_token_ids: ids(fields, "stop_token_ids")?,
        n: fields.uint("n")?,
        ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
        logit_bias: logit_bias(fields)?,
        ..SamplingInput::default()
    })
}

/// -1 is off, as 0 is.
fn top_k(fields: &mut Fields) -> Result<Option<u32>, RouterError> {
    match fields.take("top_k") {
        None => Ok(None),
        Some(value) if value == json!(-1) => Ok(Some(0)),
        Some(value) => as_uint("top_k", &value).map(Some),
    }
}

/// Any 64-bit integer; a negative one counts by its bits.
fn seed(fields: &mut Fields) -> Result<Option<u64>, RouterError> {
    let Some(value) = fields.take("seed") else { return Ok(None) };
    match value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned)) {
        Some(seed) => Ok(Some(seed)),
        None => Err(wrong("seed", "a 64-bit integer", &value)),
    }
}

fn stop(fields: &mut Fields) -> Result<Vec<String>, RouterError> {
    let refuse = |value: &Value| wrong("stop", "a string or an array of strings", value);
    match fields.take("stop") {
        None => Ok(Vec::new()),
        Some(Value::String(text)) => Ok(vec![text]),
        Some(Value::Array(values)) => values
            .iter()
            .map(|value| value.as_str().map(str::to_owned).ok_or_else(|| refuse(value)))
            .collect(),
        Some(other) => Err(refuse(&other)),
    }
}

fn ids(fields: &mut Fields, name: &str) -> Result<Vec<u32>, RouterError> {
    let values = fields.array(name)?.unwrap_or_default();
    values.iter().map(|value| as_uint(name, value)).collect()
}

fn logit_bias(fields: &mut Fields) -> Result<BTreeMap<u32, f32>, RouterError> {
    let map = fields.object("logit_bias")?.unwrap_or_default();
    map.iter()
        .map(|(key, value)| {
            let id = key.parse::<u32>().map_err(|_| {
                wrong("logit_bias", "an object with token ids as keys", &json!(key))
            })?;
            let bias =
                value.as_f64().ok_or_else(|| wrong("logit_bias", "an object of numbers", value))?;
            Ok((id, bias as f32))
        })
        .collect()
}

/// `stream` and `stream_options`.
pub(crate) fn delivery(fields: &mut Fields) -> Result<Delivery, RouterError> {
    let stream = fields.boolean("stream")?.unwrap_or(false);
    let (mut include_usage, mut include_progress) = (false, false);
    if let Some(options) = fields.take("stream_options") {
        if !stream {
            let message = "stream_options is allowed only with stream: true";
            return Err(RouterError::invalid("stream_options", message));
        }
        let mut options = Fields::nested("stream_options", options)?;
        include_usage = options.boolean("include_usage")?.unwrap_or(false);
        include_progress = options.boolean("include_progress")?.unwrap_or(false);
        options.only("include_obfuscation", &[json!(false)])?;
        options.finish()?;
    }
    Ok(Delivery { stream, include_usage, include_progress })
}

/// What clients send along that changes no answer, and what would change one but is not here.
pub(crate) fn neutral(fields: &mut Fields) -> Result<(), RouterError> {
    for name in ["user", "service_tier", "safety_identifier", "prompt_cache_key"] {
        fields.string(name)?;
    }
    // llama.cpp's hint. A cached prefix changes no bit of an answer, so both values mean the same.
    fields.boolean("cache_prompt")?;
    fields.object("metadata")?;
    fields.only("store", &[json!(false)])
}
