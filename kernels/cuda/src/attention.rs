//! Attention over the paged cache: how a step is cut, and its launches.
//!
//! A sequence with one row decodes: its keys are cut into splits of `SPLIT_TOKENS`, whatever runs
//! beside it, whose sums are added in order. A sequence with more rows prefills: its rows are cut
//! into tiles of `TILE_ROWS`. Cuts are made by `step.cu`. Kernels: `attention_decode.cu`,
//! `attention_prefill.cu`, `attention_prefill_sm90.cu`.

mod decode;
mod prefill;

pub(super) use decode::sums_bytes;
pub use prefill::PrefillKernel;

use super::{Cuda, CudaKv, Driver, Element, rope::Turn, step::check_laid_out};
use kernels::{Batch, Heads, KernelError, ShapeError, Tensor, shape::ensure};

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
        if call.batch.cuts.tiles_len > 0 {
            self.prefill(out, call)?;
        }
        Ok(())
    }
}
