//! One group: the ranks that hold one model between them, and the leader that drives them.
//!
//! Rank 0 is the leader and runs in the engine's process; the others only follow. Backends are
//! chosen in `devices` and exchanges in `GroupPlan::start`; everything behind is generic over both.

mod device_thread;
mod devices;
mod failures;
mod follower;
mod leader;
mod memory;
mod node;
mod nodes;
mod place;
mod process;
mod rank;
mod rank_process;
mod restarts;
mod sizing;
mod threads;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use cpu::{Isa, Precision};
use cuda::CudaConfig;
use engine::{SchedulerConfig, plan::Executor};
use model::{Loaded, Numbers};
use serde::{Deserialize, Serialize};

pub use node::{NodeConfig, run_node};
pub use nodes::Nodes;
pub use rank::{RankConfig, run_rank};

use crate::{
    MockConfig, WorkerError,
    mock::{self, Mock},
};
use devices::{Devices, Task, on_devices};
use follower::RankOptions;
use sizing::Sizing;

/// Whether ranks may exchange by NCCL.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum NcclUse {
    /// The library that the loader finds, where there is one and something would go by it.
    #[default]
    Auto,
    Off,
    /// As `Auto`, with this library.
    At(PathBuf),
}

/// What computes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Device {
    Cpu,
    /// Cards from `first` on, one a rank.
    Cuda {
        first: usize,
        config: CudaConfig,
        /// Where there are fewer cards than ranks, all ranks take the first: for tests.
        share: bool,
        /// Ranks that share a card do not exchange by it.
        nccl: NcclUse,
    },
}

/// Whether the ranks of a group are threads or processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RankMode {
    /// Threads of this process.
    Threads,
    /// Processes of their own, started and watched by this one.
    Processes,
}

/// What a group is made of. `None` is the default that fits model and machine.
#[derive(Clone, Debug)]
pub struct GroupConfig {
    /// A checkpoint folder or a GGUF file.
    pub model: PathBuf,
    /// Numbers from a seed instead of the checkpoint's: a folder with a `config.json` is enough.
    pub random: Option<Numbers>,
    /// An engine that computes nothing, in place of ranks.
    pub mock: Option<MockConfig>,
    /// Tensor-parallel ranks, at least 1.
    pub ranks: usize,
    pub device: Device,
    /// Compute threads of each rank. Default: the machine's, shared evenly.
    pub threads_per_rank: Option<usize>,
    pub precision: Precision,
    /// The best instruction set to use. Default: the machine's best.
    pub isa_cap: Option<Isa>,
    /// Tokens of prompt and answer together. Default: the model's, as far as the KV pool holds
    /// them.
    pub context_max: Option<usize>,
    /// Bytes of the KV pool, all ranks together. Default: of the memory that weights and scratch
    /// leave, a quarter or 16 contexts, whichever is less, on the CPU; all of it on CUDA devices.
    pub kv_memory: Option<u64>,
    /// Tokens in one step, at most. Default: 512 on the CPU; on CUDA devices, which need many to be
    /// busy, 4096, or fewer where they would take much of the KV pool.
    pub step_tokens_max: Option<usize>,
    /// How long a step should take that has both prompts and answers in it; prompts get fewer
    /// tokens of a step until it does. Default: 0.25 s.
    pub step_target: Option<Duration>,
    /// After which a device that has not finished a step is taken for hung. Default: on CUDA
    /// devices several times what the step model predicts, at least 1 s; nothing else on the CPU.
    pub step_deadline: Option<Duration>,
    /// After which a group whose step has not ended is taken for hung, whatever computes: no rank
    /// on the CPU waits longer for another that lives.
    pub step_limit: Duration,
    /// Sequences that run at once.
    pub sequences_max: usize,
    pub rank_mode: RankMode,
    /// Where ranks run on several machines, of which this one leads. They are processes, and the
    /// group starts within a tokio runtime.
    pub nodes: Option<Nodes>,
    /// What to start for a rank that is a process: it must hand the arguments `rank --rank R
    /// --world-size N` to `run_rank`. Default: this program.
    pub rank_program: Option<PathBuf>,
}

impl GroupConfig {
    /// The defaults for a model: one rank on the CPU, 64 sequences, 10 minutes for a step.
    pub fn new(model: impl Into<PathBuf>) -> Self {
        Self {
            model: model.into(),
            random: None,
            mock: None,
            ranks: 1,
            device: Device::Cpu,
            threads_per_rank: None,
            precision: Precision::Fast,
            isa_cap: None,
            context_max: None,
            kv_memory: None,
            step_tokens_max: None,
            step_target: None,
            step_deadline: None,
            step_limit: Duration::from_secs(600),
            sequences_max: 64,
            rank_mode: RankMode::Threads,
            nodes: None,
            rank_program: None,
        }
    }

    /// Of each machine, this one's first.
    fn ranks_of_nodes(&self) -> Vec<usize> {
        self.nodes.as_ref().map_or_else(|| vec![self.ranks], |nodes| nodes.ranks.clone())
    }

