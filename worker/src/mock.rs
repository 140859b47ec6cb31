//! An engine that computes nothing: to try clusters, limits and faults out without a machine that
//! could run the model.
//!
//! Scheduling, blocks, prefix cache and service are the real ones. A step takes as long as a table
//! says, and each token follows from the prompt, the seed and its position alone, so that a stream
//! that went from worker to worker can be checked against one that did not.

use std::{
    collections::HashMap,
    fmt,
    str::FromStr,
    thread,
    time::{Duration, Instant},
};

use engine::plan::{
    Admission, BLOCK_TOKENS, Chunk, Executor, ExecutorError, SequenceId, StepOutput, StepPlan,
    TokenLogprob, Want,
};
use model::{Checkpoint, ModelError, prefix_reuse_max};

use crate::{GroupConfig, ModelInfo, WorkerError};

/// Contexts that the pool holds.
const CONTEXTS: usize = 16;

/// How long steps take, and what goes wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MockConfig {
    /// Of any step.
    pub step: Duration,
    /// For each token that a step computes, prompts' and answers' alike.
    pub token: Duration,
    pub fault: Option<MockFault>,
}

impl Default for MockConfig {
    /// About a 7B on one card: 10 ms, and 50 000 prompt tokens a second.
    fn default() -> Self {
        Self { step: Duration::from_millis(10), token: Duration::from_micros(20), fault: None }
    }
}

/// What happens once a number of tokens has been sampled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MockFault {
    pub kind: MockFaultKind,
    /// Tokens of all sequences together.
    pub after: u64,
}

/// How a mock engine fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MockFaultKind {
    /// The process ends at once.
    Die,
    /// The group fails, as when a rank is gone.
    Fail,
    /// The step never ends.
    Freeze,
    /// Every step takes a hundred times as long.
    Slow,
    /// Every token is another than it should be.
    Corrupt,
    /// Every sequence fails alone, as with logits that are no numbers.
    Nan,
}

impl MockFaultKind {
    const ALL: [(&'static str, Self); 6] = [
        ("die", Self::Die),
        ("fail", Self::Fail),
        ("freeze", Self::Freeze),
        ("slow", Self::Slow),
        ("corrupt", Self::Corrupt),
        ("nan", Self::Nan),
    ];
}

impl FromStr for MockFault {
    type Err = String;

    /// `VERB@TOKENS`, e.g. `die@100`.
    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('@').and_then(|(verb, after)| {
            let (_, kind) = *MockFaultKind::ALL.iter().find(|(name, _)| *name == verb)?;
            Some(Self { kind, after: after.parse().ok()? })
        });
        parsed.ok_or_else(|| {
            let verbs = MockFaultKind::ALL.map(|(name, _)| name).join(", ");
            format!("{text:?} is no fault; write VERB@TOKENS with one of {verbs}, e.g. die@100")
        })
    }
}

impl fmt::Display for MockFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = MockFaultKind::ALL.iter().find(|(_, kind)| *kind == self.kind);
        write!(f, "{}@{}", name.map_or("?", |(name, _)| name), self.after)
    }
}

/// What a mock engine says of itself: the model of `config`, of which nothing but its `config.json`
/// and the files of its text need be there.
pub(crate) fn info(config: &GroupConfig) -> Result<ModelInfo, WorkerError> {
    let checkpoint = Checkpoint::open_or_outline(&config.model)?;
    let text_files = formats::text_files(&config.model)
        .map_err(|error| ModelError::Checkpoint(error.to_string()))?;
    let model = checkpoint.config();
    let context_max = config.context_max.unwrap_or(model.context_max);
    Ok(ModelInfo {
        name: checkpoint.name().to_owned(),
        // Its answers are no other engine's.
        fingerprint: format!("mock-{}", checkpoint.fingerprint(&text_files)?),
        vocab: model.vocab,
        context_max,
        ranks: config.ranks,
        device: "none: a mock engine".to_owned(),
        threads_per_rank: 1,
        isa: "none",
        precision: config.precision,
        blocks: context_max.div_ceil(BLOCK_TOKENS) * CONTEXTS,
        kv_bytes: 0,
        weights_bytes: 0,
        prefix_reuse_max: prefix_reuse_max(model),
        step_tokens_max: config.step_tokens_max.unwrap_or(4096),
        step_target: config.step_target,
        step_deadline: None,
        sequences_max: config.sequences_max,
        text_files,
    })
}

