//! A step on the device: one copy from the host, of which `step.cu` makes the rest. Block tables
//! stay there from step to step.

use super::{
    Array, Cuda, Driver, Ints, Launch,
    attention::{SPLIT_TOKENS, Tiles, Tiling, sums_bytes, sums_places, tiles_max},
    sampling::ALONG_BYTES,
};
use kernels::{
    BLOCK_TOKENS, Batch, BatchRoom, KernelError, ShapeError, Step, StepSequence, TableBlock,
    shape::ensure,
};
use std::{collections::HashMap, sync::PoisonError};

/// Bytes read behind a step's work, to know that it is done.
pub(super) const END_BYTES: usize = 4;

const OP: &str = "lay_out";
const THREADS: u32 = 256;
/// Integers of a sequence, of a new block and of work in what the host sends.
const SEQUENCE: usize = 4;
const NEW_BLOCK: usize = 2;
const WORK: usize = 2;
/// Of a tile, as it is derived.
const TILE: usize = 4;

/// The attention of a step, the same in every layer, and what it is made of.
pub struct Cuts<D: Driver> {
    /// What the host sends.
    input: Array<D>,
    /// The same on the host.
    words: Vec<i32>,
    /// What goes along: it is not this room's affair.
    along: Vec<u8>,
    /// [splits, 3]: sequence, split, item of the sequence's first split.
    pub(super) splits: Ints<D>,
    /// [1] of them.
    pub(super) splits_count: Ints<D>,
    /// [sequences, query heads]: splits that are done. Kernels leave zeros.
    pub(super) arrivals: Ints<D>,
    /// [tiles, 4]: sequence, its first row here, span of its keys, place of its sums; the longest
    /// contexts first.
    pub(super) tiles: Ints<D>,
    pub(super) prefills: Vec<Tiles>,
    /// Whether a sequence has one row.
    pub(super) decodes: bool,
    /// Whether decode attention turns and stores rows: all sequences have one, and none sees what
    /// another stores.
    pub(super) fused: bool,
    /// Sizes of the batch that was laid out, so that another is refused.
    of: Option<(usize, usize)>,
}

/// Bounds of a step's work.
struct Bounds {
    words: usize,
    splits: usize,
    tiles: usize,
    arrivals: usize,
}

impl Bounds {
    fn of(room: &BatchRoom) -> Self {
        let BatchRoom { tokens, sequences, tables, heads, .. } = *room;
        let blocks = tables.saturating_mul(room.table_cols());
        // Each part starts at 16 bytes.
        let parts = [
            sequences.saturating_mul(SEQUENCE),
            tokens,
            blocks.saturating_mul(NEW_BLOCK),
            tokens,
            sequences * WORK,
            sequences * Tiling::WORDS,
        ];
        Self {
            words: parts.into_iter().fold(0, |all, part| all.saturating_add(aligned(part))),
            splits: splits_max(room),
            tiles: tiles_max(room),
            arrivals: sequences.saturating_mul(heads.q),
        }
    }
}

/// All sequences decode at the end of their context.
pub(super) fn splits_max(room: &BatchRoom) -> usize {
    room.sequences.saturating_mul(room.context.div_ceil(SPLIT_TOKENS))
}

fn aligned_bytes(bytes: usize) -> usize {
    bytes.next_multiple_of(16)
}

/// To whole pieces of 16 bytes.
fn aligned(words: usize) -> usize {
    words.checked_next_multiple_of(4).unwrap_or(usize::MAX)
}

impl<D: Driver> Cuts<D> {
    pub(super) fn room(device: &Cuda<D>, room: &BatchRoom) -> Result<Self, KernelError> {
        let driver = device.driver();
        let Bounds { words, splits, tiles, arrivals } = Bounds::of(room);
        let ints = |len: usize| Ints::zeroed(driver, len);
        // At its largest at once: it keeps its place.
        device.workspace(sums_bytes(room))?;
        Ok(Self {
            input: Array::zeroed(driver, "a step", input_bytes(words))?,
            words: Vec::new(),
            along: Vec::new(),
            splits: ints(splits.saturating_mul(3))?,
            splits_count: ints(1)?,
            arrivals: ints(arrivals)?,
            tiles: ints(tiles.saturating_mul(TILE))?,
            prefills: Vec::new(),
            decodes: false,
            fused: false,
            of: None,
        })
    }

    /// Sends up to [`ALONG_BYTES`] with the next step; says where they will be.
    pub(super) fn take_along(&mut self, driver: &D, bytes: &[u8]) -> u64 {
        self.along = bytes.to_vec();
        self.input.address(driver)
    }

