//! How large a group becomes: settled, checked and told before anything is loaded.

use std::{sync::Arc, thread, time::Duration};

use cpu::{CpuConfig, Isa, Precision};
use kernels::BLOCK_TOKENS;
use model::{Checkpoint, ModelError, RunnerOptions, Shard, prefix_reuse_max};

use super::{
    Device, GroupConfig, ModelInfo,
    devices::{Devices, Task, on_devices},
    follower::{RankOptions, open},
};
use crate::{
    WorkerError,
    plan::{
        layout::{Layout, Place, RankCost, Wanted, blocks_of, lay_out, step_tokens},
        told,
    },
};

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
        let checkpoint = open(&config.model, config.random)?;
        let isa = config.isa_cap.map_or(Isa::detect(), |cap| cap.min(Isa::detect()));
        let (threads, precision) = (threads(&config), config.precision);
        let cpu = CpuConfig { threads, precision, isa };
        let survey = Survey { checkpoint: &checkpoint, config: &config };
        let DeviceSurvey { device, layout, step_deadline } =
            on_devices(&config.device, config.ranks_here(), cpu, survey)?;
        let step_deadline = config.step_deadline.or(step_deadline);
        let runner = layout.options;
        let text_files = formats::text_files(&config.model)
            .map_err(|error| ModelError::Checkpoint(error.to_string()))?;
        let info = ModelInfo {
            name: checkpoint.name().to_owned(),
            fingerprint: checkpoint.fingerprint(&text_files)?,
            vocab: checkpoint.config().vocab,
            context_max: runner.context_max,
            ranks: config.ranks,
            device,
            threads_per_rank: threads,
            isa: isa.name(),
            precision: config.precision,
            blocks: runner.blocks,
            kv_bytes: layout.ranks.iter().map(|rank| rank.kv).sum(),
            weights_bytes: layout.ranks.iter().map(|rank| rank.weights).sum(),
            prefix_reuse_max: prefix_reuse_max(checkpoint.config()),
            step_tokens_max: runner.step_tokens_max,
            step_target: Some(config.step_target.unwrap_or(STEP_TARGET)),
            step_deadline,
            sequences_max: config.sequences_max,
            text_files,
        };
        let (model, device) = (config.model.clone(), config.device.clone());
        let (random, step_limit) = (config.random, config.step_limit);
        let options = RankOptions { model, random, device, cpu, runner, step_deadline, step_limit };
        Ok(Self { config, checkpoint: Arc::new(checkpoint), info, options })
    }
}

fn check(config: &GroupConfig) -> Result<(), WorkerError> {
    let bounds = [
        ("ranks", config.ranks),
        ("threads for each rank", config.threads_per_rank.unwrap_or(1)),
        ("tokens in a step", config.step_tokens_max.unwrap_or(1)),
        ("sequences", config.sequences_max),
        ("tokens of context", config.context_max.unwrap_or(1)),
    ];
    for (what, value) in bounds {
        if value == 0 {
            return Err(WorkerError::Config(format!("0 {what}: at least 1 is needed")));
        }
    }
    if config.step_limit.is_zero() {
        return Err(WorkerError::Config("a limit of 0 s for a step: they take longer".into()));
    }
    if config.step_deadline.is_some_and(|deadline| deadline.is_zero()) {
        return Err(WorkerError::Config("a deadline of 0 s for a step: they take longer".into()));
    }
    if config.step_target.is_some_and(|target| target.is_zero()) {
        return Err(WorkerError::Config("steps of 0 s: they take longer than that".into()));
    }
    if let Some(nodes) = &config.nodes {
        nodes.check(config)?;
    }
    if config.device != Device::Cpu && config.precision == Precision::Exact {
        let text = "--precision exact is the CPU's: CUDA devices compute in bf16; leave it out";
        return Err(WorkerError::Config(text.into()));
    }
    Ok(())
}

fn threads(config: &GroupConfig) -> usize {
    let machine = || thread::available_parallelism().map_or(1, |threads| threads.get());
    config.threads_per_rank.unwrap_or_else(|| (machine() / config.ranks_here()).max(1))
}

/// What the devices hold and need.
struct DeviceSurvey {
    /// For people.
    device: String,
    layout: Layout,
    step_deadline: Option<Duration>,
}

/// Asks the devices, and shares their memory out.
struct Survey<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a GroupConfig,
}