    /// Those of this machine.
    fn ranks_here(&self) -> usize {
        self.nodes.as_ref().map_or(self.ranks, |nodes| nodes.ranks[0])
    }
}

/// What a group serves, and on which resources.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// Folder or file name of the checkpoint.
    pub name: String,
    /// Names weights, tokenizer and template.
    pub fingerprint: String,
    /// Token ids at or above this do not exist.
    pub vocab: usize,
    /// Tokens of prompt and answer together.
    pub context_max: usize,
    pub ranks: usize,
    /// What computes, for people.
    pub device: String,
    pub threads_per_rank: usize,
    /// Instruction set in use on the CPU.
    pub isa: &'static str,
    pub precision: Precision,
    /// KV pool, in blocks of `BLOCK_TOKENS` tokens.
    pub blocks: usize,
    /// KV pool of all ranks together.
    pub kv_bytes: u64,
    /// Weights of all ranks together, as the device holds them.
    pub weights_bytes: u64,
    /// Longest prompt whose blocks may be shared; `None` is any.
    pub prefix_reuse_max: Option<usize>,
    pub step_tokens_max: usize,
    /// How long a step with answers in it should take, where that bounds steps.
    pub step_target: Option<Duration>,
    /// A step that takes longer has hung; `None` where nothing predicts it.
    pub step_deadline: Option<Duration>,
    pub sequences_max: usize,
    /// What a router needs to speak the model's language, by file name.
    pub text_files: BTreeMap<String, Vec<u8>>,
}

impl ModelInfo {
    /// The bounds of an engine over this group.
    pub fn scheduler_config(&self, waiting_max: usize) -> SchedulerConfig {
        SchedulerConfig {
            blocks: u32::try_from(self.blocks).unwrap_or(u32::MAX),
            step_tokens_max: self.step_tokens_max,
            step_target: self.step_target,
            sequences_max: self.sequences_max,
            waiting_max,
            context_max: self.context_max,
            prefix_reuse_max: self.prefix_reuse_max,
        }
    }
}

/// Called while weights load, each second at least, with how far rank 0's share is.
pub type LoadProgress<'a> = &'a mut (dyn FnMut(Loaded) + Send);

/// A group whose size is known, and whose weights are not loaded yet.
pub struct GroupPlan(Kind);

enum Kind {
    Ranks(Box<Sizing>),
    Mock(Box<ModelInfo>, MockConfig),
}

impl GroupPlan {
    /// Opens the checkpoint, shares out the model and checks that memory suffices.
    ///
    /// Errors: `Model` for a checkpoint that is broken, unsupported or cannot be split so far;
    /// `Memory` with the arithmetic; `Config` for settings that contradict each other.
    pub fn new(config: GroupConfig) -> Result<Self, WorkerError> {
        Ok(Self(match config.mock {
            Some(mock) => Kind::Mock(Box::new(mock::info(&config)?), mock),
            None => Kind::Ranks(Box::new(Sizing::new(config)?)),
        }))
    }

    pub fn info(&self) -> &ModelInfo {
        match &self.0 {
            Kind::Ranks(sizing) => &sizing.info,
            Kind::Mock(info, _) => info,
        }
    }

    /// Loads the weights on every rank. Blocks until all are ready.
    pub fn start(self, progress: LoadProgress<'_>) -> Result<Group, WorkerError> {
        let sizing = match self.0 {
            Kind::Ranks(sizing) => sizing,
            Kind::Mock(info, config) => {
                let executor = Box::new(Mock::new(config, info.vocab));
                return Ok(Group { info: *info, executor, epoch: Arc::default() });
            }
        };
        let RankOptions { device, cpu, .. } = &sizing.options;
        let epoch = Arc::default();
        let start = Start { sizing: &sizing, epoch: Arc::clone(&epoch), progress };
        let executor = on_devices(device, sizing.config.ranks_here(), *cpu, start)?;
        Ok(Group { info: sizing.info, executor, epoch })
    }
}

/// Starts the ranks on devices that are chosen.
struct Start<'a> {
    sizing: &'a Sizing,
    epoch: Arc<AtomicU64>,
    progress: LoadProgress<'a>,
}

impl Task for Start<'_> {
    type Out = Box<dyn Executor>;

    fn on<D: Devices>(self, devices: D) -> Result<Box<dyn Executor>, WorkerError> {
        match self.sizing.config.rank_mode {
            RankMode::Threads => threads::start(self.sizing, devices, self.progress),
            RankMode::Processes => process::start(self.sizing, devices, self.epoch, self.progress),
        }
    }
}

/// A group that is ready to run plans.
pub struct Group {
    pub info: ModelInfo,
    /// Dropping it ends the ranks.
    pub executor: Box<dyn Executor>,
    /// Counts how often the group was formed, where its ranks are processes; else 0.
    pub epoch: Arc<AtomicU64>,
}

impl Group {
    /// `GroupPlan::new` and `GroupPlan::start` in one.
    pub fn start(config: GroupConfig, progress: LoadProgress<'_>) -> Result<Self, WorkerError> {
        GroupPlan::new(config)?.start(progress)
    }
}
