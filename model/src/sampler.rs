//! Chooses the next token from one row of logits, on the host.
//!
//! In this order: logit bias, penalties, mask, temperature, top-k, top-p, min-p, draw. A draw
//! depends on the request's seed and on the position of the new token alone, so a sequence goes on
//! the same way after preemption, on another worker, and whatever runs beside it. Logprobs are
//! those of the unmodified logits. A row with a number that is not finite is refused: a token drawn
//! from it would only look like an answer.
//!
//! Nothing here allocates in proportion to the vocabulary but the buffers made in `new`.

mod candidates;
mod logits;
mod penalties;
mod philox;

pub use penalties::{Seen, penalizes};

use candidates::Candidates;
use engine::plan::{SamplingParams, TokenLogprob};
use kernels::sampling::{NextToken, Refused};

/// `params` as samplers take them, for the token at `position`.
pub fn next_token<'a>(
    params: &'a SamplingParams,
    seen: &'a Seen,
    position: usize,
) -> NextToken<'a> {
    NextToken {
        temperature: params.temperature,
        top_p: params.top_p,
        top_k: params.top_k,
        min_p: params.min_p,
        repetition_penalty: params.repetition_penalty,
        presence_penalty: params.presence_penalty,
        frequency_penalty: params.frequency_penalty,
        seed: params.seed,
        position: position as u64,
        logit_bias: params.bias_at(position),
        seen: seen.ascending(),
        allowed: None,
    }
}

/// Buffers for one row at a time.
pub struct Sampler {
    /// Ids from here on are padding of the embedding matrix: never chosen.
    drawable: usize,
    /// The row after bias, penalties and mask.
    adjusted: Vec<f32>,
    candidates: Candidates,
}

impl Sampler {
    /// For rows of `vocab` logits of which the first `drawable` stand for tokens.
    pub fn new(vocab: usize, drawable: usize) -> Self {
        Self {
            drawable: drawable.min(vocab),
            adjusted: vec![0.0; vocab],
            candidates: Candidates::default(),
        }
    }

    /// The token that follows, given `logits` [V] of the position before; with `Some(top)` its
    /// logprob and the `top` likeliest tokens. Ids past the end of a mask are not allowed.
    pub fn sample(
        &mut self,
        logits: &[f32],
        next: &NextToken<'_>,
        logprobs: Option<u32>,
    ) -> Result<TokenLogprob, Refused> {
        if let Some(refused) = next.bad_parameter() {
            return Err(refused);
        }
        let peak = logits::finite_peak(logits).ok_or(Refused::NotFinite)?;
        let token = self.choose(logits, peak, next)?;
        match logprobs {
            None => Ok(TokenLogprob { token, logprob: None, top: Vec::new() }),
            Some(top) => Ok(self.report(logits, peak, token, top as usize)),
        }
    }

    /// How likely `token` was, and the `top` likeliest tokens.
    pub fn score(
        &mut self,
        logits: &[f32],
        token: u32,
        top: usize,
    ) -> Result<TokenLogprob, Refused> {
        if token as usize >= logits.len() {
            return Err(Refused::Token { token, vocab: logits.len() });
        }
        let peak = logits::finite_peak(logits).ok_or(Refused::NotFinite)?;
        Ok(self.report(logits, peak, token, top))
    }

    fn choose(&mut self, logits: &[f32], peak: f32, next: &NextToken<'_>) -> Result<u32, Refused> {
        let Self { drawable, adjusted, candidates } = self;
        let drawable = *drawable;
        let adjust = !next.logit_bias.is_empty() || !next.seen.is_empty();
        let mut peak = if adjust {
            let row = &mut adjusted[..logits.len()];
            row.copy_from_slice(logits);
            penalties::apply(row, next)?;
            logits::finite_peak(&row[..drawable]).ok_or(Refused::Adjusted)?
        } else if drawable == logits.len() {
            peak
        } else {
            logits::finite_peak(&logits[..drawable]).ok_or(Refused::NotFinite)?
        };
        if let Some(allowed) = next.allowed {
            let row = &mut adjusted[..drawable];
            if !adjust {
                row.copy_from_slice(&logits[..drawable]);
            }
            peak = logits::forbid(row, allowed).ok_or(Refused::NothingAllowed)?;
        }
        let changed = adjust || next.allowed.is_some();
        let row = if changed { &adjusted[..drawable] } else { &logits[..drawable] };
        if next.temperature == 0.0 {
            return Ok(logits::first_at(row, peak));
        }
        let uniform = philox::uniform(next.seed, next.position);
        Ok(candidates.draw(row, peak, next, uniform))
    }

    fn report(&mut self, logits: &[f32], peak: f32, token: u32, top: usize) -> TokenLogprob {
        let normalizer = logits::log_normalizer(logits, peak);
        let logprob = |logit: f32| (f64::from(logit) - normalizer) as f32;
        let likeliest = self.candidates.likeliest(logits, peak, top);
        TokenLogprob {
            token,
            logprob: Some(logprob(logits[token as usize])),
            top: likeliest.iter().map(|c| (c.id, logprob(c.logit))).collect(),
        }
    }
}

#[cfg(test)]
mod tests;
