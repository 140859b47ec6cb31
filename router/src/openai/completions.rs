//! The body of `/v1/completions`.

use super::{
    Body,
    fields::{Fields, as_uint, wrong},
    harmless::harmless,
    params::{Limit, delivery, max_tokens, sampling},
};
use crate::{
    RouterError,
    request::{Prompt, Reading},
};
use proto::v1::Sampling;
use serde_json::{Value, json};

/// Prompts of one request.
const PROMPTS_MAX: usize = 1024;
/// What OpenAI's API takes where the client says nothing.
const MAX_TOKENS: u32 = 16;

/// Reads the body strictly.
pub(crate) fn parse(body: &[u8]) -> Result<Body, RouterError> {
    let mut fields = Fields::parse(body)?;
    let model = fields.string("model")?.unwrap_or_default();
    let reading = reading(&mut fields)?;
    let prompts = match fields.take("prompt") {
        Some(value) => prompts(value, reading)?,
        None => {
            let message = "prompt is missing; give text, token ids, or an array of either";
            return Err(RouterError::invalid("prompt", message));
        }
    };
    let max_tokens = match max_tokens(&mut fields)? {
        None => Some(MAX_TOKENS),
        Some(Limit::Tokens(count)) => Some(count),
        Some(Limit::Fitting) => None,
    };
    let logprobs = fields.uint("logprobs")?;
    let echo = fields.boolean("echo")?.unwrap_or(false);
    let sampling = Sampling { max_tokens, logprobs, echo, ..sampling(&mut fields)? };
    let delivery = delivery(&mut fields)?;
    let priority = fields.int("priority")?.unwrap_or(0);
    fields.only("best_of", &[json!(sampling.n.unwrap_or(1))])?;
    fields.unsupported("suffix")?;
    harmless(&mut fields)?;
    let ignored = fields.finish()?;
    Ok(Body { model, prompts, sampling, priority, delivery, ignored })
}

/// How text is to be read: as a template of the client's own, unless it says otherwise.
pub(super) fn reading(fields: &mut Fields) -> Result<Reading, RouterError> {
    Ok(Reading {
        parse_special: fields.boolean("parse_special")?.unwrap_or(true),
        add_special: fields.boolean("add_special_tokens")?.unwrap_or(true),
    })
}

fn prompts(value: Value, reading: Reading) -> Result<Vec<Prompt>, RouterError> {
    let values = match value {
        Value::String(text) => return Ok(vec![Prompt::Text(text, reading)]),
        Value::Array(values) if !values.is_empty() => values,
        Value::Array(_) => {
            return Err(RouterError::invalid("prompt", "prompt is empty; give at least one token"));
        }
        other => return Err(wrong("prompt", "text, token ids, or an array of either", &other)),
    };
    if values[0].is_number() {
        return Ok(vec![Prompt::Ids(ids(&values)?)]);
    }
    if values.len() > PROMPTS_MAX {
        let many = format!("prompt takes at most {PROMPTS_MAX} prompts, not {}", values.len());
        return Err(RouterError::invalid("prompt", many));
    }
    values
        .into_iter()
        .map(|value| match value {
            Value::String(text) => Ok(Prompt::Text(text, reading)),
            Value::Array(values) => ids(&values).map(Prompt::Ids),
            other => Err(wrong("prompt", "an array of texts, or of arrays of ids", &other)),
        })
        .collect()
}

fn ids(values: &[Value]) -> Result<Vec<u32>, RouterError> {
    values.iter().map(|value| as_uint("prompt", value)).collect()
}