    /// Appends a part and says where it begins, in integers.
    fn push(&mut self, part: impl IntoIterator<Item = i32>) -> usize {
        let start = aligned(self.words.len());
        self.words.resize(start, 0);
        self.words.extend(part);
        start
    }
}

/// Of what the host sends: the step, behind what goes along.
fn input_bytes(words: usize) -> usize {
    words.saturating_mul(size_of::<i32>()).saturating_add(ALONG_BYTES)
}

/// Bytes of [`Cuts`].
pub(super) fn cuts_bytes(room: &BatchRoom) -> usize {
    let Bounds { words, splits, tiles, arrivals } = Bounds::of(room);
    let parts = [splits.saturating_mul(3), 1, arrivals, tiles.saturating_mul(TILE)];
    let ints = parts.into_iter().fold(0, usize::saturating_add);
    ints.saturating_mul(size_of::<i32>()).saturating_add(input_bytes(words))
}

/// Where work begins, for the kernels: sequences, each with the number of its first item.
#[derive(Default)]
struct Work {
    words: Vec<i32>,
    items: usize,
}

impl Work {
    fn push(&mut self, sequence: usize, items: usize) {
        self.words.extend([sequence as i32, self.items as i32]);
        self.items += items;
    }
}

/// The splits of sequences with one row and the tiles of the others, the longest contexts first:
/// what is left for last is short.
fn work(sequences: &[StepSequence], room: &BatchRoom) -> (Work, Tiling) {
    let (mut decoding, mut prefilling) = (Work::default(), Tiling::default());
    let places = sums_places(room);
    let mut order: Vec<_> = sequences.iter().enumerate().collect();
    order.sort_by_key(|(_, sequence)| std::cmp::Reverse(sequence.context()));
    for (index, sequence) in order {
        match sequence.rows {
            1 => decoding.push(index, sequence.context().div_ceil(SPLIT_TOKENS)),
            _ => prefilling.push(index, sequence, places),
        }
    }
    (decoding, prefilling)
}

/// Whether a sequence with one row may see a block that is filled in this very step: then it came
/// to its blocks just now, and they are more than the one of its row.
fn may_share(step: &Step) -> bool {
    let mut rows = HashMap::new();
    let one = step.sequences.iter().filter(|sequence| sequence.rows == 1);
    rows.extend(one.map(|sequence| (sequence.table, sequence.start / BLOCK_TOKENS)));
    let before = |new: &TableBlock| rows.get(&new.table).is_some_and(|&own| new.index < own);
    step.new_blocks.iter().any(before)
}

#[repr(C)]
#[derive(Clone, Copy)]
struct StepArgs {
    sequences: u64,
    ids: u64,
    new_blocks: u64,
    wanted: u64,
    decoding: u64,
    prefilling: u64,
    q_scales: u64,
    last_ids: u64,
    out_ids: u64,
    positions: u64,
    rope_rows: u64,
    slots: u64,
    q_scale: u64,
    row_starts: u64,
    context_lens: u64,
    tables: u64,
    block_tables: u64,
    logit_rows: u64,
    splits: u64,
    tiles: u64,
    splits_count: u64,
    sequences_len: i32,
    rows: i32,
    tokens: i32,
    new_blocks_len: i32,
    logit_rows_len: i32,
    decoding_len: i32,
    splits_len: i32,
    prefilling_len: i32,
    tiles_len: i32,
    table_cols: i32,
}

impl<D: Driver> Cuda<D> {
    /// A point behind all work so far: where [`END_BYTES`] are read.
    pub(super) fn end_of_work(&self) -> Result<D::Reading, KernelError> {
        let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        let place = match end.take() {
            Some(place) => place,
            None => Array::zeroed(&self.driver, "the end of a step", END_BYTES)?,
        };
        let reading = self.driver.begin_read(&place.memory, 0, END_BYTES)?;
        *end = Some(place);
        Ok(reading)
    }

