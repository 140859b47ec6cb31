//! Ranks as threads, driven by hand-made plans.

use collective::{
    Cards, CardsConfig, Collective, CollectiveError, HostCollective, Staged, Threads,
};
use cuda::{Cuda, Driver, PeerConfig};
use engine::plan::{Chunk, SamplingParams, StepOutput, StepPlan};
use kernels::Backend;
use model::{Checkpoint, Loaded, ModelError, Runner, RunnerOptions};
use std::{
    sync::{
        Arc,
        mpsc::{Sender, channel},
    },
    thread::JoinHandle,
    time::Duration,
};

pub const GREEDY: SamplingParams = SamplingParams::GREEDY;

pub const OPTIONS: RunnerOptions =
    RunnerOptions { blocks: 64, step_tokens_max: 256, sequences_max: 20, context_max: 240 };

/// Emulated ranks are slow, and share few cores.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// How a rank's device exchanges with the others'.
pub type Link<B, C> = fn(&B, Threads) -> Result<C, CollectiveError>;

/// Through the host.
///
/// # Errors
/// None.
pub fn staged<B: Backend>(_device: &B, host: Threads) -> Result<Staged<Threads>, CollectiveError> {
    Ok(Staged::new(host))
}

/// By each other's memory.
///
/// # Errors
/// The device's own.
pub fn peer_memory<D: Driver>(
    device: &Cuda<D>,
    host: Threads,
) -> Result<Cards<D, Threads>, CollectiveError> {
    let peers = PeerConfig::new(host.world_size(), PATIENCE);
    Cards::new(device, host, &CardsConfig::peers(peers))
}

/// A group of ranks: the caller's thread is rank 0.
pub struct Group<B: Backend, C: Collective<B> = Staged<Threads>> {
    pub leader: Runner<B, C>,
    plans: Vec<Sender<StepPlan>>,
    followers: Vec<JoinHandle<()>>,
    next_number: u64,
}

impl<B: Backend, C: Collective<B>> Group<B, C> {
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
        link: Link<B, C>,
    ) -> Result<Self, ModelError> {
        let mut ranks = Threads::group(devices.len()).into_iter().zip(devices);
        let first = ranks.next();
        let (mut plans, mut followers) = (Vec::new(), Vec::new());
        for (rank, device) in ranks {
            let (sender, receiver) = channel::<StepPlan>();
            let checkpoint = checkpoint.clone();
            plans.push(sender);
            followers.push(std::thread::spawn(move || {
                let mut runner =
                    load(&checkpoint, rank, options, (device, link)).expect("a rank loads");
                for plan in receiver {
                    if runner.in_flight() > 0 && !runner.follows(&plan) {
                        let _refused = runner.finish().is_err();
                    }
                    // A refusal is the leader's to report.
                    if runner.launch(&plan).is_err() {
                        continue;
                    }
                    while runner.in_flight() > usize::from(runner.runs_ahead()) {
                        let Ok(output) = runner.finish() else { break };
                        let number = output.number;
                        assert_eq!(output, StepOutput { number, ..Default::default() });
                    }
                }
            }));
        }
        let none = || ModelError::Options("no devices".into());
        let (rank, device) = first.ok_or_else(none)?;
        let leader = load(checkpoint, rank, options, (device, link))?;
        Ok(Self { leader, plans, followers, next_number: 0 })
    }

    /// Runs one step of `chunks`.
    ///
    /// # Errors
    /// The leader's.
    pub fn step(&mut self, chunks: Vec<Chunk>) -> Result<StepOutput, ModelError> {
        self.run(StepPlan { number: self.next_number, chunks, released: Vec::new() })
    }

    /// Begins with `plan`.
    ///
    /// # Errors
    /// The leader's.
    pub fn launch(&mut self, plan: &StepPlan) -> Result<(), ModelError> {
        self.plans.iter().for_each(|to| drop(to.send(plan.clone())));
        self.next_number = plan.number + 1;
        self.leader.launch(plan)
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

impl<B: Backend, C: Collective<B>> Drop for Group<B, C> {
    fn drop(&mut self) {
        self.plans.clear();
        for follower in self.followers.drain(..) {
            let ended = follower.join();
            assert!(std::thread::panicking() || ended.is_ok(), "a follower panicked");
        }
    }
}

fn load<B: Backend, C: Collective<B>>(
    checkpoint: &Checkpoint,
    rank: Threads,
    options: RunnerOptions,
    (device, link): (B, Link<B, C>),
) -> Result<Runner<B, C>, ModelError> {
    let (mut last, mut calls) = (0, 0);
    let mut progress = |loaded: Loaded| {
        let Loaded { read, uploaded: done, total } = loaded;
        assert!(last <= done && done <= read && read <= total, "{loaded:?} after {last}");
        (last, calls) = (done, calls + 1);
        if done == total {
            calls += 1000;
        }
    };
    let group = link(&device, rank)?;
    let runner = Runner::load(device, group, checkpoint, options, &mut progress)?;
    assert!(calls >= 1000, "progress never reached its end: {last}");
    Ok(runner)
}
