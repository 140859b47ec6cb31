//! Attention over the paged cache: how a step is cut, and its launches.
//!
//! A sequence with one row decodes: its keys are cut into splits of `SPLIT_TOKENS`, whatever runs
//! beside it, whose sums are added in order. A sequence with more rows prefills: its rows are cut
//! into tiles of `TILE_ROWS`, and where they are one tile behind a long context, its keys into
//! spans. Cuts are made by `step.cu`. Kernels: `attention_decode.cu`, `attention_prefill.cu`,
//! `attention_prefill_sm90.cu`, `attention_combine.cu`.

mod decode;
mod prefill;

pub use prefill::PrefillKernel;
pub(super) use prefill::{Tiles, Tiling, tiles_max};

use super::{Cuda, CudaKv, Driver, Element, rope::Turn, step::check_laid_out};
use kernels::{Batch, BatchRoom, Heads, KernelError, ShapeError, Tensor, shape::ensure};

/// Keys that one block of the decode kernel looks at.
pub const SPLIT_TOKENS: usize = 512;
/// Rows of one sequence that one block of the prefill kernels works on.
pub const TILE_ROWS: usize = 128;

/// What a row's window is where there is none, and more than any position.
const UNBOUNDED: usize = 1 << 30;

const OP: &str = "attention";

/// Bytes of the workspace for sums of splits and of spans, which one launch after the other has for
/// itself: as decode wants, and at least those of the longest sequence that prefills.
pub(super) fn sums_bytes(room: &BatchRoom) -> usize {
    decode::sums_bytes(room).max(prefill::places_max(room).saturating_mul(place_bytes(room)))
}

/// A sum and two weights of every query head.
fn place_bytes(room: &BatchRoom) -> usize {
    let Heads { q, dim, .. } = room.heads;
    q * (dim + 2) * size_of::<f32>()
}

/// Places for sums of spans that there are.
pub(super) fn sums_places(room: &BatchRoom) -> usize {
    sums_bytes(room) / place_bytes(room)
}

/// One call.
pub(super) struct Call<'a, D: Driver> {
    pub qkv: &'a Tensor<Cuda<D>>,
    pub kv: &'a CudaKv<D>,
    pub batch: &'a Batch<Cuda<D>>,
    pub heads: Heads,
    pub window: Option<usize>,
    /// Where rows are as their product left them: they are turned and stored on the way.
    pub turn: Option<Turn>,
}

impl<D: Driver> Call<'_, D> {
    /// The batch is as it was laid out, and this cache has its blocks.
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
        check_laid_out(OP, self.batch)?;
        let blocks_end = self.batch.blocks_end;
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
        if call.batch.cuts.decodes {
            self.decode(out, call)?;
        }
        if !call.batch.cuts.prefills.is_empty() {
            self.prefill(out, call)?;
        }
        Ok(())
    }
}
