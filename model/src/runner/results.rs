//! From rows of logits to what the plan asked for. Rank 0 only.

use super::{Sequence, batch::WantedRow};
use crate::sampler::{SampleError, Sampler};
use engine::plan::{Chunk, SequenceId, StepOutput, StepPlan, Want};
use std::collections::HashMap;

/// The output of one step while its rows come in, in the plan's order.
pub struct Results<'a> {
    plan: &'a StepPlan,
    sampler: &'a mut Sampler,
    sequences: &'a mut HashMap<SequenceId, Sequence>,
    output: StepOutput,
}

impl<'a> Results<'a> {
    pub fn new(
        plan: &'a StepPlan,
        sampler: &'a mut Sampler,
        sequences: &'a mut HashMap<SequenceId, Sequence>,
    ) -> Self {
        let mut output = StepOutput { number: plan.number, ..StepOutput::default() };
        for Chunk { sequence, want, .. } in &plan.chunks {
            match want {
                Want::Score { .. } => output.scored.push((*sequence, Vec::new())),
                Want::Logits => output.logits.push((*sequence, Vec::new())),
                Want::Nothing | Want::Sample => {}
            }
        }
        Self { plan, sampler, sequences, output }
    }

    /// Uses the logits [V] of one wanted row.
    pub fn push(&mut self, row: WantedRow, logits: &[f32]) {
        let id = self.plan.chunks[row.chunk].sequence;
        if self.output.failed.last().is_some_and(|failed| failed.0 == id) {
            return;
        }
        if let Err(error) = self.read(row, logits) {
            self.output.failed.push((id, error.to_string()));
        }
    }

    fn read(&mut self, row: WantedRow, logits: &[f32]) -> Result<(), SampleError> {
        let chunk = &self.plan.chunks[row.chunk];
        let id = chunk.sequence;
        let last = row.token + 1 == chunk.tokens.len();
        let Some(sequence) = self.sequences.get_mut(&id) else { return Ok(()) };
        if chunk.want == Want::Logits {
            entry(&mut self.output.logits, id).extend_from_slice(logits);
        }
        let position = chunk.start + row.token + 1;
        let following = if last { chunk.next } else { Some(chunk.tokens[row.token + 1]) };
        if let (Want::Score { .. }, Some(token)) = (chunk.want, following) {
            let top = sequence.params.logprobs.unwrap_or(0) as usize;
            let scored = self.sampler.score(logits, token, top, position)?;
            entry(&mut self.output.scored, id).push(scored);
        }
        if last && matches!(chunk.want, Want::Sample | Want::Score { sample: true }) {
            let (params, seen) = (&sequence.params, &mut sequence.seen);
            let sampled = self.sampler.sample(logits, params, seen, position)?;
            seen.push(sampled.token);
            self.output.sampled.push((id, sampled));
        }
        Ok(())
    }

    /// The whole output; sequences that failed have no other entry in it.
    pub fn finish(mut self) -> StepOutput {
        let output = &mut self.output;
        if !output.failed.is_empty() {
            let sound = |id: &SequenceId| !output.failed.iter().any(|(failed, _)| failed == id);
            output.sampled.retain(|(id, _)| sound(id));
            output.scored.retain(|(id, _)| sound(id));
        }
        self.output
    }
}

/// The rows of sequence `id`, which are the last begun: rows come in the plan's order.
fn entry<T>(lists: &mut Vec<(SequenceId, Vec<T>)>, id: SequenceId) -> &mut Vec<T> {
    let at = lists.iter().rposition(|(of, _)| *of == id).unwrap_or_else(|| {
        lists.push((id, Vec::new()));
        lists.len() - 1
    });
    &mut lists[at].1
}
