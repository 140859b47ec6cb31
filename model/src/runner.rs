//! Runs plans on one rank: a plan becomes a batch, a forward pass, and on rank 0 tokens.
//!
//! A rank decides nothing. Every rank of a group gets the same plans and refuses the same ones, and
//! only rank 0 samples. A plan may go on with tokens that the one before it samples, which
//! the devices know. All device memory is allocated when the model is loaded.

mod batch;
mod check;
mod results;
mod steps;
mod tables;

use crate::{
    Checkpoint, DecoderConfig, ModelError, Shard,
    decoder::{Decoder, ExpertsShape, Loaded, Scratch, ScratchShape, Width},
    rope::RopeTables,
    sampler::{Sampler, Seen},
};
use batch::BatchBuilder;
use check::Limits;
use collective::Collective;
use engine::plan::{Admission, BLOCK_TOKENS, SamplingParams, SequenceId, StepPlan};
use kernels::{Backend, BatchRoom, Heads};
use results::samples;
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, VecDeque};
use steps::InFlight;

// Plans count blocks in the tokens that the kernels put into one.
const _: () = assert!(BLOCK_TOKENS == kernels::BLOCK_TOKENS);

/// Sizes that are fixed when a model is loaded, the same on every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunnerOptions {
    /// KV blocks in the pool.
    pub blocks: usize,
    /// Tokens in one step.
    pub step_tokens_max: usize,
    /// Sequences in one step.
    pub sequences_max: usize,
    /// Tokens of one sequence, prompt and answer together.
    pub context_max: usize,
}

impl RunnerOptions {
    /// The largest steps of a rank with `heads`.
    pub fn room(&self, heads: Heads) -> BatchRoom {
        let Self { step_tokens_max, sequences_max, context_max, .. } = *self;
        BatchRoom {
            tokens: step_tokens_max,
            sequences: sequences_max,
            tables: sequences_max,
            context: context_max,
            heads,
        }
    }
}

/// What is remembered of a sequence between its chunks.
pub(crate) struct RunningSequence {
    /// The row of position 0 in the rope tables.
    rope_first_row: usize,
    /// Tokens in the KV cache.
    cached: usize,
    /// In the order of their positions.
    blocks: Vec<u32>,
    /// How many of them the device's table holds.
    blocks_told: usize,
    params: SamplingParams,
    /// The plan that admitted it.
    admitted: u64,
    /// Whether its last chunk is sampled.
    samples: bool,
    /// Rank 0 only.
    seen: Seen,
    /// Rank 0 only: the last token that is known, and whether one could not be sampled. A chunk
    /// that was planned before that was known fails as well.
    last: u32,
    refused: bool,
}

impl RunningSequence {
    fn new(number: u64, admission: &Admission, tables: &RopeTables, samples: bool) -> Self {
        Self {
            rope_first_row: tables.first_row(admission.prompt_len),
            cached: 0,
            blocks: Vec::new(),
            blocks_told: 0,
            params: admission.params.clone(),
            admitted: number,
            samples: false,
            seen: if samples { Seen::new(admission) } else { Seen::default() },
            last: 0,
            refused: false,
        }
    }
}

/// One rank's part of a model on its device, in no group: what a [`Runner`] is made of, and what is
/// left of it when its group has failed.
pub struct ModelShard<B: Backend> {
    device: B,
    decoder: Decoder<B>,
    shard: Shard,
    tables: RopeTables,
    context_max: usize,
}

impl<B: Backend> ModelShard<B> {
    /// Loads the part of rank `rank` of `world_size`, for a runner with these options; `progress`
    /// hears how far that is.
    ///
    /// # Errors
    /// `Options` for sizes that cannot be indexed, and what the checkpoint or the device refuses.
    pub fn load(
        device: B,
        (rank, world_size): (usize, usize),
        checkpoint: &Checkpoint,
        options: &RunnerOptions,
        progress: &mut dyn FnMut(Loaded),
    ) -> Result<Self, ModelError> {
        let (config, context_max) = (checkpoint.config(), options.context_max);
        let tables = RopeTables::new(&config.rope, context_max);
        check_options(options, &tables)?;
        let shard = checkpoint.shard(rank, world_size)?.joined_by(device.join(), config);
        let decoder = Decoder::load(&device, checkpoint, &shard, &tables, progress)?;
        Ok(Self { device, decoder, shard, tables, context_max })
    }

    pub fn device(&self) -> &B {
        &self.device
    }

    /// Whether it is the part of that rank, for sequences of that length.
    pub fn fits(&self, (rank, world_size): (usize, usize), context_max: usize) -> bool {
        let Shard { rank: own, world_size: ranks, .. } = self.shard;
        (own, ranks, self.context_max) == (rank, world_size, context_max)
    }
}

/// One rank of a group with its part of a model.
pub struct Runner<B: Backend, C: Collective<B>> {
    group: C,
    model: ModelShard<B>,
    /// One for each layer.
    kv: Vec<B::Kv>,
    scratch: Scratch<B>,
    batch: BatchBuilder<B>,
    limits: Limits,
    sequences: HashMap<SequenceId, RunningSequence>,
    next_number: u64,
    /// The oldest first.
    in_flight: VecDeque<InFlight<B>>,
    logit_rows_max: usize,
    /// Rank 0 only.
    sampler: Option<Sampler>,
    /// Rank 0 only, and only where the device chooses tokens.
    on_device: Option<B::Sampling>,
}

/// The longest prompt whose cached keys may serve another prompt; `None` is any.
///
/// With dynamic NTK the rotation of keys depends on the prompt's length once that passes the
/// trained length, so longer prompts neither use nor feed a prefix cache.
pub fn prefix_reuse_max(config: &DecoderConfig) -> Option<usize> {
    config.rope.dynamic_ntk
}

