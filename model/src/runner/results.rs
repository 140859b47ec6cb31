//! From rows of logits to what the plan asked for, by the device where it can. Rank 0 only.

use super::{RunningSequence, batch::WantedRow};
use crate::sampler::{Sampler, next_token};
use engine::plan::{
    Chunk, SamplingParams, SequenceId, StepOutput, StepPlan, TokenLogprob, Tokens, Want,
};
use kernels::sampling::{Refused, SampleRequest, Sampled, TOP_MAX, Wanted};
use std::collections::HashMap;

/// A token, or why there is none.
type RowResult = Result<TokenLogprob, Refused>;

/// What a row of logits is for.
#[derive(Clone, Copy, Debug)]
struct Job {
    sequence: SequenceId,
    /// Of the token that follows.
    position: usize,
    /// They are wanted themselves.
    logits: bool,
    /// This token's logprob is wanted.
    score: Option<u32>,
    /// The next token is.
    sample: bool,
}

fn job(plan: &StepPlan, row: WantedRow) -> Job {
    let chunk = &plan.chunks[row.chunk];
    let last = row.token + 1 == chunk.tokens.len();
    let known = chunk.tokens.known().get(row.token + 1).copied();
    let following = if last { chunk.next } else { known };
    let scores = matches!(chunk.want, Want::Score { .. });
    Job {
        sequence: chunk.sequence,
        position: chunk.start + row.token + 1,
        logits: chunk.want == Want::Logits,
        score: following.filter(|_| scores),
        sample: last && samples(chunk),
    }
}

/// Whether the token after `chunk` is sampled.
pub fn samples(chunk: &Chunk) -> bool {
    matches!(chunk.want, Want::Sample | Want::Score { sample: true })
}

/// Whether what a chunk wants can be answered by a device that chooses tokens.
pub fn is_answered(chunk: &Chunk, params: &SamplingParams) -> bool {
    let both = matches!(chunk.want, Want::Score { sample: true }) && chunk.next.is_some();
    chunk.want != Want::Logits && !both && params.logprobs.is_none_or(|n| n as usize <= TOP_MAX)
}

/// What a device that chooses tokens is asked of one row; `None` where it cannot answer.
pub fn request<'a>(
    plan: &StepPlan,
    row: WantedRow,
    sequences: &'a HashMap<SequenceId, RunningSequence>,
) -> Option<SampleRequest<'a>> {
    let job = job(plan, row);
    let RunningSequence { params, seen, .. } = sequences.get(&job.sequence)?;
    if !is_answered(&plan.chunks[row.chunk], params) {
        return None;
    }
    let top = params.logprobs.map(|top| top as usize);
    let (wanted, logprobs) = match job.score {
        Some(token) => (Wanted::Token(token), Some(top.unwrap_or(0))),
        None => (Wanted::Next(next_token(params, seen, job.position)), top),
    };
    Some(SampleRequest { wanted, logprobs })
}

/// The output of one step while its rows come in, in the plan's order.
pub struct Results<'a> {
    plan: &'a StepPlan,
    sampler: &'a mut Sampler,
    sequences: &'a mut HashMap<SequenceId, RunningSequence>,
    output: StepOutput,
}

impl<'a> Results<'a> {
    pub fn new(
        plan: &'a StepPlan,
        sampler: &'a mut Sampler,
        sequences: &'a mut HashMap<SequenceId, RunningSequence>,
    ) -> Self {
        let mut output = StepOutput { number: plan.number, ..StepOutput::default() };
        for Chunk { sequence, start, tokens, want, .. } in &plan.chunks {
            let refused = sequences.get(sequence).is_some_and(|sequence| sequence.refused);
            if *tokens == Tokens::LastSampled && refused {
                output
                    .failed
                    .push((*sequence, format!("no token was sampled at position {start}")));
            }
            match want {
                Want::Score { .. } => output.scored.push((*sequence, Vec::new())),
                Want::Logits => output.logits.push((*sequence, Vec::new())),
                Want::Nothing | Want::Sample => {}
            }
        }
        Self { plan, sampler, sequences, output }
    }

    /// Uses what the device says of one row that it was asked about.
    pub fn answer(&mut self, row: WantedRow, answer: Result<Sampled, Refused>) {
        let job = job(self.plan, row);
        if !self.has_failed(job.sequence) {
            let token = |Sampled { token, logprob, top }| TokenLogprob { token, logprob, top };
            self.take(job, job.score.is_some(), answer.map(token));
        }
    }

