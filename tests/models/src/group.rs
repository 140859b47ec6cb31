//! Ranks as threads, driven by hand-made plans.

use collective::{Staged, Threads};
use engine::plan::{
    Admission, BLOCK_TOKENS, Chunk, SamplingParams, SequenceId, StepOutput, StepPlan, Tokens, Want,
};
use kernels::Backend;
use model::{Checkpoint, ModelError, Runner, RunnerOptions};
use std::{
    sync::{
        Arc,
        mpsc::{Sender, channel},
    },
    thread::JoinHandle,
};

pub const GREEDY: SamplingParams = SamplingParams::GREEDY;

pub const OPTIONS: RunnerOptions =
    RunnerOptions { blocks: 64, step_tokens_max: 256, sequences_max: 20, context_max: 240 };

type Rank<B> = Runner<B, Staged<Threads>>;

/// A group of ranks: the caller's thread is rank 0.
pub struct Group<B: Backend> {
    pub leader: Rank<B>,
    plans: Vec<Sender<StepPlan>>,
    followers: Vec<JoinHandle<()>>,
    next_number: u64,
}

impl<B: Backend> Group<B> {
    /// Loads `checkpoint`, a rank on each of `devices`.
    ///
    /// # Panics
    /// In tests: where progress is told wrongly, or a follower fails.
    ///
    /// # Errors
    /// What the checkpoint or the leader's device refuses.
    pub fn load(
        checkpoint: &Arc<Checkpoint>,
        options: RunnerOptions,
        devices: Vec<B>,
    ) -> Result<Self, ModelError> {
        let mut ranks = Threads::group(devices.len()).into_iter().zip(devices);
        let first = ranks.next();
        let (mut plans, mut followers) = (Vec::new(), Vec::new());
        for (rank, device) in ranks {
            let (sender, receiver) = channel::<StepPlan>();
            let checkpoint = checkpoint.clone();
            plans.push(sender);
            followers.push(std::thread::spawn(move || {
                let mut runner = load(&checkpoint, rank, options, device).expect("a rank loads");
                for plan in receiver {
                    // A refusal is the leader's to report.
                    let Ok(output) = runner.step(&plan) else { continue };
                    assert_eq!(output, StepOutput { number: plan.number, ..Default::default() });
                }
            }));
        }
        let none = || ModelError::Options("no devices".into());
        let (rank, device) = first.ok_or_else(none)?;
        let leader = load(checkpoint, rank, options, device)?;
        Ok(Self { leader, plans, followers, next_number: 0 })
    }

    /// Runs one step of `chunks`.
    ///
    /// # Errors
    /// The leader's.
    pub fn step(&mut self, chunks: Vec<Chunk>) -> Result<StepOutput, ModelError> {
        self.run(StepPlan { number: self.next_number, chunks, released: Vec::new() })
    }

    /// Runs `plan` as it is.
    ///
    /// # Errors
    /// The leader's.
    pub fn run(&mut self, plan: StepPlan) -> Result<StepOutput, ModelError> {
        // A follower that is gone makes the leader's exchanges fail.
        self.plans.iter().for_each(|to| drop(to.send(plan.clone())));
        let output = self.leader.step(&plan)?;
        assert_eq!(output.number, plan.number);
        self.next_number = plan.number + 1;
        Ok(output)
    }
}

impl<B: Backend> Drop for Group<B> {
    fn drop(&mut self) {
        self.plans.clear();
        for follower in self.followers.drain(..) {
            let ended = follower.join();
            assert!(std::thread::panicking() || ended.is_ok(), "a follower panicked");
        }
    }
}

fn load<B: Backend>(
    checkpoint: &Checkpoint,
    rank: Threads,
    options: RunnerOptions,
    device: B,
) -> Result<Rank<B>, ModelError> {
    let (mut last, mut calls) = (0, 0);
    let mut progress = |done: u64, total: u64| {
        assert!(last <= done && done <= total, "{done} of {total} after {last}");
        (last, calls) = (done, calls + 1);
        if done == total {
            calls += 1000;
        }
    };
    let runner = Runner::load(device, Staged::new(rank), checkpoint, options, &mut progress)?;
    assert!(calls >= 1000, "progress never reached its end: {last}");
    Ok(runner)
}

/// One sequence as a scheduler would drive it.
pub struct Driven {
    pub id: SequenceId,
    pub params: SamplingParams,
    pub prompt_len: usize,
    /// Prompt and answer.
    pub tokens: Vec<u32>,
    pub blocks: Vec<u32>,
    pub computed: usize,
    pub admitted: bool,
}

impl Driven {
    /// `blocks` must hold every token it will ever have.
    pub fn new(id: SequenceId, prompt: &[u32], params: SamplingParams, blocks: Vec<u32>) -> Self {
        Self {
            id,
            params,
            prompt_len: prompt.len(),
            tokens: prompt.to_vec(),
            blocks,
            computed: 0,
            admitted: false,
        }
    }

    /// At most `max` of the tokens that are not computed; `want` where they are the last.
    pub fn chunk(&mut self, max: usize, want: Want) -> Chunk {
        let (start, len) = (self.computed, (self.tokens.len() - self.computed).min(max));
        let end = start + len;
        let ends = end == self.tokens.len();
        let want = match want {
            Want::Sample if !ends => Want::Nothing,
            Want::Score { sample } => Want::Score { sample: sample && ends },
            want => want,
        };
        let admission = (!self.admitted).then(|| {
            Box::new(Admission {
                params: self.params.clone(),
                tokens: self.tokens.clone(),
                prompt_len: self.prompt_len,
            })
        });
        // All that are at hand were told with the chunk before, where there was one.
        let told = if self.admitted { start.div_ceil(BLOCK_TOKENS) } else { 0 };
        self.admitted = true;
        self.computed = end;
        Chunk {
            sequence: self.id,
            start,
            tokens: Tokens::Known(self.tokens[start..end].to_vec()),
            next: self.tokens.get(end).copied(),
            blocks: self.blocks[told..end.div_ceil(BLOCK_TOKENS)].to_vec(),
            want,
            admission,
        }
    }

    pub fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Forgets what is computed, as after preemption, and goes on in other blocks.
    pub fn preempt(&mut self, blocks: Vec<u32>) {
        (self.computed, self.admitted, self.blocks) = (0, false, blocks);
    }
}
