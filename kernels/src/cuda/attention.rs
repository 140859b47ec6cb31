//! Attention over the paged cache: how a step is cut, and its launches.
//!
//! A sequence with one row decodes: its keys are cut into splits of `SPLIT_TOKENS`, whatever runs
//! beside it, and a second kernel combines the splits in order. A sequence with more rows
//! prefills: its rows are cut into tiles of `TILE_ROWS`. Kernels: `attention_decode.cu`,
//! `attention_prefill.cu`, `attention_prefill_sm90.cu`.

use super::{Cuda, CudaKv, Driver, Ints};
use crate::{Batch, Heads, KernelError, Tensor, host};

/// Keys that one block of the decode kernel looks at.
pub const SPLIT_TOKENS: usize = 512;
/// Rows of one sequence that one block of the prefill kernels works on.
pub const TILE_ROWS: usize = 128;

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
    /// [tiles, 2]: sequence and its first row here, the longest contexts first.
    pub(super) tiles: Ints<D>,
    pub(super) tiles_len: usize,
    /// [splits, 3]: sequence, split, and where its sums go.
    pub(super) splits: Ints<D>,
    pub(super) splits_len: usize,
    /// [decoding, 3]: sequence, its number of splits, and where the first one's sums are.
    pub(super) decoding: Ints<D>,
    pub(super) decoding_len: usize,
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
            tiles: ints(2 * tiles)?,
            tiles_len: 0,
            splits: ints(0)?,
            splits_len: 0,
            decoding: ints(3 * sequences_max)?,
            decoding_len: 0,
        })
    }
}

/// Makes the cuts of a batch, whose indices it checks.
pub(super) fn cut<D: Driver>(driver: &D, batch: &mut Batch<Cuda<D>>) -> Result<(), KernelError> {
    let mut order: Vec<(usize, host::Sequence<'_>)> =
        host::sequences(batch, i32::MAX as usize)?.into_iter().enumerate().collect();
    // The longest first: what is left for last is short.
    order.sort_by_key(|(_, s)| std::cmp::Reverse(s.start + s.rows.len()));
    let (mut tiles, mut splits, mut decoding) = (Vec::new(), Vec::new(), Vec::new());
    let mut sums = 0;
    for (index, sequence) in order {
        let rows = sequence.rows.len();
        if rows == 1 {
            let count = (sequence.start + 1).div_ceil(SPLIT_TOKENS);
            decoding.extend([index, count, sums]);
            splits.extend((0..count).flat_map(|split| [index, split, sums + split]));
            sums += count;
        } else {
            let firsts = (0..rows).step_by(TILE_ROWS).rev();
            tiles.extend(firsts.flat_map(|first| [index, sequence.rows.start + first]));
        }
    }
    let ints = |values: Vec<usize>| values.into_iter().map(|v| v as i32).collect::<Vec<_>>();
    let (tiles, splits, decoding) = (ints(tiles), ints(splits), ints(decoding));
    let cuts = &mut batch.cuts;
    (cuts.tiles_len, cuts.splits_len) = (tiles.len() / 2, splits.len() / 3);
    cuts.decoding_len = decoding.len() / 3;
    if splits.len() > cuts.splits.as_ref().len() {
        // Contexts grow: twice the need, so that few steps come here.
        cuts.splits = Ints::zeroed(driver, 2 * splits.len())?;
    }
    cuts.tiles.write(driver, &tiles)?;
    cuts.splits.write(driver, &splits)?;
    cuts.decoding.write(driver, &decoding)
}

impl<D: Driver> Cuda<D> {
    pub(super) fn attend(
        &self,
        _out: &mut Tensor<Self>,
        _call: &Call<'_, D>,
    ) -> Result<(), KernelError> {
        Err(KernelError::Device("no kernel yet".into()))
    }
}
