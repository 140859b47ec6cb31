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
    sampler::{Sampler, Seen, penalizes},
};
use batch::{BatchBuilder, WantedRow, wanted_rows};
use check::Limits;
use collective::Collective;
use engine::plan::{
    Admission, BLOCK_TOKENS, Chunk, SamplingParams, SequenceId, StepOutput, StepPlan, Tokens, Want,
};
use kernels::{Backend, BatchRoom, Heads};
use results::{Results, is_answered, samples};
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, VecDeque};

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

/// A plan that was launched, whose tokens come later.
struct Launched {
    plan: StepPlan,
    rows: Vec<WantedRow>,
}

/// A plan that was launched and not finished.
struct InFlight<B: Backend> {
    /// Behind its work; `None` where there is none.
    mark: Option<B::Mark>,
    /// `None` where `output` is all of it.
    launched: Option<Launched>,
    output: StepOutput,
}

impl<B: Backend> InFlight<B> {
    fn done(output: StepOutput) -> Self {
        Self { mark: None, launched: None, output }
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
                keeps_sampled: device.keeps_sampled(),
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
            in_flight: VecDeque::new(),
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

    /// Runs the next plan to its end. Every rank must be given the same one. The output means
    /// something on rank 0 only.
    ///
    /// # Errors
    /// As [`Self::launch`] and [`Self::finish`].
    pub fn step(&mut self, plan: &StepPlan) -> Result<StepOutput, ModelError> {
        self.launch(plan)?;
        self.finish()
    }

    /// Plans that were launched and not finished.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Whether a plan may follow one that is in flight: the device knows what it sampled.
    pub fn runs_ahead(&self) -> bool {
        self.device.keeps_sampled()
    }

    /// Whether `plan` can be launched while the one before it is in flight: whatever it goes on
    /// with is on the device.
    pub fn follows(&self, plan: &StepPlan) -> bool {
        self.runs_ahead() && self.is_on_device(plan)
    }

    /// Whether all that `plan` wants is chosen on the device, at once, and hangs on no token that
    /// the host does not know.
    fn is_on_device(&self, plan: &StepPlan) -> bool {
        let rows: usize = plan.chunks.iter().map(wanted_rows).sum();
        let answers = |chunk: &Chunk| {
            let admitted = chunk.admission.as_ref().map(|admission| &admission.params);
            let known = self.sequences.get(&chunk.sequence).map(|sequence| &sequence.params);
            let Some(params) = admitted.or(known) else { return false };
            let looks_back = chunk.tokens == Tokens::LastSampled && penalizes(params);
            wanted_rows(chunk) == 0 || (is_answered(chunk, params) && !looks_back)
        };
        let answered = self.sampler.is_none() || plan.chunks.iter().all(answers);
        rows <= self.logit_rows_max && answered
    }

    /// Begins to run the next plan.
    ///
    /// # Errors
    /// `Plan` for a plan that cannot be right, before anything is run; otherwise what failed of the
    /// device or the group, after which this rank is of no further use.
    pub fn launch(&mut self, plan: &StepPlan) -> Result<(), ModelError> {
        self.limits.check(plan, self.next_number, &self.sequences)?;
        if !self.in_flight.is_empty() && !self.follows(plan) {
            return Err(ModelError::Plan {
                number: plan.number,
                reason: "it follows another that is not finished".into(),
            });
        }
        let later = self.follows(plan);
        self.next_number += 1;
        self.update_sequences(plan);
        if plan.chunks.is_empty() {
            let output = StepOutput { number: plan.number, ..StepOutput::default() };
            self.in_flight.push_back(InFlight::done(output));
            return Ok(());
        }
        let rows = self.graph_rows(plan);
        let Self { device, batch, sequences, on_device, .. } = self;
        batch.prepare(plan, sequences, rows, device.keeps_sampled())?;
        let answered = match on_device {
            Some(room) => batch.ask(device, room, plan, sequences)?,
            None => vec![false; batch.wanted.len()],
        };
        batch.lay_out(device)?;
        self.forward(rows)?;
        let step = match later {
            true => self.sample(plan, rows.is_some())?,
            false => InFlight::done(self.read_logits(plan, &answered, rows.is_some())?),
        };
        self.share(plan)?;
        self.group.end_step(&self.device)?;
        let mark = Some(self.device.mark()?);
        self.in_flight.push_back(InFlight { mark, ..step });
        Ok(())
    }

    /// Waits for the oldest plan in flight.
    ///
    /// # Errors
    /// What failed of the device or the group, after which this rank is of no further use; `Plan`
    /// where none is in flight.
    pub fn finish(&mut self) -> Result<StepOutput, ModelError> {
        let none =
            || ModelError::Plan { number: self.next_number, reason: "no plan is in flight".into() };
        let InFlight { mark, launched, output } = self.in_flight.pop_front().ok_or_else(none)?;
        let Some(mark) = mark else { return Ok(output) };
        let Some(Launched { plan, rows }) = launched else {
            self.group.check(&self.device)?;
            self.device.wait(mark)?;
            return Ok(output);
        };
        // First: what the group knows explains why a device does not finish.
        self.group.check(&self.device)?;
        let answers = match &mut self.on_device {
            Some(room) if !rows.is_empty() => self.device.answers(room)?,
            _ => Vec::new(),
        };
        self.device.wait(mark)?;
        let Some(sampler) = &mut self.sampler else { return Ok(output) };
        let mut results = Results::new(&plan, sampler, &mut self.sequences);
        for (row, answer) in rows.into_iter().zip(answers) {
            results.answer(row, answer);
        }
        Ok(results.finish())
    }

    /// The layers; the logits of all rows too where the step is of a captured size.
    fn forward(&mut self, rows: Option<usize>) -> Result<(), ModelError> {
        let Self { device, group, kv, scratch, decoder, batch, .. } = self;
        let mut cx = Context { device: &*device, group, kv, scratch };
        let batch = &batch.batch;
        let Some(rows) = rows else { return decoder.forward(&mut cx, batch) };
        device.captured(rows, || {
            decoder.forward(&mut cx, batch)?;
            decoder.logits(&mut cx, batch, 0, rows)
        })
    }

    /// Begins to choose the tokens that are wanted, on rank 0.
    fn sample(&mut self, plan: &StepPlan, are_there: bool) -> Result<InFlight<B>, ModelError> {
        let Self { device, group, kv, scratch, decoder, batch, on_device, .. } = self;
        let rows = batch.wanted.clone();
        let mut cx = Context { device: &*device, group, kv, scratch };
        match are_there {
            true => cx.scratch.set_logit_rows(rows.len()),
            false if rows.is_empty() => {}
            false => decoder.logits(&mut cx, &batch.batch, 0, rows.len())?,
        }
        if let Some(room) = on_device.as_mut().filter(|_| !rows.is_empty()) {
            device.sample(&mut batch.batch, room, cx.scratch.logits_mut(), 0)?;
        }
        let output = StepOutput { number: plan.number, ..StepOutput::default() };
        Ok(InFlight { mark: None, launched: Some(Launched { plan: plan.clone(), rows }), output })
    }

    /// What rank 0 sampled reaches the other ranks' devices, where they keep it.
    fn share(&mut self, plan: &StepPlan) -> Result<(), ModelError> {
        let samples = plan.chunks.iter().any(samples);
        if !samples || !self.device.keeps_sampled() || self.limits.world_size == 1 {
            return Ok(());
        }
        Ok(self.group.share(&self.device, &mut self.batch.batch.last_ids)?)
    }

    /// The size to which `plan` is padded, where all it does is to sample a token of each sequence
    /// and the device captures such steps.
    fn graph_rows(&self, plan: &StepPlan) -> Option<usize> {
        let decodes = |chunk: &Chunk| chunk.tokens.len() == 1 && chunk.want == Want::Sample;
        let rows = self.device.graph_rows(plan.chunks.len())?;
        let exchanged = rows * self.scratch.hidden_cols();
        let fits = rows <= self.logit_rows_max && self.group.is_captured(exchanged);
        (fits && plan.chunks.iter().all(decodes)).then_some(rows)
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
                    &self.tables,
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

    /// Computes the wanted logits, unless they are there, some rows at a time, and turns them into
    /// results.
    fn read_logits(
        &mut self,
        plan: &StepPlan,
        answered: &[bool],
        are_there: bool,
    ) -> Result<StepOutput, ModelError> {
        let Self { device, decoder, batch, scratch, limits, .. } = self;
        let mut cx = Context { device, group: &mut self.group, kv: &mut self.kv, scratch };
        let mut results =
            self.sampler.as_mut().map(|sampler| Results::new(plan, sampler, &mut self.sequences));
        let wanted = batch.wanted.clone();
        for first in (0..wanted.len()).step_by(self.logit_rows_max) {
            let rows = &wanted[first..wanted.len().min(first + self.logit_rows_max)];
            match are_there {
                true => cx.scratch.set_logit_rows(rows.len()),
                false => decoder.logits(&mut cx, &batch.batch, first, rows.len())?,
            }
            let Some(results) = &mut results else { continue };
            let answered = &answered[first..][..rows.len()];
            let answers = match &mut self.on_device {
                Some(room) if answered.contains(&true) => {
                    device.sample(&mut batch.batch, room, cx.scratch.logits_mut(), first)?;
                    device.answers(room)?.into_iter().map(Some).collect()
                }
                _ => vec![None; rows.len()],
            };
            // Read only where a row needs them.
            let logits = match answered.contains(&false) {
                true => cx.scratch.read_logits(cx.device)?,
                false => &[],
            };
            for (index, (&row, answer)) in rows.iter().zip(answers).enumerate() {
                match answer.filter(|_| answered[index]) {
                    Some(answer) => results.answer(row, answer),
                    None => results.push(row, &logits[index * limits.vocab..][..limits.vocab]),
                }
            }
        }
        let Some(results) = results else {
            return Ok(StepOutput { number: plan.number, ..StepOutput::default() });
        };
        let output = results.finish();
        if device.keeps_sampled() {
            batch.tell(device, plan, &output)?;
        }
        Ok(output)
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
