//! Attention over the paged cache: how a step is cut, and its launches.
//!
//! A sequence with one row decodes: its keys are cut into splits of `SPLIT_TOKENS`, whatever runs
//! beside it, and a second kernel combines the splits in order. A sequence with more rows
//! prefills: its rows are cut into tiles of `TILE_ROWS`. Kernels: `attention_decode.cu`,
//! `attention_combine.cu`, `attention_prefill.cu`, `attention_prefill_sm90.cu`.

mod decode;
mod prefill;

pub(super) use decode::sums_bytes;
pub use prefill::PrefillKernel;

use super::{Cuda, CudaKv, Driver, Element, Ints};
use kernels::{Batch, Heads, KernelError, ShapeError, Tensor, host, shape::ensure};

/// Keys that one block of the decode kernel looks at.
pub const SPLIT_TOKENS: usize = 512;
/// Rows of one sequence that one block of the prefill kernels works on.
pub const TILE_ROWS: usize = 128;

/// What a row's window is where there is none, and more than any position.
const UNBOUNDED: usize = 1 << 30;

const OP: &str = "attention";

/// One call.
pub(super) struct Call<'a, D: Driver> {
    pub qkv: &'a Tensor<Cuda<D>>,
    pub kv: &'a CudaKv<D>,
    pub batch: &'a Batch<Cuda<D>>,
    pub heads: Heads,
    pub window: Option<usize>,
}

/// The work of a step, the same in every layer.
pub struct Cuts<D: Driver> {
    /// Of the steps that there is room for.
    tokens_max: usize,
    sequences_max: usize,
    /// [tiles, 2]: sequence and its first row here, the longest contexts first.
    tiles: Ints<D>,
    tiles_len: usize,
    /// [splits, 3]: sequence, split, and where its sums go if it is one of several.
    splits: Ints<D>,
    splits_len: usize,
    /// [decoding, 3]: sequence, its number of splits, and where the first one's sums are; those
    /// with several splits come first.
    decoding: Ints<D>,
    decoding_len: usize,
    /// How many of `decoding` have several splits.
    divided_len: usize,
    /// Splits that leave sums.
    sums_len: usize,
    /// What the batch was when it was cut, its indices checked.
    of: Option<Stamp>,
}

/// Tells whether a batch is still the one that was cut, without reading its indices again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    tokens: usize,
    sequences: usize,
    block_table_cols: usize,
    /// Of row_starts, context_lens, block_tables and positions.
    writes: [u64; 4],
    /// One past the highest block that the sequences own.
    blocks_end: usize,
}

impl Stamp {
    fn of<D: Driver>(batch: &Batch<Cuda<D>>, blocks_end: usize) -> Self {
        let Batch { row_starts, context_lens, block_tables, positions, .. } = batch;
        Self {
            tokens: batch.tokens,
            sequences: batch.sequences,
            block_table_cols: batch.block_table_cols,
            writes: [row_starts, context_lens, block_tables, positions].map(Ints::last_write),
            blocks_end,
        }
    }
}

impl<D: Driver> Cuts<D> {
    pub(super) fn room(
        driver: &D,
        tokens_max: usize,
        sequences_max: usize,
    ) -> Result<Self, KernelError> {
        let ints = |len| Ints::zeroed(driver, len);
        let tiles = tokens_max.div_ceil(TILE_ROWS) + sequences_max;
        Ok(Self {
            tokens_max,
            sequences_max,
            tiles: ints(2 * tiles)?,
            tiles_len: 0,
            splits: ints(0)?,
            splits_len: 0,
            decoding: ints(3 * sequences_max)?,
            decoding_len: 0,
            divided_len: 0,
            sums_len: 0,
            of: None,
        })
    }
}

/// Bytes of [`Cuts`], at most: all sequences decode at the end of their context.
pub(super) fn cuts_bytes(tokens_max: usize, sequences_max: usize, context_max: usize) -> usize {
    let tiles = tokens_max.div_ceil(TILE_ROWS).saturating_add(sequences_max);
    let splits = sequences_max.saturating_mul(context_max.div_ceil(SPLIT_TOKENS));
    // Tiles have two numbers; splits and sequences three, with room for twice the splits.
    let [tiles, splits, decoding] = [(tiles, 2), (splits, 6), (sequences_max, 3)]
        .map(|(count, ints)| count.saturating_mul(ints * size_of::<i32>()));
    tiles.saturating_add(splits).saturating_add(decoding)
}