    /// Makes the batch what `step` says.
    pub(super) fn begin_step(
        &self,
        batch: &mut Batch<Self>,
        step: &Step,
    ) -> Result<(), KernelError> {
        batch.cuts.of = None;
        batch.begin(step)?;
        let (decoding, prefilling) = work(&step.sequences, &batch.room);
        let items = decoding.items.max(prefilling.items);
        ensure(OP, items <= i32::MAX as usize, || format!("{items} pieces of attention"))?;
        let args = self.step_args(batch, step, (&decoding, &prefilling));
        let cuts = &mut batch.cuts;
        let mut bytes = std::mem::take(&mut cuts.along);
        bytes.resize(aligned_bytes(bytes.len()), 0);
        bytes.extend(cuts.words.iter().flat_map(|word| word.to_le_bytes()));
        cuts.input.write(&self.driver, &bytes)?;
        let launch = |kernel, items: usize| {
            let blocks = items.div_ceil(THREADS as usize) as u32;
            self.driver.launch(Launch::new(kernel, [blocks, 1, 1], THREADS, &args))
        };
        if !step.new_blocks.is_empty() {
            launch("step_tables", step.new_blocks.len())?;
        }
        let most = [step.tokens(), step.sequences.len() + 1, step.logit_rows.len(), items];
        launch("step_rows", most.into_iter().max().unwrap_or(1))?;
        batch.cuts.prefills = prefilling.launches;
        batch.cuts.decodes = decoding.items > 0;
        batch.cuts.fused = decoding.items > 0 && prefilling.items == 0 && !may_share(step);
        batch.cuts.of = Some((batch.tokens, batch.sequences));
        Ok(())
    }

    /// Packs what the host sends, and says where everything is.
    fn step_args(
        &self,
        batch: &mut Batch<Self>,
        step: &Step,
        (decoding, prefilling): (&Work, &Tiling),
    ) -> StepArgs {
        let cols = batch.block_table_cols;
        let cuts = &mut batch.cuts;
        cuts.words.clear();
        let mut row = 0;
        let sequences = step.sequences.iter().flat_map(|sequence| {
            let words = [row, sequence.start, sequence.rope_start, sequence.table];
            row += sequence.rows;
            words.map(|word| word as i32)
        });
        let new_blocks = step
            .new_blocks
            .iter()
            .flat_map(|new| [(new.table * cols + new.index) as i32, new.block as i32]);
        let starts = [
            cuts.push(sequences),
            cuts.push(step.ids.iter().copied()),
            cuts.push(new_blocks),
            cuts.push(step.logit_rows.iter().copied()),
            cuts.push(decoding.words.iter().copied()),
            cuts.push(prefilling.words.iter().copied()),
        ];
        let driver = &self.driver;
        let input = batch.cuts.input.address(driver) + aligned_bytes(batch.cuts.along.len()) as u64;
        let [sequences, ids, new_blocks, wanted, decodes, prefills] =
            starts.map(|start| input + (start * size_of::<i32>()) as u64);
        let at = |ints: &Ints<D>| ints.address(driver);
        let floats = |floats: &Option<super::Floats<D>>| {
            floats.as_ref().map_or(0, |floats| floats.address(driver))
        };
        StepArgs {
            sequences,
            ids,
            new_blocks,
            wanted,
            decoding: decodes,
            prefilling: prefills,
            q_scales: floats(&batch.q_scales),
            last_ids: self.at(&batch.last_ids),
            out_ids: at(&batch.ids),
            positions: at(&batch.positions),
            rope_rows: at(&batch.rope_rows),
            slots: at(&batch.slots),
            q_scale: floats(&batch.q_scale),
            row_starts: at(&batch.row_starts),
            context_lens: at(&batch.context_lens),
            tables: at(&batch.tables),
            block_tables: at(&batch.block_tables),
            logit_rows: at(&batch.logit_rows),
            splits: at(&batch.cuts.splits),
            tiles: at(&batch.cuts.tiles),
            splits_count: at(&batch.cuts.splits_count),
            sequences_len: step.sequences.len() as i32,
            rows: step.ids.len() as i32,
            tokens: step.tokens() as i32,
            new_blocks_len: step.new_blocks.len() as i32,
            logit_rows_len: step.logit_rows.len() as i32,
            decoding_len: (decoding.words.len() / WORK) as i32,
            splits_len: decoding.items as i32,
            prefilling_len: (prefilling.words.len() / Tiling::WORDS) as i32,
            tiles_len: prefilling.items as i32,
            table_cols: cols as i32,
        }
    }
}

/// Every index that kernels follow was checked when the batch was laid out: it is still that one.
pub(super) fn check_laid_out<D: Driver>(
    op: &'static str,
    batch: &Batch<Cuda<D>>,
) -> Result<(), ShapeError> {
    ensure(op, batch.cuts.of == Some((batch.tokens, batch.sequences)), || {
        "the batch was changed after it was laid out, or never laid out".into()
    })
}