pub(crate) fn scratch_shape(
    config: &DecoderConfig,
    shard: &Shard,
    options: &RunnerOptions,
    logit_rows_max: usize,
) -> ScratchShape {
    let (heads, dim) = (shard.heads(), config.head_dim);
    let intermediate = if config.has_dense_layers() { config.intermediate } else { 0 };
    ScratchShape {
        tokens_max: options.step_tokens_max,
        logit_rows_max: options.step_tokens_max.min(logit_rows_max),
        heads,
        attention: shard.gathered(heads.q * dim, config.q_heads * dim),
        hidden: Width { local: shard.hidden.len(), whole: config.hidden },
        intermediate: shard.gathered(shard.ffn.len(), intermediate),
        experts: config.experts.as_ref().map(|experts| ExpertsShape {
            routing: experts.routing(),
            expert: shard.gathered(shard.expert.len(), experts.intermediate),
            shared: experts.shared.map(|whole| shard.gathered(shard.shared_expert.len(), whole)),
        }),
        vocab: Width { local: shard.vocab.len(), whole: config.vocab },
    }
}

impl<B: Backend, C: Collective<B>> Runner<B, C> {
    /// Loads this rank's part of `checkpoint`; `progress` hears how far that is.
    ///
    /// # Errors
    /// `Options` for sizes that cannot be indexed, and what the checkpoint or the device refuses.
    pub fn load(
        device: B,
        group: C,
        checkpoint: &Checkpoint,
        options: RunnerOptions,
        progress: &mut dyn FnMut(Loaded),
    ) -> Result<Self, ModelError> {
        let place = (group.rank(), group.world_size());
        let model = ModelShard::load(device, place, checkpoint, &options, progress)?;
        Self::new(model, group, checkpoint.config(), options)
    }

    /// A rank of `group` with a part of the model of `config` that is loaded.
    ///
    /// # Errors
    /// `Options` for sizes that cannot be indexed, or a part that is not this rank's; what the
    /// device refuses.
    pub fn new(
        model: ModelShard<B>,
        group: C,
        config: &DecoderConfig,
        options: RunnerOptions,
    ) -> Result<Self, ModelError> {
        check_options(&options, &model.tables)?;
        if !model.fits((group.rank(), group.world_size()), options.context_max) {
            return Err(ModelError::Options("the part of another rank was loaded".into()));
        }
        let ModelShard { device, shard, .. } = &model;
        let kv = (0..config.layers).map(|_| device.kv(options.blocks, shard.heads()));
        let kv = kv.collect::<Result<_, _>>()?;
        let shape = scratch_shape(config, shard, &options, device.logit_rows_max());
        let samples = group.rank() == 0;
        let on_device = match samples {
            true => device.sampling(shape.logit_rows_max, config.vocab, config.sampled_vocab)?,
            false => None,
        };
        Ok(Self {
            batch: BatchBuilder::new(device, &options, shard.heads(), config.logn)?,
            logit_rows_max: shape.logit_rows_max,
            on_device,
            sampler: samples.then(|| Sampler::new(config.vocab, config.sampled_vocab)),
            limits: Limits {
                options,
                vocab: config.vocab,
                world_size: group.world_size(),
                keeps_sampled: device.keeps_sampled(),
                samples,
                prefix_reuse_max: prefix_reuse_max(config),
            },
            scratch: Scratch::new(device, &shape)?,
            model,
            group,
            kv,
            sequences: HashMap::new(),
            next_number: 0,
            in_flight: VecDeque::new(),
        })
    }

    /// Leaves the group, which has failed, and keeps what was loaded.
    ///
    /// # Errors
    /// The device is of no further use.
    pub fn leave(self) -> Result<ModelShard<B>, ModelError> {
        // The others first: devices may wait for one another.
        let Self { group, model, .. } = self;
        drop(group);
        model.device.forget_steps()?;
        Ok(model)
    }

    /// As the free function, for this model.
    pub fn prefix_reuse_max(&self) -> Option<usize> {
        self.limits.prefix_reuse_max
    }

    /// The exchange with the other ranks, for what is no tensor.
    pub fn group(&mut self) -> &mut C {
        &mut self.group
    }

    fn update_sequences(&mut self, plan: &StepPlan) {
        for id in &plan.released {
            self.sequences.remove(id);
        }
        for chunk in &plan.chunks {
            if let Some(admission) = &chunk.admission {
                let sequence = RunningSequence::new(
                    plan.number,
                    admission,
                    &self.model.tables,
                    self.sampler.is_some(),
                );
                self.sequences.insert(chunk.sequence, sequence);
            }
            if let Some(sequence) = self.sequences.get_mut(&chunk.sequence) {
                sequence.cached = chunk.end();
                sequence.blocks.extend(&chunk.blocks);
                sequence.samples = samples(chunk);
            }
        }
    }
}

/// Indices on the device are 32-bit.
fn check_options(options: &RunnerOptions, tables: &RopeTables) -> Result<(), ModelError> {
    let RunnerOptions { blocks, step_tokens_max, sequences_max, context_max } = *options;
    let sizes = [
        ("KV blocks", blocks, blocks.saturating_mul(BLOCK_TOKENS)),
        ("tokens in a step", step_tokens_max, step_tokens_max),
        ("sequences in a step", sequences_max, sequences_max),
        ("tokens of context", context_max, tables.rows()),
    ];
    match sizes.iter().find(|(_, size, index)| *size == 0 || *index > i32::MAX as usize) {
        Some((what, size, _)) => Err(ModelError::Options(format!(
            "{size} {what} cannot be indexed; choose another size"
        ))),
        None => Ok(()),
    }
}
