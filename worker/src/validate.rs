//! Checks what comes over the wire before the engine sees it. A request that passes can be run;
//! what the scheduler refuses afterwards is a matter of sizes.

use engine::{Request, plan::SamplingParams};
use proto::v1;

use crate::{ModelInfo, WorkerError};

/// Logprobs of more tokens than this at one position are not sent.
const LOGPROBS_MAX: u32 = 256;
/// Beyond this a request is a mistake.
const STOP_IDS_MAX: usize = 4096;
const LOGIT_BIAS_MAX: usize = 65_536;

/// The engine's form of a request, or `Invalid` with the name of what is wrong.
pub(crate) fn request(run: v1::RunRequest, model: &ModelInfo) -> Result<Request, WorkerError> {
    let vocab = model.vocab;
    if run.prompt.is_empty() {
        return Err(invalid("prompt is empty; give at least one token"));
    }
    ids("prompt", &run.prompt, vocab)?;
    ids("generated", &run.generated, vocab)?;
    at_most("stop_ids", run.stop_ids.len(), STOP_IDS_MAX)?;
    let Some(params) = run.params else { return Err(invalid("params is missing")) };
    let min_tokens = params.min_tokens as usize;
    let mut params = sampling(params, vocab)?;
    if min_tokens > 0 {
        let known = run.stop_ids.iter().copied().filter(|&id| (id as usize) < vocab);
        params.ban(run.prompt.len().saturating_add(min_tokens), known);
    }
    Ok(Request {
        prompt: run.prompt,
        generated: run.generated,
        params,
        max_tokens: run.max_tokens as usize,
        stop_ids: run.stop_ids,
        score_prompt: run.score_prompt,
    })
}

fn sampling(params: v1::SamplingParams, vocab: usize) -> Result<SamplingParams, WorkerError> {
    let limit = f32::MAX;
    within("temperature", params.temperature, 0.0, limit)?;
    within("min_p", params.min_p, 0.0, 1.0)?;
    within("presence_penalty", params.presence_penalty, -limit, limit)?;
    within("frequency_penalty", params.frequency_penalty, -limit, limit)?;
    // Subnormal divisors would overflow what they divide.
    within("top_p", params.top_p, f32::MIN_POSITIVE, 1.0)?;
    within("repetition_penalty", params.repetition_penalty, f32::MIN_POSITIVE, limit)?;
    at_most("logit_bias", params.logit_bias.len(), LOGIT_BIAS_MAX)?;
    at_most("logprobs", params.logprobs.unwrap_or(0) as usize, LOGPROBS_MAX as usize)?;
    let mut logit_bias: Vec<(u32, f32)> = params.logit_bias.into_iter().collect();
    logit_bias.sort_unstable_by_key(|&(id, _)| id);
    for &(id, bias) in &logit_bias {
        ids("logit_bias", &[id], vocab)?;
        within("logit_bias", bias, -limit, limit)?;
    }
    Ok(SamplingParams {
        temperature: params.temperature,
        top_p: params.top_p,
        top_k: params.top_k,
        min_p: params.min_p,
        repetition_penalty: params.repetition_penalty,
        presence_penalty: params.presence_penalty,
        frequency_penalty: params.frequency_penalty,
        seed: params.seed,
        logit_bias,
        ban: None,
        logprobs: params.logprobs,
    })
}

fn invalid(reason: impl Into<String>) -> WorkerError {
    WorkerError::Invalid(reason.into())
}

fn ids(name: &str, ids: &[u32], vocab: usize) -> Result<(), WorkerError> {
    match ids.iter().find(|&&id| id as usize >= vocab) {
        None => Ok(()),
        Some(id) => Err(invalid(format!("{name}: token {id} is outside the {vocab} of the model"))),
    }
}

fn at_most(name: &str, value: usize, max: usize) -> Result<(), WorkerError> {
    if value <= max {
        return Ok(());
    }
    Err(invalid(format!("{name}: {value} is more than the {max} that are allowed")))
}

/// NaN lies nowhere.
fn within(name: &str, value: f32, least: f32, most: f32) -> Result<(), WorkerError> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(invalid(format!("{name}: {value} is not within [{least}, {most}]")))
}