    /// Uses the logits [V] of one wanted row.
    pub fn push(&mut self, row: WantedRow, logits: &[f32]) {
        let job = job(self.plan, row);
        let id = job.sequence;
        if job.logits {
            entry(&mut self.output.logits, id).extend_from_slice(logits);
        }
        if let (Some(token), false) = (job.score, self.has_failed(id)) {
            let Some(RunningSequence { params, .. }) = self.sequences.get(&id) else { return };
            let top = params.logprobs.unwrap_or(0) as usize;
            let scored = self.sampler.score(logits, token, top);
            self.take(job, true, scored);
        }
        if job.sample && !self.has_failed(id) {
            let Some(RunningSequence { params, seen, .. }) = self.sequences.get(&id) else {
                return;
            };
            let next = next_token(params, seen, job.position);
            let sampled = self.sampler.sample(logits, &next, params.logprobs);
            self.take(job, false, sampled);
        }
    }

    /// Whether an earlier row of the sequence has, or the token that it goes on with.
    fn has_failed(&self, id: SequenceId) -> bool {
        self.output.failed.iter().any(|failed| failed.0 == id)
    }

    /// The sequence, where it was not admitted anew since the plan.
    fn living(&mut self, id: SequenceId) -> Option<&mut RunningSequence> {
        let number = self.plan.number;
        self.sequences.get_mut(&id).filter(|sequence| sequence.admitted <= number)
    }

