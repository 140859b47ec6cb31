//! A plan as the device sees it.

use super::{
    RunnerOptions, RunningSequence,
    results::{request, samples},
    tables::{Place, Tables},
};
use crate::{ModelError, rope};
use engine::plan::{Chunk, SequenceId, StepOutput, StepPlan, Tokens, Want};
use kernels::{
    Backend, Batch, Heads, LAST_SAMPLED, Step, StepSequence, TableBlock,
    sampling::{SampleRequest, Wanted},
};
use std::collections::HashMap;

/// A row whose logits are wanted, by its place in the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WantedRow {
    pub chunk: usize,
    /// Index in the chunk's tokens.
    pub token: usize,
}

/// Plans as the device sees them.
pub struct BatchBuilder<B: Backend> {
    pub batch: Batch<B>,
    /// One for each of the batch's `logit_rows`.
    pub wanted: Vec<WantedRow>,
    step: Step,
    tables: Tables,
}

impl<B: Backend> BatchBuilder<B> {
    /// For `heads` of attention; `logn` is the trained length of a model with logn attention.
    pub fn new(
        device: &B,
        options: &RunnerOptions,
        heads: Heads,
        logn: Option<usize>,
    ) -> Result<Self, ModelError> {
        let room = options.room(heads);
        let q_scales = q_scales(options, logn);
        Ok(Self {
            batch: Batch::new(device, room, q_scales.as_deref())?,
            wanted: Vec::new(),
            step: Step::default(),
            tables: Tables::new(room.tables),
        })
    }

    /// Takes over `plan`, which was checked and is in `sequences`, padded to `rows` where that is
    /// some: then every row has logits. Where the device `keeps` what it samples, it is not told.
    pub fn prepare(
        &mut self,
        plan: &StepPlan,
        sequences: &mut HashMap<SequenceId, RunningSequence>,
        rows: Option<usize>,
        keeps: bool,
    ) -> Result<(), ModelError> {
        self.wanted.clear();
        self.step.clear();
        let refused = |reason: String| ModelError::Plan { number: plan.number, reason };
        let places = self.tables.places(plan);
        let places = places.ok_or_else(|| refused("more sequences than block tables".into()))?;
        for (index, (chunk, place)) in plan.chunks.iter().zip(places).enumerate() {
            let sequence = sequences.get_mut(&chunk.sequence);
            let sequence = sequence.ok_or_else(|| {
                refused(format!("sequence {} was never admitted", chunk.sequence))
            })?;
            let last = if keeps { LAST_SAMPLED } else { sequence.last as i32 };
            self.push((index, chunk), sequence, place, last);
        }
        if let Some(rows) = rows {
            let used = self.step.ids.len();
            self.step.padding = rows.saturating_sub(used);
            self.step.logit_rows.extend((used..rows).map(|row| row as i32));
        }
        Ok(())
    }

    /// Asks the device about every wanted row that it can answer; which ones.
    pub fn ask(
        &mut self,
        device: &B,
        room: &mut B::Sampling,
        plan: &StepPlan,
        sequences: &HashMap<SequenceId, RunningSequence>,
    ) -> Result<Vec<bool>, ModelError> {
        // Every row is asked something; of those that the host reads, as little as can be.
        const NOTHING: SampleRequest<'_> =
            SampleRequest { wanted: Wanted::Token(0), logprobs: None };
        let requests = self.wanted.iter().map(|row| request(plan, *row, sequences));
        let requests: Vec<_> = requests.collect();
        let answered: Vec<bool> = requests.iter().map(Option::is_some).collect();
        if !answered.contains(&true) {
            return Ok(answered);
        }
        let asked = requests.into_iter().zip(&self.wanted).map(|(request, row)| {
            let chunk = &plan.chunks[row.chunk];
            let is_new = samples(chunk) && row.token + 1 == chunk.tokens.len();
            let table = is_new.then(|| self.step.sequences[row.chunk].table);
            (request.unwrap_or(NOTHING), table)
        });
        let asked: Vec<_> = asked.collect();
        device.ask(&mut self.batch, room, &asked)?;
        Ok(answered)
    }

    pub fn lay_out(&mut self, device: &B) -> Result<(), ModelError> {
        Ok(device.lay_out(&mut self.batch, &self.step)?)
    }

    /// Tells the device what the host has sampled of this step.
    pub fn tell(
        &mut self,
        device: &B,
        plan: &StepPlan,
        output: &StepOutput,
    ) -> Result<(), ModelError> {
        let mut ids = vec![0.0; self.batch.last_ids.cols];
        for (id, sampled) in &output.sampled {
            if let Some(chunk) = plan.chunks.iter().position(|chunk| chunk.sequence == *id) {
                ids[self.step.sequences[chunk].table] = f32::from_bits(sampled.token);
            }
        }
        Ok(device.write_floats(&mut self.batch.last_ids.data, &ids)?)
    }

    fn push(
        &mut self,
        (index, chunk): (usize, &Chunk),
        sequence: &mut RunningSequence,
        Place { table, is_new }: Place,
        last: i32,
    ) {
        if is_new {
            sequence.blocks_told = 0;
        }
        let step = &mut self.step;
        let (start, rows) = (chunk.start, chunk.tokens.len());
        let rope_start = sequence.rope_first_row + start;
        step.sequences.push(StepSequence { table, start, rows, rope_start });
        let new = sequence.blocks.iter().enumerate().skip(sequence.blocks_told);
        step.new_blocks.extend(new.map(|(index, &block)| TableBlock {
            table,
            index,
            block: block as usize,
        }));
        sequence.blocks_told = sequence.blocks.len();
        for token in 0..rows {
            if wanted(chunk, token) {
                step.logit_rows.push((step.ids.len() + token) as i32);
                self.wanted.push(WantedRow { chunk: index, token });
            }
        }
        match &chunk.tokens {
            Tokens::Known(ids) => step.ids.extend(ids.iter().map(|&id| id as i32)),
            Tokens::LastSampled => step.ids.push(last),
        }
    }
}

/// The factor on queries by position, where it is not 1 everywhere.
fn q_scales(options: &RunnerOptions, logn: Option<usize>) -> Option<Vec<f32>> {
    let trained = logn.filter(|trained| *trained < options.context_max)?;
    Some((0..options.context_max).map(|position| rope::logn(position, trained)).collect())
}

/// Rows of `chunk` whose logits are wanted.
pub fn wanted_rows(chunk: &Chunk) -> usize {
    (0..chunk.tokens.len()).filter(|token| wanted(chunk, *token)).count()
}

/// Whether the logits after `token` of `chunk` are wanted.
pub fn wanted(chunk: &Chunk, token: usize) -> bool {
    let last = token + 1 == chunk.tokens.len();
    match chunk.want {
        Want::Nothing => false,
        Want::Sample => last,
        Want::Score { sample } => !last || sample || chunk.next.is_some(),
        Want::Logits => true,
    }
}