/// The group of a mock engine.
pub(crate) struct Mock {
    config: MockConfig,
    vocab: usize,
    /// What each running sequence's tokens follow from.
    keys: HashMap<SequenceId, u64>,
    sampled: u64,
    launched: Option<(StepPlan, Instant)>,
}

impl Mock {
    pub fn new(config: MockConfig, vocab: usize) -> Self {
        Self { config, vocab: vocab.max(1), keys: HashMap::new(), sampled: 0, launched: None }
    }

    fn fault(&self) -> Option<MockFaultKind> {
        let fault = self.config.fault.filter(|fault| self.sampled >= fault.after)?;
        Some(fault.kind)
    }

    fn duration(&self, plan: &StepPlan) -> Duration {
        let tokens: usize = plan.chunks.iter().map(|chunk| chunk.tokens.len()).sum();
        let MockConfig { step, token, .. } = self.config;
        let whole = step + token * u32::try_from(tokens).unwrap_or(u32::MAX);
        if self.fault() == Some(MockFaultKind::Slow) { whole * 100 } else { whole }
    }

    fn run(&mut self, plan: &StepPlan) -> StepOutput {
        for sequence in &plan.released {
            self.keys.remove(sequence);
        }
        let mut output = StepOutput { number: plan.number, ..StepOutput::default() };
        for chunk in &plan.chunks {
            if let Some(admission) = &chunk.admission {
                self.keys.insert(chunk.sequence, of_admission(admission));
            }
            self.results(chunk, &mut output);
        }
        output
    }

    fn results(&mut self, chunk: &Chunk, output: &mut StepOutput) {
        if let Want::Score { .. } = chunk.want {
            let following = chunk.tokens.known().iter().skip(1).copied().chain(chunk.next);
            output.scored.push((chunk.sequence, following.map(scored).collect()));
        }
        if !matches!(chunk.want, Want::Sample | Want::Score { sample: true }) {
            return;
        }
        if self.fault() == Some(MockFaultKind::Nan) {
            output.failed.push((chunk.sequence, "the logits are no numbers".to_owned()));
            return;
        }
        self.sampled += 1;
        let key = self.keys.get(&chunk.sequence).copied().unwrap_or(0);
        let token = token(key, chunk.end(), self.vocab);
        let wrong = u32::from(self.fault() == Some(MockFaultKind::Corrupt));
        output.sampled.push((chunk.sequence, scored((token + wrong) % self.vocab as u32)));
    }
}

/// What a mock engine answers to a prompt: `count` tokens of a vocabulary of `vocab`. The seed
/// counts where tokens are drawn; it is 0 where they are not.
pub fn mock_answer(prompt: &[u32], seed: u64, count: usize, vocab: usize) -> Vec<u32> {
    let key = key(prompt, seed);
    (prompt.len()..prompt.len() + count).map(|position| token(key, position, vocab)).collect()
}

fn of_admission(admission: &Admission) -> u64 {
    let prompt = &admission.tokens[..admission.prompt_len.min(admission.tokens.len())];
    let drawn = admission.params.temperature > 0.0;
    key(prompt, if drawn { admission.params.seed } else { 0 })
}

/// What a sequence's tokens follow from.
fn key(prompt: &[u32], seed: u64) -> u64 {
    prompt.iter().fold(mix(seed), |key, &token| mix(key ^ u64::from(token)))
}

/// The token at a position.
fn token(key: u64, position: usize, vocab: usize) -> u32 {
    (mix(key ^ position as u64) % vocab as u64) as u32
}

/// The finaliser of SplitMix64.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn scored(token: u32) -> TokenLogprob {
    let logprob = -1.0 - (token % 8) as f32;
    TokenLogprob { token, logprob: Some(logprob), top: vec![(token, logprob)] }
}

