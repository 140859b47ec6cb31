//! Bias and penalties: changes to a few logits of a row.

use engine::plan::{Admission, SamplingParams};
use kernels::sampling::{NextToken, Refused};

/// What penalties look at: the tokens of a sequence, and how often the answer holds each.
///
/// Empty, and kept so, while the sequence has no penalty.
#[derive(Debug, Default)]
pub struct Seen {
    /// Tokens in ascending order, each with its occurrences in the answer; 0 where only the prompt
    /// holds it.
    in_answer: Vec<(u32, u32)>,
    penalized: bool,
}

/// Whether the next token hangs on those before it by more than the model.
pub fn penalizes(params: &SamplingParams) -> bool {
    let SamplingParams { repetition_penalty, presence_penalty, frequency_penalty, .. } = *params;
    repetition_penalty != 1.0 || presence_penalty != 0.0 || frequency_penalty != 0.0
}

impl Seen {
    /// The state after everything in `admission`.
    pub fn new(admission: &Admission) -> Self {
        let penalized = penalizes(&admission.params);
        let mut seen = Self { in_answer: Vec::new(), penalized };
        if penalized {
            let (prompt, answer) = admission.tokens.split_at(admission.prompt_len);
            seen.in_answer.extend(prompt.iter().map(|&token| (token, 0)));
            seen.in_answer.extend(answer.iter().map(|&token| (token, 1)));
            seen.in_answer.sort_unstable();
            seen.in_answer.dedup_by(|next, kept| {
                let same = next.0 == kept.0;
                if same {
                    kept.1 += next.1;
                }
                same
            });
        }
        seen
    }

    /// The answer grew by `token`.
    pub fn push(&mut self, token: u32) {
        if !self.penalized {
            return;
        }
        match self.in_answer.binary_search_by_key(&token, |&(seen, _)| seen) {
            Ok(at) => self.in_answer[at].1 += 1,
            Err(at) => self.in_answer.insert(at, (token, 1)),
        }
    }

    /// Each token in ascending order, and its occurrences in the answer.
    pub fn ascending(&self) -> &[(u32, u32)] {
        &self.in_answer
    }
}

/// Bias first, then each seen token's penalties.
pub fn apply(row: &mut [f32], next: &NextToken<'_>) -> Result<(), Refused> {
    let vocab = row.len();
    for &(token, bias) in next.logit_bias {
        match row.get_mut(token as usize) {
            Some(logit) => *logit += bias,
            None => return Err(Refused::Bias { token, vocab }),
        }
    }
    for &(token, count) in next.seen {
        let Some(logit) = row.get_mut(token as usize) else { continue };
        *logit = if *logit > 0.0 {
            *logit / next.repetition_penalty
        } else {
            *logit * next.repetition_penalty
        };
        if count > 0 {
            *logit -= next.presence_penalty + next.frequency_penalty * count as f32;
        }
    }
    Ok(())
}
