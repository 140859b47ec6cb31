//! How large a group becomes: settled, checked and told before anything is loaded.

use std::{sync::Arc, thread};

use kernels::{
    BLOCK_TOKENS,
    cpu::{Cpu, CpuConfig, Isa},
};
use model::{
    Checkpoint, ModelError, RunnerOptions, Shard, activation_bytes, kv_block_bytes,
    prefix_reuse_max,
};

use super::{
    GroupConfig, ModelInfo,
    follower::RankOptions,
    memory::{Available, available, human},
};
use crate::WorkerError;

/// Contexts that the default KV pool holds, where memory allows.
const CONTEXTS_DEFAULT: u64 = 16;
/// The default KV pool takes at most this part of the free memory.
const MEMORY_PART_DEFAULT: u64 = 4;

/// A group before it is loaded.
pub(super) struct Sizing {
    pub config: GroupConfig,
    pub checkpoint: Arc<Checkpoint>,
    pub info: ModelInfo,
    isa: Isa,
    runner: RunnerOptions,
}

impl Sizing {
    pub fn new(config: GroupConfig) -> Result<Self, WorkerError> {
        check(&config)?;
        let checkpoint = Checkpoint::open(&config.model)?;
        let shards = (0..config.ranks)
            .map(|rank| checkpoint.shard(rank, config.ranks))
            .collect::<Result<Vec<_>, _>>()?;
        let isa = config.isa_cap.map_or(Isa::detect(), |cap| cap.min(Isa::detect()));
        let threads_per_rank = threads(&config);
        let mut weights_bytes = 0;
        for shard in &shards {
            weights_bytes += checkpoint.weight_bytes(shard)?;
        }
        let pool = Pool::new(&config, &checkpoint, &shards, isa, weights_bytes)?;
        let runner = RunnerOptions {
            blocks: pool.blocks as usize,
            step_tokens_max: config.step_tokens_max,
            sequences_max: config.sequences_max,
            context_max: pool.context_max,
        };
        let scratch: usize =
            shards.iter().map(|shard| activation_bytes(checkpoint.config(), shard, &runner)).sum();
        pool.check_memory(weights_bytes, scratch as u64)?;
        let text_files = formats::text_files(&config.model)
            .map_err(|error| ModelError::Checkpoint(error.to_string()))?;
        let info = ModelInfo {
            name: checkpoint.name().to_owned(),
            vocab: checkpoint.config().vocab,
            context_max: pool.context_max,
            ranks: config.ranks,
            threads_per_rank,
            isa: isa.name(),
            precision: config.precision,
            blocks: pool.blocks as usize,
            kv_bytes: pool.blocks * pool.block_bytes,
            weights_bytes,
            prefix_reuse_max: prefix_reuse_max(checkpoint.config()),
            step_tokens_max: config.step_tokens_max,
            sequences_max: config.sequences_max,
            text_files,
        };
        Ok(Self { config, checkpoint: Arc::new(checkpoint), info, isa, runner })
    }

    pub fn rank_options(&self) -> RankOptions {
        RankOptions {
            threads: self.info.threads_per_rank,
            precision: self.config.precision,
            isa: self.isa,
            runner: self.runner,
        }
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
    Ok(())
}

fn threads(config: &GroupConfig) -> usize {
    let machine = || thread::available_parallelism().map_or(1, |threads| threads.get());
    config.threads_per_rank.unwrap_or_else(|| (machine() / config.ranks).max(1))
}

/// The KV pool of all ranks together.
struct Pool {
    blocks: u64,
    /// One block on every rank.
    block_bytes: u64,
    context_max: usize,
    available: Option<Available>,
}

impl Pool {
    fn new(
        config: &GroupConfig,
        checkpoint: &Checkpoint,
        shards: &[Shard],
        isa: Isa,
        weights_bytes: u64,
    ) -> Result<Self, WorkerError> {
        // Only asked for sizes: it never computes.
        let cpu = CpuConfig { threads: 1, precision: config.precision, isa };
        let device = Cpu::new(cpu).map_err(ModelError::from)?;
        let block_bytes: u64 = shards
            .iter()
            .map(|shard| kv_block_bytes(&device, checkpoint.config(), shard) as u64)
            .sum();
        let model_context = checkpoint.config().context_max;
        let available = available();
        let blocks_of = |context: usize| context.div_ceil(BLOCK_TOKENS) as u64;
        let blocks = match config.kv_memory {
            Some(bytes) => bytes / block_bytes.max(1),
            None => {
                let wanted = blocks_of(config.context_max.unwrap_or(model_context));
                let free = available.map_or(u64::MAX, |available| available.bytes);
                let part = free.saturating_sub(weights_bytes) / MEMORY_PART_DEFAULT;
                let fits = (part / block_bytes.max(1)).min(wanted * CONTEXTS_DEFAULT);
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
            return Err(WorkerError::Config(format!(
                "a context of {context_max} is more than the model's {model_context}"
            )));
        }
        Ok(Self { blocks, block_bytes, context_max, available })
    }

    fn check_memory(&self, weights: u64, scratch: u64) -> Result<(), WorkerError> {
        let Some(available) = self.available else { return Ok(()) };
        let kv = self.blocks * self.block_bytes;
        let needed = weights + kv + scratch;
        if needed <= available.bytes {
            return Ok(());
        }
        Err(WorkerError::Memory(format!(
            "weights {} + KV pool {} ({} tokens of {} bytes) + scratch {} = {}, but {} are \
             available ({}); lower --kv-memory or --context, or choose a smaller model",
            human(weights),
            human(kv),
            self.blocks * BLOCK_TOKENS as u64,
            self.block_bytes / BLOCK_TOKENS as u64,
            human(scratch),
            human(needed),
            human(available.bytes),
            available.source,
        )))
    }
}