impl Task for Survey<'_> {
    type Out = DeviceSurvey;

    fn on<D: Devices>(self, devices: D) -> Result<DeviceSurvey, WorkerError> {
        let Self { checkpoint, config } = self;
        let (model, ranks) = (checkpoint.config(), config.ranks);
        let joined = |shard: Shard| shard.joined_by(devices.join(), model);
        let shards = (0..ranks).map(|rank| Ok(joined(checkpoint.shard(rank, ranks)?)));
        let shards = shards.collect::<Result<Vec<Shard>, ModelError>>()?;
        let places = places(&devices, config)?;
        let wanted = |step_tokens_max| Wanted {
            context_max: config.context_max,
            kv_memory: config.kv_memory,
            model_context: model.context_max,
            step_tokens_max,
            sequences_max: config.sequences_max,
            kv_share: devices.kv_share(),
        };
        let placed = places.iter().flat_map(|place| place.ranks.clone().map(move |_| place));
        let costs = |step_tokens: usize| -> Result<Vec<RankCost>, WorkerError> {
            let cost = |(shard, place)| devices.cost(checkpoint, shard, place, step_tokens);
            shards.iter().zip(placed.clone()).map(cost).collect()
        };
        let laid_out = |wanted: &Wanted, costs: &[RankCost]| {
            lay_out(wanted, &places, costs, |rank, options| {
                devices.scratch(model, &shards[rank], &costs[rank], options)
            })
        };
        let given = config.step_tokens_max.map(|tokens| vec![tokens]);
        let steps = given.unwrap_or_else(|| devices.step_tokens().to_vec());
        let chosen = step_tokens(&steps, |tokens| {
            Ok::<_, WorkerError>(laid_out(&wanted(tokens), &costs(tokens)?))
        })?;
        let (wanted, costs) = (wanted(chosen), costs(chosen)?);
        let layout = laid_out(&wanted, &costs);
        check_pool(&wanted, &costs, &layout)?;
        let advice = || devices.advice(checkpoint, &wanted, &places);
        check_memory(&places, &layout, advice)?;
        let options = &layout.options;
        let step_deadline = devices.step_deadline(checkpoint, &shards, &places, options)?;
        let names: Vec<&str> = places.iter().map(|place| &*place.name).collect();
        Ok(DeviceSurvey { device: names.join(", "), layout, step_deadline })
    }
}

/// The memory of all machines. What the others have is not known here: they are taken to be alike.
fn places<D: Devices>(devices: &D, config: &GroupConfig) -> Result<Vec<Place>, WorkerError> {
    let (mut all, mut first) = (Vec::new(), 0);
    for count in config.ranks_of_nodes() {
        let of_node = devices.places(count)?.into_iter().map(|place| Place {
            ranks: place.ranks.start + first..place.ranks.end + first,
            ..place
        });
        all.extend(of_node);
        first += count;
    }
    Ok(all)
}

/// Refuses a KV pool of a given size that is of no use.
fn check_pool(wanted: &Wanted, costs: &[RankCost], layout: &Layout) -> Result<(), WorkerError> {
    let RunnerOptions { blocks, context_max, .. } = layout.options;
    let block_bytes: u64 = costs.iter().map(|cost| cost.block).sum();
    if blocks == 0 {
        return Err(WorkerError::Config(format!(
            "a KV pool of {} bytes holds no block: one takes {block_bytes} bytes",
            wanted.kv_memory.unwrap_or(0)
        )));
    }
    let held = blocks * BLOCK_TOKENS;
    if context_max > held {
        return Err(WorkerError::Config(format!(
            "the KV pool holds {held} tokens, fewer than the context of {context_max}; give \
             --kv-memory at least {}, or a smaller --context",
            blocks_of(context_max) * block_bytes
        )));
    }
    if context_max > wanted.model_context {
        tracing::warn!(
            context = context_max,
            model = wanted.model_context,
            "the context is longer than the model was made for: answers may get worse there"
        );
    }
    Ok(())
}

/// Tells the arithmetic, and refuses what cannot be.
fn check_memory(
    places: &[Place],
    layout: &Layout,
    advice: impl FnOnce() -> String,
) -> Result<(), WorkerError> {
    if let Some(place) = layout.overfull(places) {
        return Err(WorkerError::Memory(format!("{}; {}", told(layout, place), advice())));
    }
    for place in places.iter().filter(|place| place.bytes < u64::MAX) {
        tracing::info!("memory: {}", told(layout, place));
    }
    Ok(())
}
