//! How large a group becomes: settled, checked and told before anything is loaded.

use std::{sync::Arc, thread, time::Duration};

use cpu::{CpuConfig, Isa, Precision};
use kernels::BLOCK_TOKENS;
use model::{Checkpoint, ModelError, RunnerOptions, Shard, activation_bytes, prefix_reuse_max};

use super::{
    Device, GroupConfig, ModelInfo,
    devices::{Devices, KvShare, Task, on_devices},
    follower::RankOptions,
    memory::{Available, human},
};
use crate::WorkerError;

/// On the CPU: the longest that a reader does not notice as a stall.
const STEP_TARGET: Duration = Duration::from_millis(250);

/// A group before it is loaded.
pub(super) struct Sizing {
    pub config: GroupConfig,
    pub checkpoint: Arc<Checkpoint>,
    pub info: ModelInfo,
    pub options: RankOptions,
}

impl Sizing {
    pub fn new(config: GroupConfig) -> Result<Self, WorkerError> {
        check(&config)?;
        let checkpoint = Checkpoint::open(&config.model)?;
        let isa = config.isa_cap.map_or(Isa::detect(), |cap| cap.min(Isa::detect()));
        let (threads, precision) = (threads(&config), config.precision);
        let cpu = CpuConfig { threads, precision, isa };
        let survey = Survey { checkpoint: &checkpoint, ranks: config.ranks };
        let survey = on_devices(config.device, config.ranks, cpu, survey)?;
        let options = |blocks, context_max| RunnerOptions {
            blocks,
            step_tokens_max: config.step_tokens_max,
            sequences_max: config.sequences_max,
            context_max,
        };
        let scratch = |options: &RunnerOptions| -> u64 {
            let of = |shard| activation_bytes(checkpoint.config(), shard, options) as u64;
            survey.shards.iter().map(of).sum()
        };
        let context_most = config.context_max.unwrap_or(checkpoint.config().context_max);
        let reserved = survey.weights_bytes + scratch(&options(1, context_most));
        let pool = Pool::new(&config, checkpoint.config().context_max, &survey, reserved)?;
        let runner = options(pool.blocks as usize, pool.context_max);
        pool.check_memory(&survey, scratch(&runner))?;
        let text_files = formats::text_files(&config.model)
            .map_err(|error| ModelError::Checkpoint(error.to_string()))?;
        let info = ModelInfo {
            name: checkpoint.name().to_owned(),
            vocab: checkpoint.config().vocab,
            context_max: pool.context_max,
            ranks: config.ranks,
            device: survey.device,
            threads_per_rank: threads,
            isa: isa.name(),
            precision: config.precision,
            blocks: pool.blocks as usize,
            kv_bytes: pool.blocks * survey.block_bytes,
            weights_bytes: survey.weights_bytes,
            prefix_reuse_max: prefix_reuse_max(checkpoint.config()),
            step_tokens_max: config.step_tokens_max,
            step_target: step_target(&config),
            sequences_max: config.sequences_max,
            text_files,
        };
        let (model, device) = (config.model.clone(), config.device);
        let options = RankOptions { model, device, cpu, runner };
        Ok(Self { config, checkpoint: Arc::new(checkpoint), info, options })
    }
}

fn check(config: &GroupConfig) -> Result<(), WorkerError> {
    let bounds = [
        ("ranks", config.ranks),
        ("threads for each rank", config.threads_per_rank.unwrap_or(1)),
        ("tokens in a step", config.step_tokens_max),
        ("sequences", config.sequences_max),
        ("tokens of context", config.context_max.unwrap_or(1)),
    ];
    for (what, value) in bounds {
        if value == 0 {
            return Err(WorkerError::Config(format!("0 {what}: at least 1 is needed")));
        }
    }
    if config.step_target.is_some_and(|target| target.is_zero()) {
        return Err(WorkerError::Config("steps of 0 s: they take longer than that".into()));
    }
    if config.device != Device::Cpu && config.precision == Precision::Exact {
        let text = "--precision exact is the CPU's: CUDA devices compute in bf16; leave it out";
        return Err(WorkerError::Config(text.into()));
    }
    Ok(())
}

fn step_target(config: &GroupConfig) -> Option<Duration> {
    let usual = (config.device == Device::Cpu).then_some(STEP_TARGET);
    config.step_target.or(usual)
}

fn threads(config: &GroupConfig) -> usize {
    let machine = || thread::available_parallelism().map_or(1, |threads| threads.get());
    config.threads_per_rank.unwrap_or_else(|| (machine() / config.ranks).max(1))
}