    fn take(&mut self, job: Job, scored: bool, answer: RowResult) {
        let id = job.sequence;
        match answer {
            Ok(token) if scored => entry(&mut self.output.scored, id).push(token),
            Ok(token) => {
                if let Some(sequence) = self.living(id) {
                    sequence.seen.push(token.token);
                    sequence.last = token.token;
                }
                self.output.sampled.push((id, token));
            }
            Err(refused) => {
                if let Some(sequence) = self.living(id) {
                    sequence.refused = true;
                }
                let text = format!("{refused} at position {}", job.position);
                self.output.failed.push((id, text));
            }
        }
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
    use crate::{rope::RopeTables, runner::RunningSequence};
    use engine::plan::Admission;
    use kernels::{Backend, Tensor};

    const GREEDY: SamplingParams = SamplingParams::GREEDY;

    fn chunk(sequence: SequenceId, want: Want) -> Chunk {
        let admission = Admission { params: GREEDY, tokens: vec![0, 1, 2], prompt_len: 3 };
        Chunk {
            sequence,
            start: 0,
            tokens: Tokens::Known(vec![0, 1, 2]),
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
            sequences.insert(chunk.sequence, RunningSequence::new(4, admission, &tables, true));
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

    /// Sequences of three tokens with every want, and parameters of all kinds.
    fn mixed() -> Vec<Chunk> {
        let warm = SamplingParams { temperature: 0.9, seed: 5, ..GREEDY };
        let mut banned = SamplingParams { repetition_penalty: 1.3, ..warm.clone() };
        // Position 3 is the one that is sampled.
        banned.ban(4, [7, 9, 2]);
        let params = [
            GREEDY,
            SamplingParams { top_p: 0.8, top_k: 20, repetition_penalty: 1.05, ..warm.clone() },
            SamplingParams { logprobs: Some(5), frequency_penalty: 0.4, ..warm.clone() },
            // More than devices tell: the host has to.
            SamplingParams { logprobs: Some(TOP_MAX as u32 + 1), ..warm.clone() },
            SamplingParams { logit_bias: vec![(7, 9.0), (9, 8.5)], ..warm.clone() },
            banned,
            SamplingParams { temperature: -1.0, ..warm },
        ];
        let wants = [
            Want::Sample,
            Want::Score { sample: true },
            Want::Logits,
            Want::Nothing,
            Want::Score { sample: false },
        ];
        let each = params.iter().flat_map(|params| wants.map(|want| (params, want)));
        let chunks = each.enumerate().map(|(index, (params, want))| {
            let mut chunk = chunk(index as SequenceId, want);
            chunk.next = (want == Want::Score { sample: false }).then_some(8);
            if let Some(admission) = &mut chunk.admission {
                admission.params = params.clone();
                admission.prompt_len = 2;
            }
            chunk
        });
        chunks.collect()
    }

    #[test]
    fn a_device_that_chooses_tokens_answers_as_the_host_does() {
        use cuda::{Cuda, CudaConfig};
        const VOCAB: usize = 300;
        let library = emulate::library(emulate::PLAIN);
        let emulator = emulate::Emulator::load(&library, emulate::Schedule::InTurn).unwrap();
        let device = Cuda::new(emulator, CudaConfig::default());
        let chunks = mixed();
        let plan = StepPlan { number: 0, chunks, released: Vec::new() };
        let rows: Vec<WantedRow> = (0..plan.chunks.len())
            .flat_map(|chunk| (0..3).map(move |token| WantedRow { chunk, token }))
            .filter(|row| super::super::batch::wanted(&plan.chunks[row.chunk], row.token))
            .collect();
        let mut values: Vec<f32> = (0..rows.len() * VOCAB)
            .map(|at| ((at * 7919) % 1009) as f32 / 100.0 - (at % VOCAB) as f32 / 50.0)
            .collect();
        // One of the rows of sequence 1 is not finite.
        let spoiled = rows.iter().position(|row| row.chunk == 1).unwrap();
        values[spoiled * VOCAB + 3] = f32::INFINITY;

        let rope = crate::Rope { base: 1e4, scaling: crate::RopeScaling::None, dynamic_ntk: None };
        let tables = RopeTables::new(&rope, 16);
        let admit = |chunk: &Chunk| {
            let admission = chunk.admission.as_ref().unwrap();
            (chunk.sequence, RunningSequence::new(0, admission, &tables, true))
        };
        let finish = |asks: bool| {
            let admitted: HashMap<_, _> = plan.chunks.iter().map(admit).collect();
            let mut sequences = plan.chunks.iter().map(admit).collect();
            let mut sampler = Sampler::new(VOCAB, VOCAB - 10);
            let mut results = Results::new(&plan, &mut sampler, &mut sequences);
            let mut logits = Tensor::exact_from_host(&device, VOCAB, &values).unwrap();
            let mut room = device.sampling(rows.len(), VOCAB, VOCAB - 10).unwrap().unwrap();
            const NOTHING: SampleRequest<'_> =
                SampleRequest { wanted: Wanted::Token(0), logprobs: None };
            let asked: Vec<_> = rows.iter().map(|row| request(&plan, *row, &admitted)).collect();
            let requests: Vec<_> = asked.iter().map(|asked| asked.unwrap_or(NOTHING)).collect();
            let answers = device.choose(&mut room, &mut logits, &requests).unwrap();
            let mut answered = 0;
            let answers = answers.into_iter().zip(&asked).zip(values.chunks(VOCAB));
            for (row, ((answer, asked), logits)) in rows.iter().zip(answers) {
                match asked {
                    Some(_) if asks => {
                        answered += 1;
                        results.answer(*row, answer);
                    }
                    _ => results.push(*row, logits),
                }
            }
            (results.finish(), answered)
        };
        let (host, none) = finish(false);
        let (device, answered) = finish(true);
        // Of seven kinds of parameters the device takes six, and no row whose logits are wanted.
        assert_eq!((none, answered, rows.len()), (0, 6 * 7, 7 * 10));
        assert_eq!(host.failed.len(), 1 + 2);
        assert_eq!(device.failed, host.failed);
        assert_eq!(device.logits, host.logits);
        let near = |a: &TokenLogprob, b: &TokenLogprob| {
            let close = |a: f32, b: f32| (a - b).abs() <= 1e-5 * b.abs().max(1.0);
            assert_eq!(a.token, b.token);
            assert_eq!(a.logprob.is_some(), b.logprob.is_some());
            assert!(close(a.logprob.unwrap_or(0.0), b.logprob.unwrap_or(0.0)), "{a:?} {b:?}");
            assert_eq!(a.top.len(), b.top.len());
            let tops = a.top.iter().zip(&b.top);
            assert!(tops.clone().all(|(a, b)| a.0 == b.0 && close(a.1, b.1)), "{a:?} {b:?}");
        };
        let ids = |list: &[(SequenceId, TokenLogprob)]| -> Vec<_> {
            list.iter().map(|entry| entry.0).collect()
        };
        assert_eq!(ids(&device.sampled), ids(&host.sampled));
        device.sampled.iter().zip(&host.sampled).for_each(|(a, b)| near(&a.1, &b.1));
        assert_eq!(device.scored.len(), host.scored.len());
        for (a, b) in device.scored.iter().zip(&host.scored) {
            assert_eq!((a.0, a.1.len()), (b.0, b.1.len()));
            a.1.iter().zip(&b.1).for_each(|(a, b)| near(a, b));
        }
    }
}
