//! A step as the host plans it, and as a device sees it.

use crate::{BLOCK_TOKENS, Backend, Heads, KernelError, ShapeError, Tensor, shape::ensure};

const OP: &str = "lay_out";

/// Stands for the id that was last sampled for the sequence, on devices that keep it
/// ([`Backend::keeps_sampled`]).
pub const LAST_SAMPLED: i32 = -1;

/// One sequence's part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepSequence {
    /// The row of the block tables that is its own while it runs.
    pub table: usize,
    /// Position of its first row: so many tokens are cached before.
    pub start: usize,
    /// At least 1.
    pub rows: usize,
    /// Row of the cos/sin table for its first row (a position, plus an offset for dynamic NTK).
    pub rope_start: usize,
}

impl StepSequence {
    /// Cached tokens once this step's are stored.
    pub fn context(&self) -> usize {
        self.start.saturating_add(self.rows)
    }
}

/// An entry that a block table gains. A table is filled from its start on; index 0 begins a new
/// one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableBlock {
    pub table: usize,
    pub index: usize,
    pub block: usize,
}

/// What a device needs to hear of a step: the rest it remembers or derives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// In the order of their rows.
    pub sequences: Vec<StepSequence>,
    /// Token ids of the sequences' rows; [`LAST_SAMPLED`] where the device knows it alone.
    pub ids: Vec<i32>,
    /// Rows behind those, which are nobody's: they fill a step up to a size that the device has
    /// seen before. What comes of them is undefined, and nothing of it is stored.
    pub padding: usize,
    pub new_blocks: Vec<TableBlock>,
    /// Rows whose logits are wanted.
    pub logit_rows: Vec<i32>,
}

impl Step {
    /// Rows, T.
    pub fn tokens(&self) -> usize {
        self.ids.len() + self.padding
    }

    /// Forgets everything, and keeps the memory.
    pub fn clear(&mut self) {
        self.sequences.clear();
        self.ids.clear();
        self.padding = 0;
        self.new_blocks.clear();
        self.logit_rows.clear();
    }
}

/// The largest steps that a batch is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchRoom {
    pub tokens: usize,
    pub sequences: usize,
    /// Rows of the block tables: sequences that are remembered from step to step.
    pub tables: usize,
    /// Tokens of one sequence.
    pub context: usize,
    /// Of attention.
    pub heads: Heads,
}

impl BatchRoom {
    /// Blocks of one sequence.
    pub fn table_cols(&self) -> usize {
        self.context.div_ceil(BLOCK_TOKENS)
    }
}

/// One step as the device sees it. Allocated once; [`Backend::lay_out`] overwrites the contents.
pub struct Batch<B: Backend> {
    /// T.
    pub tokens: usize,
    /// S.
    pub sequences: usize,
    /// Rows whose logits are wanted, R.
    pub logit_rows_len: usize,
    /// [T] token ids.
    pub ids: B::Ints,
    /// [T] position of each token in its sequence.
    pub positions: B::Ints,
    /// [T] row of the cos/sin table for each token (a position, plus an offset for dynamic NTK).
    pub rope_rows: B::Ints,
    /// One past the highest of `rope_rows`.
    pub rope_rows_end: usize,
    /// [T] where each token's K and V go: block · 16 + offset in the block; negative for padding.
    pub slots: B::Ints,
    /// [S + 1] first row of each sequence, then the row after the last.
    pub row_starts: B::Ints,
    /// [S] cached tokens of each sequence once this step's are stored: the last row's position + 1.
    pub context_lens: B::Ints,
    /// [S] the row of `block_tables` of each sequence.
    pub tables: B::Ints,
    /// [tables, block_table_cols] block ids; entries past a sequence's own are never read.
    pub block_tables: B::Ints,
    pub block_table_cols: usize,
    /// One past the highest block that was ever in a table.
    pub blocks_end: usize,
    /// [R] rows whose logits are wanted.
    pub logit_rows: B::Ints,
    /// [T] factor on the query of each token (logn attention), in f32; `None` is 1 everywhere.
    pub q_scale: Option<B::Floats>,
    /// [P] the same by position: what `q_scale` is made of.
    pub q_scales: Option<B::Floats>,
    /// [1, tables] the id that was last sampled for each table's sequence, as bits.
    pub last_ids: Tensor<B>,
    /// How the device cuts this step's attention.
    pub cuts: B::Cuts,
    pub room: BatchRoom,
    /// Entries of each table, as [`Self::begin`] counts them.
    pub filled: Vec<usize>,
}