/// What the devices hold and need, all ranks together.
struct DeviceSurvey {
    device: String,
    /// Of every rank.
    shards: Vec<Shard>,
    weights_bytes: u64,
    /// One block on every rank.
    block_bytes: u64,
    available: Option<Available>,
    kv_share: KvShare,
}

/// Asks the devices.
struct Survey<'a> {
    checkpoint: &'a Checkpoint,
    ranks: usize,
}

impl Task for Survey<'_> {
    type Out = DeviceSurvey;

    fn on<D: Devices>(self, devices: D) -> Result<DeviceSurvey, WorkerError> {
        let (mut weights_bytes, mut block_bytes) = (0, 0);
        let (checkpoint, config) = (self.checkpoint, self.checkpoint.config());
        let shard = |rank| checkpoint.shard(rank, self.ranks);
        let shards = (0..self.ranks).map(shard).collect::<Result<Vec<Shard>, _>>()?;
        let joined = |shard: Shard| shard.joined_by(devices.join(), config);
        let shards: Vec<Shard> = shards.into_iter().map(joined).collect();
        let layers = config.layers as u64;
        for shard in &shards {
            weights_bytes += devices.weight_bytes(checkpoint, shard)?;
            block_bytes += layers * devices.kv_block_bytes(shard.heads())? as u64;
        }
        let (available, kv_share) = (devices.available()?, devices.kv_share());
        let device = devices.describe()?;
        Ok(DeviceSurvey { device, shards, weights_bytes, block_bytes, available, kv_share })
    }
}

/// The KV pool of all ranks together.
struct Pool {
    blocks: u64,
    context_max: usize,
}

impl Pool {
    /// `reserved` bytes are weights and scratch.
    fn new(
        config: &GroupConfig,
        model_context: usize,
        survey: &DeviceSurvey,
        reserved: u64,
    ) -> Result<Self, WorkerError> {
        let block_bytes = survey.block_bytes;
        let blocks_of = |context: usize| context.div_ceil(BLOCK_TOKENS) as u64;
        let blocks = match config.kv_memory {
            Some(bytes) => bytes / block_bytes.max(1),
            None => {
                let KvShare { part, contexts_max } = survey.kv_share;
                let wanted = blocks_of(config.context_max.unwrap_or(model_context));
                let free = survey.available.map_or(u64::MAX, |available| available.bytes);
                let fits = free.saturating_sub(reserved) / part / block_bytes.max(1);
                let fits = fits.min(wanted.saturating_mul(contexts_max));
                // Who asks for a context gets it, or hears why not.
                if config.context_max.is_some() { fits.max(wanted) } else { fits.max(1) }
            }
        };
        let blocks = blocks.min(i32::MAX as u64 / BLOCK_TOKENS as u64);
        if blocks == 0 {
            return Err(WorkerError::Config(format!(
                "a KV pool of {} bytes holds no block: one takes {block_bytes} bytes",
                config.kv_memory.unwrap_or(0)
            )));
        }
        let held = blocks as usize * BLOCK_TOKENS;
        let context_max = config.context_max.unwrap_or(model_context.min(held));
        if context_max > held {
            return Err(WorkerError::Config(format!(
                "the KV pool holds {held} tokens, fewer than the context of {context_max}; give \
                 --kv-memory at least {}, or a smaller --context",
                blocks_of(context_max) * block_bytes
            )));
        }
        if context_max > model_context {
            tracing::warn!(
                context = context_max,
                model = model_context,
                "the context is longer than the model was made for: answers may get worse there"
            );
        }
        Ok(Self { blocks, context_max })
    }

    /// Tells the arithmetic, and refuses what cannot be.
    fn check_memory(&self, survey: &DeviceSurvey, scratch: u64) -> Result<(), WorkerError> {
        let Some(available) = survey.available else { return Ok(()) };
        let (weights, kv) = (survey.weights_bytes, self.blocks * survey.block_bytes);
        let needed = weights + kv + scratch;
        if needed <= available.bytes {
            let (weights, kv_pool, scratch) = (human(weights), human(kv), human(scratch));
            let (needed, free, of) = (human(needed), human(available.bytes), available.source);
            tracing::info!(weights, kv_pool, scratch, needed, free, of, "memory");
            return Ok(());
        }
        Err(WorkerError::Memory(format!(
            "weights {} + KV pool {} ({} tokens of {} bytes) + scratch {} = {}, but {} are \
             available ({}); lower --kv-memory or --context, or choose a smaller model",
            human(weights),
            human(kv),
            self.blocks * BLOCK_TOKENS as u64,
            survey.block_bytes / BLOCK_TOKENS as u64,
            human(scratch),
            human(needed),
            human(available.bytes),
            available.source,
        )))
    }
}
