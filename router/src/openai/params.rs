//! Sampling parameters and options that chat and text completions share.

use super::fields::{Fields, as_uint, wrong};
use crate::RouterError;
use proto::v1::Sampling;
use serde_json::{Value, json};
use std::collections::HashMap;

/// How the answer is delivered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Delivery {
    pub stream: bool,
    pub usage: UsageChunks,
}

/// Which chunks of a stream carry the usage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum UsageChunks {
    #[default]
    None,
    /// One of its own after the last.
    Last,
    /// That one, and each before it with the tokens so far.
    Every,
}

/// A bound on new tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Limit {
    Tokens(u32),
    /// -1: as many as fit.
    Fitting,
}

/// The bound, by whichever of its names it was given; given twice, both must agree.
pub(crate) fn max_tokens(fields: &mut Fields) -> Result<Option<Limit>, RouterError> {
    let mut known: Option<(&str, Limit)> = None;
    // The last is llama.cpp's.
    for name in ["max_tokens", "max_completion_tokens", "n_predict"] {
        let Some(value) = fields.take(name) else { continue };
        let limit = match value.as_f64() == Some(-1.0) {
            true => Limit::Fitting,
            false => Limit::Tokens(as_uint(name, &value)?),
        };
        match known {
            Some((first, other)) if other != limit => {
                let message = format!("{name} is {value}, but {first} is not; give one of them");
                return Err(RouterError::invalid(name, message));
            }
            _ => known = Some((name, limit)),
        }
    }
    Ok(known.map(|(_, limit)| limit))
}

/// Everything about sampling but the bound on tokens and `logprobs`, which the two routes treat
/// differently.
pub(crate) fn sampling(fields: &mut Fields) -> Result<Sampling, RouterError> {
    Ok(Sampling {
        temperature: fields.float("temperature")?,
        top_p: fields.float("top_p")?,
        top_k: top_k(fields)?,
        min_p: fields.float("min_p")?,
        repetition_penalty: fields.float("repetition_penalty")?,
        presence_penalty: fields.float("presence_penalty")?,
        frequency_penalty: fields.float("frequency_penalty")?,
        seed: seed(fields)?,
        stop: stop(fields)?,
        stop_token_ids: fields.uints("stop_token_ids")?,
        n: fields.uint("n")?,
        ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
        logit_bias: logit_bias(fields)?,
        min_tokens: fields.uint("min_tokens")?.unwrap_or(0),
        include_stop_str_in_output: fields.boolean("include_stop_str_in_output")?.unwrap_or(false),
        ..Sampling::default()
    })
}

/// -1 is off, as 0 is.
fn top_k(fields: &mut Fields) -> Result<Option<u32>, RouterError> {
    match fields.take("top_k") {
        None => Ok(None),
        Some(value) if value.as_f64() == Some(-1.0) => Ok(Some(0)),
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

fn logit_bias(fields: &mut Fields) -> Result<HashMap<u32, f32>, RouterError> {
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
    let mut usage = UsageChunks::None;
    if let Some(options) = fields.take("stream_options") {
        if !stream {
            let message = "stream_options is allowed only with stream: true";
            return Err(RouterError::invalid("stream_options", message));
        }
        let mut options = Fields::nested("stream_options", options)?;
        let last = options.boolean("include_usage")?.unwrap_or(false);
        let every = options.boolean("continuous_usage_stats")?.unwrap_or(false);
        usage = match (last, every) {
            (false, _) => UsageChunks::None,
            (true, false) => UsageChunks::Last,
            (true, true) => UsageChunks::Every,
        };
        // Padding against eavesdroppers who count bytes.
        options.ignore("include_obfuscation");
        options.finish()?;
    }
    Ok(Delivery { stream, usage })
}
