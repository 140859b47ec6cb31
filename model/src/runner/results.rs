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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{rope::RopeTables, runner::Sequence};
    use engine::plan::{Admission, SamplingParams};

    const GREEDY: SamplingParams = SamplingParams::GREEDY;

    fn chunk(sequence: SequenceId, want: Want) -> Chunk {
        let admission = Admission { params: GREEDY, tokens: vec![0, 1, 2], prompt_len: 3 };
        Chunk {
            sequence,
            start: 0,
            tokens: vec![0, 1, 2],
            next: None,
            blocks: vec![0],
            want,
            admission: Some(Box::new(admission)),
        }
    }

    /// Rows of 4 logits for each token of each chunk, the likeliest being the token's index;
    /// `spoil` names rows that are no numbers.
    fn output(chunks: Vec<Chunk>, spoil: &[(usize, usize)]) -> StepOutput {
        let rope = crate::Rope { base: 1e4, scaling: crate::RopeScaling::None, dynamic_ntk: None };
        let tables = RopeTables::new(&rope, 16);
        let mut sequences = HashMap::new();
        for chunk in &chunks {
            let admission = chunk.admission.as_ref().unwrap();
            sequences.insert(chunk.sequence, Sequence::new(admission, &tables, true));
        }
        let plan = StepPlan { number: 4, chunks, released: Vec::new() };
        let mut sampler = Sampler::new(4, 4);
        let mut results = Results::new(&plan, &mut sampler, &mut sequences);
        for (index, chunk) in plan.chunks.iter().enumerate() {
            for token in 0..chunk.tokens.len() {
                let mut logits = [0.0; 4];
                logits[token] = 1.0;
                if spoil.contains(&(index, token)) {
                    logits[3] = f32::NAN;
                }
                results.push(WantedRow { chunk: index, token }, &logits);
            }
        }
        results.finish()
    }

    #[test]
    fn each_want_has_its_place_in_the_output() {
        let mut known = chunk(4, Want::Score { sample: false });
        known.next = Some(3);
        let chunks = vec![
            chunk(1, Want::Sample),
            chunk(2, Want::Score { sample: true }),
            chunk(3, Want::Logits),
            known,
        ];
        let output = output(chunks, &[]);
        let sampled: Vec<_> = output.sampled.iter().map(|s| (s.0, s.1.token)).collect();
        assert_eq!(sampled, [(1, 2), (2, 2)]);
        let scored = |at: usize| output.scored[at].1.iter().map(|s| s.token).collect::<Vec<_>>();
        assert_eq!((output.scored[0].0, scored(0)), (2, vec![1, 2]));
        assert_eq!((output.scored[1].0, scored(1)), (4, vec![1, 2, 3]));
        assert_eq!(output.logits[0].1.len(), 12);
        assert_eq!((output.number, output.failed.len()), (4, 0));
    }

    #[test]
    fn a_sequence_whose_logits_are_no_numbers_fails_alone() {
        let chunks = vec![
            chunk(1, Want::Sample),
            chunk(2, Want::Score { sample: true }),
            chunk(3, Want::Score { sample: true }),
        ];
        let output = output(chunks, &[(0, 2), (1, 0), (1, 1)]);
        assert_eq!(output.failed.iter().map(|f| f.0).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(output.failed[0].1, "the model's logits are not finite at position 3");
        assert_eq!(output.sampled.iter().map(|s| s.0).collect::<Vec<_>>(), [3]);
        assert_eq!(output.scored.iter().map(|s| s.0).collect::<Vec<_>>(), [3]);
    }
}