impl Executor for Mock {
    fn depth(&self) -> usize {
        1
    }

    fn launch(&mut self, plan: StepPlan) -> Result<(), ExecutorError> {
        self.launched = Some((plan, Instant::now()));
        Ok(())
    }

    fn finish(&mut self) -> Result<StepOutput, ExecutorError> {
        let Some((plan, launched)) = self.launched.take() else {
            return Err(ExecutorError("no plan was launched".into()));
        };
        match self.fault() {
            Some(MockFaultKind::Die) => std::process::exit(1),
            Some(MockFaultKind::Fail) => {
                return Err(ExecutorError("the mock engine was told to fail".into()));
            }
            Some(MockFaultKind::Freeze) => loop {
                thread::park();
            },
            _ => {}
        }
        thread::sleep(self.duration(&plan).saturating_sub(launched.elapsed()));
        Ok(self.run(&plan))
    }

    fn idle(&mut self) -> Result<(), ExecutorError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::{Request, Scheduler, SchedulerConfig, plan::SamplingParams};

    /// The next `count` tokens after `generated`, with whatever else runs beside.
    fn tokens(mock: &mut Mock, generated: &[u32], count: usize, beside: usize) -> Vec<u32> {
        let mut scheduler = Scheduler::new(SchedulerConfig {
            blocks: 64,
            step_tokens_max: 32,
            step_target: None,
            sequences_max: 4,
            waiting_max: 8,
            context_max: 256,
            prefix_reuse_max: None,
        });
        let request = |prompt: Vec<u32>| Request {
            prompt,
            generated: Vec::new(),
            params: SamplingParams { temperature: 1.0, seed: 5, ..SamplingParams::GREEDY },
            max_tokens: generated.len() + count,
            stop_ids: Vec::new(),
            score_prompt: false,
        };
        let of_interest = Request { generated: generated.to_vec(), ..request((0..40).collect()) };
        let id = scheduler.submit(of_interest).unwrap();
        for other in 0..beside as u32 {
            scheduler.submit(request(vec![other; 50])).unwrap();
        }
        let mut tokens = Vec::new();
        while tokens.len() < count {
            mock.launch(scheduler.schedule().unwrap()).unwrap();
            let updates = scheduler.commit(mock.finish().unwrap()).unwrap();
            let own = updates.into_iter().filter(|update| update.sequence == id);
            tokens.extend(own.flat_map(|update| update.tokens).map(|token| token.token));
        }
        tokens
    }

    fn mock(fault: Option<MockFault>) -> Mock {
        let config = MockConfig { step: Duration::ZERO, token: Duration::ZERO, fault };
        Mock::new(config, 1000)
    }

    #[test]
    fn an_answer_goes_on_elsewhere_as_if_nothing_had_happened() {
        let whole = tokens(&mut mock(None), &[], 30, 0);
        assert!(whole.iter().any(|token| *token != whole[0]));
        assert_eq!(tokens(&mut mock(None), &[], 30, 3), whole, "whatever runs beside");
        for cut in [1, 7, 29] {
            let rest = tokens(&mut mock(None), &whole[..cut], 30 - cut, 2);
            assert_eq!(rest, whole[cut..]);
        }
        let fault = MockFault { kind: MockFaultKind::Corrupt, after: 10 };
        let wrong = tokens(&mut mock(Some(fault)), &[], 30, 0);
        assert_eq!(wrong[..9], whole[..9]);
        assert!(wrong[9..].iter().zip(&whole[9..]).all(|(wrong, right)| wrong != right));
    }

    #[test]
    fn faults_are_read_as_they_are_written() {
        for (name, kind) in MockFaultKind::ALL {
            let fault = MockFault { kind, after: 12 };
            assert_eq!(format!("{name}@12").parse(), Ok(fault));
            assert_eq!(fault.to_string(), format!("{name}@12"));
        }
        for text in ["", "die", "die@", "@3", "die@-1", "run@3"] {
            let error = text.parse::<MockFault>().unwrap_err();
            assert!(error.contains("die@100"), "{error}");
        }
    }
}