impl<B: Backend> Batch<B> {
    /// An empty step. `q_scales` is the factor on queries by position.
    ///
    /// # Errors
    /// The device's own.
    pub fn new(device: &B, room: BatchRoom, q_scales: Option<&[f32]>) -> Result<Self, KernelError> {
        let BatchRoom { tokens, sequences, tables, context, .. } = room;
        let scales = q_scales.map_or(context, <[f32]>::len);
        ensure(OP, scales >= context, || format!("{scales} factors for {context} positions"))?;
        let ints = |len: usize| device.ints(len);
        let table = |values: &[f32]| -> Result<B::Floats, KernelError> {
            let mut floats = device.exact_floats(values.len())?;
            device.write_floats(&mut floats, values)?;
            Ok(floats)
        };
        Ok(Self {
            tokens: 0,
            sequences: 0,
            logit_rows_len: 0,
            ids: ints(tokens)?,
            positions: ints(tokens)?,
            rope_rows: ints(tokens)?,
            rope_rows_end: 0,
            slots: ints(tokens)?,
            row_starts: ints(sequences + 1)?,
            context_lens: ints(sequences)?,
            tables: ints(sequences)?,
            block_tables: ints(tables.saturating_mul(room.table_cols()))?,
            block_table_cols: room.table_cols(),
            blocks_end: 0,
            logit_rows: ints(tokens)?,
            q_scale: q_scales.map(|_| device.exact_floats(tokens)).transpose()?,
            q_scales: q_scales.map(table).transpose()?,
            last_ids: Tensor::exact_zeros(device, 1, tables)?,
            cuts: device.cuts(&room)?,
            room,
            filled: vec![0; tables],
        })
    }

    /// Takes over the sizes of `step`, whose every index is checked: first of all that a device
    /// does with it.
    ///
    /// # Errors
    /// Says what does not fit the room, or contradicts itself.
    pub fn begin(&mut self, step: &Step) -> Result<(), ShapeError> {
        let Step { sequences, ids, new_blocks, logit_rows, .. } = step;
        let (room, tokens) = (self.room, step.tokens());
        ensure(OP, tokens <= room.tokens && sequences.len() <= room.sequences, || {
            format!(
                "a step of {tokens} tokens of {} sequences, there is room for {} of {}",
                sequences.len(),
                room.tokens,
                room.sequences
            )
        })?;
        let rows: usize = sequences.iter().map(|sequence| sequence.rows).sum();
        ensure(OP, rows == ids.len(), || format!("{} ids for {rows} rows", ids.len()))?;
        new_blocks.iter().try_for_each(|block| self.take_block(*block))?;
        sequences.iter().try_for_each(|sequence| self.check_sequence(sequence))?;
        let outside = |row: &&i32| usize::try_from(**row).map_or(true, |row| row >= tokens);
        ensure(OP, logit_rows.len() <= room.tokens, || {
            format!("logits of {} rows, there is room for {}", logit_rows.len(), room.tokens)
        })?;
        if let Some(row) = logit_rows.iter().find(outside) {
            return ensure(OP, false, || format!("logit row {row} is outside 0..{tokens}"));
        }
        let rope_end = |sequence: &StepSequence| sequence.rope_start + sequence.rows;
        self.rope_rows_end = sequences.iter().map(rope_end).max().unwrap_or(1);
        (self.tokens, self.sequences) = (tokens, sequences.len());
        self.logit_rows_len = logit_rows.len();
        Ok(())
    }

    fn take_block(
        &mut self,
        TableBlock { table, index, block }: TableBlock,
    ) -> Result<(), ShapeError> {
        let cols = self.block_table_cols;
        let filled = self.filled.get_mut(table).filter(|filled| index <= **filled && index < cols);
        // Slots are numbered in 32 bits.
        let Some(filled) = filled.filter(|_| block < i32::MAX as usize / BLOCK_TOKENS) else {
            return ensure(OP, false, || {
                format!("block {block} as entry {index} of table {table} of {cols} blocks")
            });
        };
        *filled = index + 1;
        self.blocks_end = self.blocks_end.max(block + 1);
        Ok(())
    }

    fn check_sequence(&self, sequence: &StepSequence) -> Result<(), ShapeError> {
        let StepSequence { table, rows, rope_start, .. } = *sequence;
        let (context, blocks) = (sequence.context(), self.filled.get(table).copied());
        ensure(OP, rows > 0, || "a sequence without rows".into())?;
        let has = blocks.is_some_and(|blocks| context <= blocks * BLOCK_TOKENS);
        ensure(OP, has && context <= self.room.context, || {
            format!(
                "{context} tokens of at most {} in {} blocks of table {table}",
                self.room.context,
                blocks.unwrap_or(0)
            )
        })?;
        ensure(OP, rope_start.saturating_add(rows) <= i32::MAX as usize, || {
            format!("row {rope_start} of a cos/sin table")
        })
    }
}
