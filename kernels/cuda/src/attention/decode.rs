//! Sequences with one row: splits of the context, then their sum. Kernels: `attention_decode.cu`,
//! `attention_combine.cu`.

use super::{Call, SPLIT_TOKENS};
use crate::{Cuda, Driver, KvFormat, Launch};
use kernels::{Heads, KernelError, Tensor};

/// Threads in a block of both kernels, and its warps.
const THREADS: u32 = 128;
const WARPS: usize = 4;
/// Query heads of one key head that one block works on.
const TILE_HEADS: usize = 16;

#[repr(C)]
#[derive(Clone, Copy)]
struct DecodeArgs {
    qkv: u64,
    out: u64,
    keys: u64,
    values: u64,
    splits: u64,
    row_starts: u64,
    context_lens: u64,
    block_tables: u64,
    sums: u64,
    weights: u64,
    score_scale: f32,
    value_scale: f32,
    qkv_cols: i32,
    q_heads: i32,
    kv_heads: i32,
    table_cols: i32,
    group: i32,
    window: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CombineArgs {
    out: u64,
    sums: u64,
    weights: u64,
    decoding: u64,
    row_starts: u64,
    context_lens: u64,
    q_heads: i32,
    window: i32,
}

/// The kernel for heads and a cache of this kind, and its bytes of shared memory: tiles of K and V
/// for each warp, over which the warps then merge what they have.
fn kernel(dim: usize, format: KvFormat) -> (&'static str, usize) {
    // Stages, and floats between the rows of heads.
    let (name, stages, gap) = match (dim, format) {
        (64, KvFormat::Bf16) => ("attention_decode_d64_bf16", 4, 8),
        (64, KvFormat::Fp8) => ("attention_decode_d64_fp8", 4, 16),
        (_, KvFormat::Bf16) => ("attention_decode_d128_bf16", 2, 8),
        (_, KvFormat::Fp8) => ("attention_decode_d128_fp8", 4, 16),
    };
    let ring = stages * 2 * kernels::BLOCK_TOKENS * dim * format.element_bytes();
    let merged = TILE_HEADS * (dim + gap + 2) * size_of::<f32>();
    (name, WARPS * ring.max(merged))
}

/// Bytes that splits leave for their sum, where sequences that may be that long all decode.
pub(crate) fn sums_bytes(
    sequences_max: usize,
    context_max: usize,
    Heads { q, dim, .. }: Heads,
) -> usize {
    match context_max.div_ceil(SPLIT_TOKENS) {
        // One split has nothing to be summed with.
        0 | 1 => 0,
        splits => {
            let bytes = split_sums(q, dim) * size_of::<f32>();
            sequences_max.saturating_mul(splits).saturating_mul(bytes)
        }
    }
}

/// Numbers that one split leaves: a sum and two weights of every query head.
fn split_sums(q: usize, dim: usize) -> usize {
    q * (dim + 2)
}

impl<D: Driver> Cuda<D> {
    pub(super) fn decode(
        &self,
        out: &mut Tensor<Self>,
        call: &Call<'_, D>,
    ) -> Result<(), KernelError> {
        let (cuts, Heads { q, kv, dim }) = (&call.batch.cuts, call.heads);
        // Sums of every split and query head, then the weights beside them.
        let sums_len = cuts.sums_len * q * dim;
        let all_len = cuts.sums_len * split_sums(q, dim);
        let sums = self.workspace(all_len * size_of::<f32>())?;
        let weights = sums + (sums_len * size_of::<f32>()) as u64;
        let args = self.decode_args(out, call, (sums, weights));
        let (name, shared) = kernel(dim, call.kv.format());
        let grid = [cuts.splits_len as u32, kv as u32, (q / kv).div_ceil(TILE_HEADS) as u32];
        self.driver.launch(Launch::new(name, grid, THREADS, &args).shared(shared as u32))?;
        if cuts.divided_len == 0 {
            return Ok(());
        }
        let name = if dim == 64 { "attention_combine_d64" } else { "attention_combine_d128" };
        let args = CombineArgs {
            out: args.out,
            sums,
            weights,
            decoding: cuts.decoding.address(&self.driver),
            row_starts: args.row_starts,
            context_lens: args.context_lens,
            q_heads: args.q_heads,
            window: args.window,
        };
        let shared = (WARPS * dim * size_of::<f32>()) as u32;
        let grid = [cuts.divided_len as u32, q as u32, 1];
        self.driver.launch(Launch::new(name, grid, THREADS, &args).shared(shared))
    }

    fn decode_args(
        &self,
        out: &Tensor<Self>,
        call: &Call<'_, D>,
        (sums, weights): (u64, u64),
    ) -> DecodeArgs {
        let Call { qkv, batch, kv, heads, .. } = *call;
        let driver = &self.driver;
        DecodeArgs {
            qkv: self.at(qkv),
            out: self.at(out),
            keys: kv.keys().address(driver),
            values: kv.values().address(driver),
            splits: batch.cuts.splits.address(driver),
            row_starts: batch.row_starts.address(driver),
            context_lens: batch.context_lens.address(driver),
            block_tables: batch.block_tables.address(driver),
            sums,
            weights,
            score_scale: std::f32::consts::LOG2_E / (heads.dim as f32).sqrt() * kv.key_scale(),
            value_scale: kv.value_scale(),
            qkv_cols: qkv.cols as i32,
            q_heads: heads.q as i32,
            kv_heads: heads.kv as i32,
            table_cols: batch.block_table_cols as i32,
            group: (heads.q / heads.kv) as i32,
            window: call.keys_seen(),
        }
    }
}
