//! A plan as the device sees it.

use super::{RunnerOptions, RunningSequence};
use crate::{ModelError, rope};
use engine::plan::{BLOCK_TOKENS, Chunk, SequenceId, StepPlan, Tokens, Want};
use kernels::{Backend, Batch, KernelError};
use std::collections::HashMap;

/// A row whose logits are wanted, by its place in the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WantedRow {
    pub chunk: usize,
    /// Index in the chunk's tokens.
    pub token: usize,
}

/// Host buffers that a plan is laid out in, and the device's copy of them.
pub struct BatchBuilder<B: Backend> {
    pub batch: Batch<B>,
    /// One for each of the batch's `logit_rows`.
    pub wanted: Vec<WantedRow>,
    ids: Vec<i32>,
    positions: Vec<i32>,
    rope_rows: Vec<i32>,
    slots: Vec<i32>,
    row_starts: Vec<i32>,
    context_lens: Vec<i32>,
    block_tables: Vec<i32>,
    logit_rows: Vec<i32>,
    q_scale: Vec<f32>,
    /// The trained length of a model with logn attention.
    logn: Option<usize>,
}

impl<B: Backend> BatchBuilder<B> {
    pub fn new(
        device: &B,
        options: &RunnerOptions,
        logn: Option<usize>,
    ) -> Result<Self, ModelError> {
        let (tokens, sequences) = (options.step_tokens_max, options.sequences_max);
        let logn = logn.filter(|trained| *trained < options.context_max);
        let table_cols = options.context_max.div_ceil(BLOCK_TOKENS);
        let ints = |len: usize| device.ints(len);
        let batch = Batch {
            tokens: 0,
            sequences: 0,
            logit_rows_len: 0,
            ids: ints(tokens)?,
            positions: ints(tokens)?,
            rope_rows: ints(tokens)?,
            slots: ints(tokens)?,
            row_starts: ints(sequences + 1)?,
            context_lens: ints(sequences)?,
            block_tables: ints(sequences * table_cols)?,
            block_table_cols: table_cols,
            logit_rows: ints(tokens)?,
            q_scale: logn.map(|_| device.exact_floats(tokens)).transpose()?,
            cuts: device.cuts(tokens, sequences)?,
        };
        Ok(Self {
            batch,
            wanted: Vec::new(),
            ids: Vec::new(),
            positions: Vec::new(),
            rope_rows: Vec::new(),
            slots: Vec::new(),
            row_starts: Vec::new(),
            context_lens: Vec::new(),
            block_tables: Vec::new(),
            logit_rows: Vec::new(),
            q_scale: Vec::new(),
            logn,
        })
    }

    /// Lays out `plan`, which was checked and is taken over into `sequences`, and copies it to the
    /// device.
    pub fn fill(
        &mut self,
        device: &B,
        plan: &StepPlan,
        sequences: &HashMap<SequenceId, RunningSequence>,
    ) -> Result<(), ModelError> {
        self.clear();
        let cols = plan.chunks.iter().map(|c| c.end().div_ceil(BLOCK_TOKENS)).max().unwrap_or(0);
        for (index, chunk) in plan.chunks.iter().enumerate() {
            let sequence = sequences.get(&chunk.sequence).ok_or_else(|| ModelError::Plan {
                number: plan.number,
                reason: format!("sequence {} was never admitted", chunk.sequence),
            })?;
            self.row_starts.push(self.ids.len() as i32);
            self.push_tokens(index, chunk, sequence);
            self.context_lens.push(chunk.end() as i32);
            self.push_blocks(&sequence.blocks, cols);
        }
        self.row_starts.push(self.ids.len() as i32);
        self.batch.tokens = self.ids.len();
        self.batch.sequences = plan.chunks.len();
        self.batch.logit_rows_len = self.logit_rows.len();
        self.batch.block_table_cols = cols;
        Ok(self.upload(device)?)
    }

    fn clear(&mut self) {
        self.wanted.clear();
        self.q_scale.clear();
        for list in [
            &mut self.ids,
            &mut self.positions,
            &mut self.rope_rows,
            &mut self.slots,
            &mut self.row_starts,
            &mut self.context_lens,
            &mut self.block_tables,
            &mut self.logit_rows,
        ] {
            list.clear();
        }
    }

    fn push_tokens(&mut self, index: usize, chunk: &Chunk, sequence: &RunningSequence) {
        let last = [sequence.last.id()];
        let ids = match &chunk.tokens {
            Tokens::Known(ids) => ids,
            Tokens::LastSampled => &last[..],
        };
        for (token, &id) in ids.iter().enumerate() {
            let position = chunk.start + token;
            let block = sequence.blocks[position / BLOCK_TOKENS] as usize;
            if wanted(chunk, token) {
                self.logit_rows.push(self.ids.len() as i32);
                self.wanted.push(WantedRow { chunk: index, token });
            }
            self.ids.push(id as i32);
            self.positions.push(position as i32);
            self.rope_rows.push((sequence.rope_first_row + position) as i32);
            self.slots.push((block * BLOCK_TOKENS + position % BLOCK_TOKENS) as i32);
            self.q_scale.extend(self.logn.map(|trained| rope::logn(position, trained)));
        }
    }

    /// One row of the block table; its rest stays 0 and is never read.
    fn push_blocks(&mut self, blocks: &[u32], cols: usize) {
        let row_end = self.block_tables.len() + cols;
        self.block_tables.extend(blocks.iter().take(cols).map(|&block| block as i32));
        self.block_tables.resize(row_end, 0);
    }

    fn upload(&mut self, device: &B) -> Result<(), KernelError> {
        let batch = &mut self.batch;
        device.write_ints(&mut batch.ids, &self.ids)?;
        device.write_ints(&mut batch.positions, &self.positions)?;
        device.write_ints(&mut batch.rope_rows, &self.rope_rows)?;
        device.write_ints(&mut batch.slots, &self.slots)?;
        device.write_ints(&mut batch.row_starts, &self.row_starts)?;
        device.write_ints(&mut batch.context_lens, &self.context_lens)?;
        device.write_ints(&mut batch.block_tables, &self.block_tables)?;
        device.write_ints(&mut batch.logit_rows, &self.logit_rows)?;
        if let Some(q_scale) = &mut batch.q_scale {
            device.write_floats(q_scale, &self.q_scale)?;
        }
        device.cut(batch)
    }
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
