//! Checks what comes over the wire before the engine sees it. What the scheduler refuses afterwards
//! is a matter of sizes.

use engine::{EngineError, Request, check_count, check_ids, plan::SamplingParams};
use proto::v1;

use crate::{ModelInfo, WorkerError};

/// Beyond this a request is a mistake: a client gives 256 at most, a model has a few of its own.
const STOP_IDS_MAX: usize = 4096;

/// The engine's form of a request. Errors: `Invalid`, or the engine's own, with the name of what is
/// wrong.
pub(crate) fn request(run: v1::RunRequest, model: &ModelInfo) -> Result<Request, WorkerError> {
    let vocab = model.vocab;
    check_ids("prompt", &run.prompt, vocab)?;
    check_ids("generated", &run.generated, vocab)?;
    check_count("stop_ids", run.stop_ids.len(), STOP_IDS_MAX)?;
    let params = run.params.ok_or_else(|| WorkerError::Invalid("params is missing".into()))?;
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

/// The engine's form of checked parameters.
fn sampling(params: v1::SamplingParams, vocab: usize) -> Result<SamplingParams, EngineError> {
    let mut logit_bias: Vec<(u32, f32)> = params.logit_bias.into_iter().collect();
    logit_bias.sort_unstable_by_key(|&(id, _)| id);
    let params = SamplingParams {
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
    };
    params.check(vocab)?;
    Ok(params)
}
