//! Runs plans on one rank: a plan becomes a batch, a forward pass, and on rank 0 tokens.
//!
//! A rank decides nothing. Every rank of a group gets the same plans and refuses the same ones, and
//! only rank 0 samples. A plan may go on with tokens that the one before it samples, where rank 0
//! is alone. All device memory is allocated when the model is loaded.

mod batch;
mod check;
mod results;
mod tables;

use crate::{
    Checkpoint, DecoderConfig, ModelError, Shard,
    decoder::{Context, Decoder, ExpertsShape, Scratch, ScratchShape, Width},
    rope::RopeTables,
    sampler::{Sampler, Seen},
};
use batch::BatchBuilder;
use check::Limits;
use collective::Collective;
use engine::plan::{
    Admission, BLOCK_TOKENS, Chunk, SamplingParams, SequenceId, StepOutput, StepPlan, Tokens, Want,
};
use kernels::{Backend, BatchRoom, Heads};
use results::Results;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

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
    /// Rank 0 only.
    seen: Seen,
    /// Rank 0 only.
    last: LastSample,
}

/// What a sequence's last chunk sampled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LastSample {
    /// It was not asked to.
    Nothing,
    Token(u32),
    /// It could not. A chunk that was planned before that was known fails as well.
    Refused,
}

impl LastSample {
    /// The id to run: any where there is none, since its results are not used.
    fn id(self) -> u32 {
        match self {
            Self::Token(id) => id,
            Self::Nothing | Self::Refused => 0,
        }
    }
}

impl RunningSequence {
    fn new(admission: &Admission, tables: &RopeTables, samples: bool) -> Self {
        Self {
            rope_first_row: tables.first_row(admission.prompt_len),
            cached: 0,
            blocks: Vec::new(),
            blocks_told: 0,
            params: admission.params.clone(),
            seen: if samples { Seen::new(admission) } else { Seen::default() },
            last: LastSample::Nothing,
        }
    }
}

