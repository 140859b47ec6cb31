//! Ranks as threads, driven by hand-made plans, and the goldens of the reference implementations.

use engine::plan::{
    Admission, BLOCK_TOKENS, Chunk, SamplingParams, SequenceId, StepOutput, StepPlan, Want,
};
use kernels::{
    Backend,
    collective::{Staged, Threads},
    cpu::{Cpu, CpuConfig, Isa, Precision},
};
use model::{Checkpoint, ModelError, Runner, RunnerOptions};
use std::{
    path::{Path, PathBuf},
    sync::mpsc::{Sender, channel},
    thread::JoinHandle,
};

pub const GREEDY: SamplingParams = SamplingParams::GREEDY;

pub const OPTIONS: RunnerOptions =
    RunnerOptions { blocks: 64, step_tokens_max: 256, sequences_max: 20, context_max: 240 };

/// The product's backend, with the best instructions of this machine.
pub fn exact() -> Cpu {
    cpu(2, Precision::Exact, Isa::Amx)
}

pub fn fast() -> Cpu {
    cpu(2, Precision::Fast, Isa::Amx)
}

pub fn fast_avx2() -> Cpu {
    cpu(1, Precision::Fast, Isa::Avx2)
}

pub fn fast_portable() -> Cpu {
    cpu(1, Precision::Fast, Isa::Portable)
}

fn cpu(threads: usize, precision: Precision, isa: Isa) -> Cpu {
    Cpu::new(CpuConfig { threads, precision, isa }).unwrap()
}

pub fn golden_folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/public").join(name)
}

pub fn open(name: &str) -> Checkpoint {
    Checkpoint::open(&golden_folder(name)).unwrap()
}

type Rank<B> = Runner<B, Staged<Threads>>;

/// A group of ranks: the test's own thread is rank 0.
pub struct Group<B: Backend> {
    pub leader: Rank<B>,
    plans: Vec<Sender<StepPlan>>,
    followers: Vec<JoinHandle<()>>,
    next_number: u64,
}

impl<B: Backend> Group<B> {
    /// Loads `checkpoint` on `world_size` ranks.
    pub fn load(
        checkpoint: &std::sync::Arc<Checkpoint>,
        world_size: usize,
        options: RunnerOptions,
        device: fn() -> B,
    ) -> Self {
        let mut ranks = Threads::group(world_size).into_iter();
        let first = ranks.next().unwrap();
        let (mut plans, mut followers) = (Vec::new(), Vec::new());
        for rank in ranks {
            let (sender, receiver) = channel::<StepPlan>();
            let checkpoint = checkpoint.clone();
            plans.push(sender);
            followers.push(std::thread::spawn(move || {
                let mut runner = load(&checkpoint, rank, options, device);
                for plan in receiver {
                    // A refusal is the leader's to report.
                    let Ok(output) = runner.step(&plan) else { continue };
                    assert_eq!(output, StepOutput { number: plan.number, ..Default::default() });
                }
            }));
        }
        let leader = load(checkpoint, first, options, device);
        Self { leader, plans, followers, next_number: 0 }
    }

    /// Runs one step of `chunks`.
    pub fn step(&mut self, chunks: Vec<Chunk>) -> Result<StepOutput, ModelError> {
        self.run(StepPlan { number: self.next_number, chunks, released: Vec::new() })
    }

    /// Runs `plan` as it is.
    pub fn run(&mut self, plan: StepPlan) -> Result<StepOutput, ModelError> {
        self.plans.iter().for_each(|to| to.send(plan.clone()).unwrap());
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
    device: fn() -> B,
) -> Rank<B> {
    let (mut last, mut calls) = (0, 0);
    let mut progress = |done: u64, total: u64| {
        assert!(last <= done && done <= total, "{done} of {total} after {last}");
        (last, calls) = (done, calls + 1);
        if done == total {
            calls += 1000;
        }
    };
    let runner =
        Runner::load(device(), Staged::new(rank), checkpoint, options, &mut progress).unwrap();
    assert!(calls >= 1000, "progress never reached its end: {last}");
    runner
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
        self.admitted = true;
        self.computed = end;
        Chunk {
            sequence: self.id,
            start,
            tokens: self.tokens[start..end].to_vec(),
            next: self.tokens.get(end).copied(),
            blocks: self.blocks[..end.div_ceil(BLOCK_TOKENS)].to_vec(),
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