/// Makes the cuts of a batch, whose indices it checks.
pub(super) fn cut<D: Driver>(driver: &D, batch: &mut Batch<Cuda<D>>) -> Result<(), KernelError> {
    batch.cuts.of = None;
    let (tokens, sequences) = (batch.tokens, batch.sequences);
    let Cuts { tokens_max, sequences_max, .. } = batch.cuts;
    ensure(OP, tokens <= tokens_max && sequences <= sequences_max, || {
        format!(
            "a step of {tokens} tokens of {sequences} sequences, cuts have room for {tokens_max} \
             of {sequences_max}"
        )
    })?;
    let mut order: Vec<(usize, host::BatchSequence<'_>)> =
        host::sequences(batch, i32::MAX as usize)?.into_iter().enumerate().collect();
    let owned = order.iter().flat_map(|(_, sequence)| sequence.blocks);
    let blocks_end = owned.max().map_or(0, |&block| block as usize + 1);
    // The longest first: what is left for last is short.
    order.sort_by_key(|(_, s)| std::cmp::Reverse(s.start + s.rows.len()));
    let (mut tiles, mut splits, mut decoding) = (Vec::new(), Vec::new(), Vec::new());
    let (mut sums, mut divided) = (0, 0);
    for (index, sequence) in order {
        let rows = sequence.rows.len();
        if rows == 1 {
            let count = (sequence.start + 1).div_ceil(SPLIT_TOKENS);
            decoding.extend([index, count, sums]);
            splits.extend((0..count).flat_map(|split| [index, split, sums + split]));
            if count > 1 {
                divided += 1;
                sums += count;
            }
        } else {
            let firsts = (0..rows).step_by(TILE_ROWS).rev();
            tiles.extend(firsts.flat_map(|first| [index, sequence.rows.start + first]));
        }
    }
    let stamp = Stamp::of(batch, blocks_end);
    let ints = |values: Vec<usize>| values.into_iter().map(|v| v as i32).collect::<Vec<_>>();
    let (tiles, splits, decoding) = (ints(tiles), ints(splits), ints(decoding));
    let cuts = &mut batch.cuts;
    (cuts.tiles_len, cuts.splits_len) = (tiles.len() / 2, splits.len() / 3);
    (cuts.decoding_len, cuts.divided_len, cuts.sums_len) = (decoding.len() / 3, divided, sums);
    if splits.len() > cuts.splits.as_ref().len() {
        // Contexts grow: twice the need, so that few steps come here.
        cuts.splits = Ints::zeroed(driver, 2 * splits.len())?;
    }
    cuts.tiles.write(driver, &tiles)?;
    cuts.splits.write(driver, &splits)?;
    cuts.decoding.write(driver, &decoding)?;
    cuts.of = Some(stamp);
    Ok(())
}

impl<D: Driver> Call<'_, D> {
    /// Every index that the kernels follow was checked when the batch was cut: it is still that
    /// batch, and this cache has the blocks.
    fn check(&self, out: &Tensor<Cuda<D>>) -> Result<(), ShapeError> {
        let bf16 = |x: &Tensor<Cuda<D>>| x.data.element() == Element::Bf16;
        ensure(OP, bf16(out) && bf16(self.qkv), || "rows are not bf16".into())?;
        let dim = self.heads.dim;
        ensure(OP, dim == 64 || dim == 128, || {
            format!("head_dim {dim}: there are kernels for 64 and 128")
        })?;
        // Positions and their differences stay far from the ends of i32.
        let context_max = self.batch.block_table_cols.saturating_mul(kernels::BLOCK_TOKENS);
        ensure(OP, context_max <= UNBOUNDED, || {
            format!("block tables for {context_max} tokens, at most {UNBOUNDED} can be counted")
        })?;
        let cut = self.batch.cuts.of;
        let blocks_end = cut.map_or(0, |stamp| stamp.blocks_end);
        ensure(OP, cut == Some(Stamp::of(self.batch, blocks_end)), || {
            "the batch was written after it was cut, or never cut".into()
        })?;
        ensure(OP, blocks_end <= self.kv.blocks(), || {
            format!("block {} of a cache of {}", blocks_end - 1, self.kv.blocks())
        })
    }

    /// Keys that a row sees at most, itself included.
    fn keys_seen(&self) -> i32 {
        self.window.unwrap_or(UNBOUNDED).min(UNBOUNDED) as i32
    }
}

impl<D: Driver> Cuda<D> {
    pub(super) fn attend(
        &self,
        out: &mut Tensor<Self>,
        call: &Call<'_, D>,
    ) -> Result<(), KernelError> {
        call.check(out)?;
        if call.batch.cuts.decoding_len > 0 {
            self.decode(out, call)?;
        }
        if call.batch.cuts.tiles_len > 0 {
            self.prefill(out, call)?;
        }
        Ok(())
    }
}
