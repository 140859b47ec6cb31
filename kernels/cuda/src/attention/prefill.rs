//! Sequences with several rows. Kernels: `attention_prefill.cu`, `attention_prefill_sm90.cu`.

use super::{Call, TILE_ROWS};
use crate::{Cuda, Driver, KvFormat, Launch};
use kernels::{KernelError, Tensor};
use serde::{Deserialize, Serialize};

/// Which kernel prefills.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PrefillKernel {
    /// The fastest that the device and the cache's format allow.
    #[default]
    Fastest,
    /// mma.sync: on every device from compute capability 8.0 on, for every format.
    Mma,
    /// Warpgroups' wgmma: on compute capability 9.0, for bf16 caches.
    Wgmma,
}

/// Threads in a block of the mma.sync kernels.
const THREADS: u32 = 128;
/// Tiles of 64 keys or values in its ring.
const RING: usize = 3;
const STEP_KEYS: usize = 64;
/// And what a block knows of its tile.
const WORK_BYTES: usize = 64;

/// Of the wgmma kernels.
mod wgmma {
    /// One warpgroup that copies, two that compute.
    pub const THREADS: u32 = 384;
    /// Of the ring of keys, and of that of values.
    pub const SLOTS: usize = 3;
    pub const STEP_KEYS: usize = 128;
}

#[repr(C)]
#[derive(Clone, Copy)]
struct PrefillArgs {
    out: u64,
    qkv: u64,
    keys: u64,
    values: u64,
    tiles: u64,
    row_starts: u64,
    context_lens: u64,
    tables: u64,
    block_tables: u64,
    block_table_cols: i32,
    q_heads: i32,
    kv_heads: i32,
    window: i32,
    score_scale: f32,
}

impl<D: Driver> Cuda<D> {
    pub(super) fn prefill(
        &self,
        out: &mut Tensor<Self>,
        call: &Call<'_, D>,
    ) -> Result<(), KernelError> {
        let args = self.prefill_args(out, call);
        // One block a tile and head; heads that share keys are neighbours.
        let blocks = call.batch.cuts.tiles_len * call.heads.q;
        let blocks = u32::try_from(blocks).ok().filter(|&blocks| blocks <= i32::MAX as u32);
        let Some(blocks) = blocks else {
            return Err(KernelError::Device("more tiles of attention than a grid holds".into()));
        };
        if self.prefills_by_wgmma(call)? {
            return self.prefill_wgmma(&args, blocks, call.heads.dim);
        }
        let (name, shared) = mma_kernel(call.heads.dim, call.kv.format());
        let launch = Launch::new(name, [blocks, 1, 1], THREADS, &args);
        self.driver.launch(launch.shared(shared as u32))
    }

    fn prefill_args(&self, out: &Tensor<Self>, call: &Call<'_, D>) -> PrefillArgs {
        let Call { batch, kv, heads, .. } = *call;
        let driver = &self.driver;
        PrefillArgs {
            out: self.at(out),
            qkv: self.at(call.qkv),
            keys: kv.keys().address(driver),
            values: kv.values().address(driver),
            tiles: batch.cuts.tiles.address(driver),
            row_starts: batch.row_starts.address(driver),
            context_lens: batch.context_lens.address(driver),
            tables: batch.tables.address(driver),
            block_tables: batch.block_tables.address(driver),
            block_table_cols: batch.block_table_cols as i32,
            q_heads: heads.q as i32,
            kv_heads: heads.kv as i32,
            window: call.keys_seen(),
            score_scale: std::f32::consts::LOG2_E / (heads.dim as f32).sqrt(),
        }
    }

    /// Which of the two kernels prefills here.
    fn prefills_by_wgmma(&self, call: &Call<'_, D>) -> Result<bool, KernelError> {
        let capability = self.driver.facts().compute_capability;
        let fits = capability == (9, 0) && call.kv.format() == KvFormat::Bf16;
        match self.config.prefill {
            PrefillKernel::Wgmma if !fits => Err(KernelError::Device(format!(
                "wgmma prefills bf16 caches on compute capability 9.0, here is {:?} on {}.{}; \
                 choose mma",
                call.kv.format(),
                capability.0,
                capability.1
            ))),
            PrefillKernel::Wgmma => Ok(true),
            PrefillKernel::Fastest => Ok(fits),
            PrefillKernel::Mma => Ok(false),
        }
    }

    fn prefill_wgmma(
        &self,
        args: &PrefillArgs,
        blocks: u32,
        dim: usize,
    ) -> Result<(), KernelError> {
        let (name, shared) = wgmma_kernel(dim);
        let launch = Launch::new(name, [blocks, 1, 1], wgmma::THREADS, args);
        self.driver.launch(launch.shared(shared as u32))
    }
}

/// The kernel's name and the shared memory it takes: queries and the ring.
fn mma_kernel(dim: usize, format: KvFormat) -> (&'static str, usize) {
    let name = match (dim, format) {
        (64, KvFormat::Bf16) => "attention_prefill_d64_bf16",
        (64, KvFormat::Fp8) => "attention_prefill_d64_fp8",
        (_, KvFormat::Bf16) => "attention_prefill_d128_bf16",
        (_, KvFormat::Fp8) => "attention_prefill_d128_fp8",
    };
    let tile = STEP_KEYS * dim;
    let ring = match format {
        KvFormat::Bf16 => RING * 2 * tile,
        // As stored, with scales, and one tile of bf16.
        KvFormat::Fp8 => RING * (tile + STEP_KEYS * format.scale_bytes()) + 2 * tile,
    };
    (name, TILE_ROWS * 2 * dim + ring + WORK_BYTES)
}

/// As [`mma_kernel`]: queries, two rings, and their barriers in what is left of 1024 bytes.
fn wgmma_kernel(dim: usize) -> (&'static str, usize) {
    let name = if dim == 64 { "attention_prefill_sm90_d64" } else { "attention_prefill_sm90_d128" };
    let rings = 2 * wgmma::SLOTS * wgmma::STEP_KEYS;
    (name, (TILE_ROWS + rings) * 2 * dim + 1024)
}
