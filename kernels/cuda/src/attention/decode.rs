//! Sequences with one row: splits of the context, and their sum. Kernels: `attention_decode.cu`.

use super::{Call, SPLIT_TOKENS};
use crate::{Cuda, Driver, KvFormat, Launch, rope::Turn, step::splits_max};
use kernels::{BatchRoom, Heads, KernelError, Tensor};

/// Threads in a block of the kernel, and its warps.
const THREADS: u32 = 128;
/// Blocks that a multiprocessor has room for.
const BLOCKS: usize = 3;
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
    splits_count: u64,
    row_starts: u64,
    context_lens: u64,
    tables: u64,
    block_tables: u64,
    sums: u64,
    weights: u64,
    arrivals: u64,
    turn: Turn,
    score_scale: f32,
    qkv_cols: i32,
    q_heads: i32,
    kv_heads: i32,
    table_cols: i32,
    group: i32,
    window: i32,
}

/// The kernel for heads and a cache of this kind, and its bytes of shared memory: tiles of K and V
/// for each warp and the turned row behind them, over which the warps then merge what they have.
fn kernel(dim: usize, format: KvFormat) -> (&'static str, usize) {
    // Stages, and floats between the rows of heads.
    let (name, stages, gap) = match (dim, format) {
        (64, KvFormat::Bf16) => ("attention_decode_d64_bf16", 4, 8),
        (64, KvFormat::Fp8) => ("attention_decode_d64_fp8", 4, 16),
        (_, KvFormat::Bf16) => ("attention_decode_d128_bf16", 2, 8),
        (_, KvFormat::Fp8) => ("attention_decode_d128_fp8", 4, 16),
    };
    // Keys with their scales and their values'; room for as much beside the values.
    let token = dim * format.element_bytes() + 2 * format.scale_bytes();
    let ring = stages * 2 * kernels::BLOCK_TOKENS * token;
    let merged = TILE_HEADS * (dim + gap + 2) * size_of::<f32>();
    // Queries a few banks apart, key, value and two scales, in pieces of 16 bytes.
    let own = TILE_HEADS * (dim + 8) * 2 + 2 * dim * format.element_bytes() + 16;
    (name, (WARPS * ring + own).max(WARPS * merged + 16))
}

/// Bytes that splits leave for their sum, where sequences of full length all decode.
pub(crate) fn sums_bytes(room: &BatchRoom) -> usize {
    if room.context <= SPLIT_TOKENS {
        // One split has nothing to be summed with.
        return 0;
    }
    let Heads { q, dim, .. } = room.heads;
    // A sum and two weights of every query head.
    splits_max(room).saturating_mul(q * (dim + 2) * size_of::<f32>())
}

impl<D: Driver> Cuda<D> {
    /// One grid for every step: blocks take splits from a list on the device.
    pub(super) fn decode(
        &self,
        out: &mut Tensor<Self>,
        call: &Call<'_, D>,
    ) -> Result<(), KernelError> {
        let (room, Heads { q, kv, dim }) = (&call.batch.room, call.heads);
        // Sums of every split and query head, then the weights beside them.
        let sums = self.workspace(sums_bytes(room))?;
        let sums_len = splits_max(room) * q * dim;
        let weights = sums + (sums_len * size_of::<f32>()) as u64;
        let args = self.decode_args(out, call, (sums, weights));
        let (name, shared) = kernel(dim, call.kv.format());
        let items = splits_max(room).saturating_mul(kv * (q / kv).div_ceil(TILE_HEADS));
        let blocks = items.min(BLOCKS * self.driver.facts().multiprocessors as usize);
        let grid = [blocks as u32, 1, 1];
        self.launch_dependent(Launch::new(name, grid, THREADS, &args).shared(shared as u32))
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
            splits_count: batch.cuts.splits_count.address(driver),
            row_starts: batch.row_starts.address(driver),
            context_lens: batch.context_lens.address(driver),
            tables: batch.tables.address(driver),
            block_tables: batch.block_tables.address(driver),
            sums,
            weights,
            arrivals: batch.cuts.arrivals.address(driver),
            turn: call.turn.unwrap_or_default(),
            score_scale: std::f32::consts::LOG2_E / (heads.dim as f32).sqrt(),
            qkv_cols: qkv.cols as i32,
            q_heads: heads.q as i32,
            kv_heads: heads.kv as i32,
            table_cols: batch.block_table_cols as i32,
            group: (heads.q / heads.kv) as i32,
            window: call.keys_seen(),
        }
    }
}