/// One rank of a group with its part of a model.
pub struct Runner<B: Backend, C: Collective<B>> {
    device: B,
    group: C,
    decoder: Decoder<B>,
    /// One for each layer.
    kv: Vec<B::Kv>,
    scratch: Scratch<B>,
    batch: BatchBuilder<B>,
    limits: Limits,
    tables: RopeTables,
    sequences: HashMap<SequenceId, RunningSequence>,
    next_number: u64,
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
    /// Loads this rank's part of `checkpoint`; `progress` hears of bytes done and in all.
    ///
    /// # Errors
    /// `Options` for sizes that cannot be indexed, and what the checkpoint or the device refuses.
    pub fn load(
        device: B,
        group: C,
        checkpoint: &Checkpoint,
        options: RunnerOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, ModelError> {
        let config = checkpoint.config();
        let tables = RopeTables::new(&config.rope, options.context_max);
        check_options(&options, &tables)?;
        let shard = checkpoint.shard(group.rank(), group.world_size())?;
        let shard = shard.joined_by(device.join(), config);
        let decoder = Decoder::load(&device, checkpoint, &shard, &tables, progress)?;
        let kv = (0..config.layers).map(|_| device.kv(options.blocks, shard.heads()));
        let kv = kv.collect::<Result<_, _>>()?;
        let shape = scratch_shape(config, &shard, &options, device.logit_rows_max());
        let samples = group.rank() == 0;
        let on_device = match samples {
            true => device.sampling(shape.logit_rows_max, config.vocab, config.sampled_vocab)?,
            false => None,
        };
        Ok(Self {
            batch: BatchBuilder::new(&device, &options, shard.heads(), config.logn)?,
            logit_rows_max: shape.logit_rows_max,
            on_device,
            sampler: samples.then(|| Sampler::new(config.vocab, config.sampled_vocab)),
            limits: Limits {
                options,
                vocab: config.vocab,
                world_size: group.world_size(),
                samples,
                prefix_reuse_max: prefix_reuse_max(config),
            },
            scratch: Scratch::new(&device, &shape)?,
            device,
            group,
            decoder,
            kv,
            tables,
            sequences: HashMap::new(),
            next_number: 0,
        })
    }

    /// As the free function, for this model.
    pub fn prefix_reuse_max(&self) -> Option<usize> {
        self.limits.prefix_reuse_max
    }

    /// The exchange with the other ranks, for what is no tensor.
    pub fn group(&mut self) -> &mut C {
        &mut self.group
    }

    /// Runs the next plan. Every rank must be given the same one. The output means something on
    /// rank 0 only.
    ///
    /// # Errors
    /// `Plan` for a plan that cannot be right, before anything is run; otherwise what failed of the
    /// device or the group, after which this rank is of no further use.
    pub fn step(&mut self, plan: &StepPlan) -> Result<StepOutput, ModelError> {
        self.limits.check(plan, self.next_number, &self.sequences)?;
        self.next_number += 1;
        self.update_sequences(plan);
        if plan.chunks.is_empty() {
            return Ok(StepOutput { number: plan.number, ..StepOutput::default() });
        }
        let rows = self.graph_rows(plan);
        self.batch.fill(&self.device, plan, &mut self.sequences, rows)?;
        let Self { device, group, kv, scratch, decoder, batch, .. } = self;
        let mut cx = Context { device: &*device, group, kv, scratch };
        let batch = &batch.batch;
        match rows {
            Some(rows) => device.captured(rows, || -> Result<(), ModelError> {
                decoder.forward(&mut cx, batch)?;
                decoder.logits(&mut cx, batch, 0, rows)
            })?,
            None => decoder.forward(&mut cx, batch)?,
        }
        let output = self.read_logits(plan, rows.is_some())?;
        self.group.check(&self.device)?;
        Ok(output)
    }

    /// The size to which `plan` is padded, where all it does is to sample a token of each sequence
    /// and the device captures such steps.
    fn graph_rows(&self, plan: &StepPlan) -> Option<usize> {
        let decodes = |chunk: &Chunk| chunk.tokens.len() == 1 && chunk.want == Want::Sample;
        let rows = self.device.graph_rows(plan.chunks.len())?;
        let fits = rows <= self.logit_rows_max && self.group.is_captured();
        (fits && plan.chunks.iter().all(decodes)).then_some(rows)
    }

    fn update_sequences(&mut self, plan: &StepPlan) {
        for id in &plan.released {
            self.sequences.remove(id);
        }
        for chunk in &plan.chunks {
            if let Some(admission) = &chunk.admission {
                let sequence =
                    RunningSequence::new(admission, &self.tables, self.sampler.is_some());
                self.sequences.insert(chunk.sequence, sequence);
            }
            if let Some(sequence) = self.sequences.get_mut(&chunk.sequence) {
                sequence.cached = chunk.end();
                sequence.blocks.extend(&chunk.blocks);
                if chunk.tokens != Tokens::LastSampled {
                    sequence.last = LastSample::Nothing;
                }
            }
        }
    }

    /// Computes the wanted logits, unless they are there, some rows at a time, and turns them into
    /// results.
    fn read_logits(&mut self, plan: &StepPlan, are_there: bool) -> Result<StepOutput, ModelError> {
        let Self { device, decoder, batch, scratch, limits, .. } = self;
        let mut cx = Context { device, group: &mut self.group, kv: &mut self.kv, scratch };
        let mut results =
            self.sampler.as_mut().map(|sampler| Results::new(plan, sampler, &mut self.sequences));
        for (group, rows) in batch.wanted.chunks(self.logit_rows_max).enumerate() {
            let first = group * self.logit_rows_max;
            match are_there {
                true => cx.scratch.set_logit_rows(rows.len()),
                false => decoder.logits(&mut cx, &batch.batch, first, rows.len())?,
            }
            let Some(results) = &mut results else { continue };
            let answers = match &mut self.on_device {
                Some(room) => results.ask(cx.device, room, cx.scratch.logits_mut(), rows)?,
                None => vec![None; rows.len()],
            };
            // Read only where a row needs them.
            let logits = match answers.iter().any(Option::is_none) {
                true => cx.scratch.read_logits(cx.device)?,
                false => &[],
            };
            for (index, (&row, answer)) in rows.iter().zip(answers).enumerate() {
                match answer {
                    Some(answer) => results.answer(row, answer),
                    None => results.push(row, &logits[index * limits.vocab..][..limits.vocab]),
                }
            }
        }
        let nothing = || StepOutput { number: plan.number, ..StepOutput::default() };
        Ok(results.map_or_else(nothing, Results::finish))
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
