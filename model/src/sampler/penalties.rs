//! Bias and penalties: changes to a few logits of a row.

use super::SampleError;
use engine::plan::{Admission, SamplingParams};
use std::collections::HashMap;

/// What penalties look at: the tokens of a sequence, and how often the answer holds each.
///
/// Empty, and kept so, while the sequence has no penalty.
#[derive(Debug, Default)]
pub struct Seen {
    /// By token: its occurrences in the answer; 0 where only the prompt holds it.
    in_answer: HashMap<u32, u32>,
    penalized: bool,
}

impl Seen {
    /// The state after everything in `admission`.
    pub fn new(admission: &Admission) -> Self {
        let params = &admission.params;
        let penalized = params.repetition_penalty != 1.0
            || params.presence_penalty != 0.0
            || params.frequency_penalty != 0.0;
        let mut seen = Self { in_answer: HashMap::new(), penalized };
        if penalized {
            let (prompt, answer) = admission.tokens.split_at(admission.prompt_len);
            seen.in_answer.extend(prompt.iter().map(|&token| (token, 0)));
            answer.iter().for_each(|&token| seen.push(token));
        }
        seen
    }

    /// The answer grew by `token`.
    pub fn push(&mut self, token: u32) {
        if self.penalized {
            *self.in_answer.entry(token).or_default() += 1;
        }
    }

    pub fn is_empty(&self) -> bool {
        self.in_answer.is_empty()
    }

    /// Each token in ascending order, and its occurrences in the answer.
    pub fn ascending(&self) -> Vec<(u32, u32)> {
        let mut tokens: Vec<_> =
            self.in_answer.iter().map(|(&token, &count)| (token, count)).collect();
        tokens.sort_unstable();
        tokens
    }
}

/// Bias first, then each seen token's penalties.
pub fn apply(row: &mut [f32], params: &SamplingParams, seen: &Seen) -> Result<(), SampleError> {
    let vocab = row.len();
    for &(token, bias) in &params.logit_bias {
        match row.get_mut(token as usize) {
            Some(logit) => *logit += bias,
            None => return Err(SampleError::Bias { token, vocab }),
        }
    }
    for (&token, &count) in &seen.in_answer {
        let Some(logit) = row.get_mut(token as usize) else { continue };
        *logit = if *logit > 0.0 {
            *logit / params.repetition_penalty
        } else {
            *logit * params.repetition_penalty
        };
        if count > 0 {
            *logit -= params.presence_penalty + params.frequency_penalty * count as f32;
        }
    }
    Ok(())
}
