//! A plan as the device sees it.

use super::{
    RunnerOptions, RunningSequence,
    tables::{Place, Tables},
};
use crate::{ModelError, rope};
use engine::plan::{Chunk, SequenceId, StepPlan, Tokens, Want};
use kernels::{Backend, Batch, Heads, Step, StepSequence, TableBlock};
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

    /// Lays out `plan`, which was checked and is taken over into `sequences`, padded to `rows` where
    /// that is some: then every row has logits.
    pub fn fill(
        &mut self,
        device: &B,
        plan: &StepPlan,
        sequences: &mut HashMap<SequenceId, RunningSequence>,
        rows: Option<usize>,
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
            self.push(index, chunk, sequence, place);
        }
        if let Some(rows) = rows {
            let used = self.step.ids.len();
            self.step.padding = rows.saturating_sub(used);
            self.step.logit_rows.extend((used..rows).map(|row| row as i32));
        }
        Ok(device.lay_out(&mut self.batch, &self.step)?)
    }

    fn push(
        &mut self,
        index: usize,
        chunk: &Chunk,
        sequence: &mut RunningSequence,
        Place { table, is_new }: Place,
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
        let last = [sequence.last.id()];
        let ids = match &chunk.tokens {
            Tokens::Known(ids) => ids,
            Tokens::LastSampled => &last[..],
        };
        for (token, &id) in ids.iter().enumerate() {
            if wanted(chunk, token) {
                step.logit_rows.push(step.ids.len() as i32);
                self.wanted.push(WantedRow { chunk: index, token });
            }
            step.ids.push(id as i32);
        }
    }
}

/// The factor on queries by position, where it is not 1 everywhere.
fn q_scales(options: &RunnerOptions, logn: Option<usize>) -> Option<Vec<f32>> {
    let trained = logn.filter(|trained| *trained < options.context_max)?;
    Some((0..options.context_max).map(|position| rope::logn(position, trained)).collect())
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
