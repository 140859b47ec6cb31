//! Sequences with several rows. Kernels: `attention_prefill.cu`, `attention_prefill_sm90.cu`.

use super::{Call, TILE_ROWS};
use crate::{Cuda, Driver, KvFormat, Launch};
use kernels::{KernelError, Tensor};
use serde::{Deserialize, Serialize};

/// Which kernel prefills.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PrefillKernel {
    /// The fastest that the device allows.
    #[default]
    Fastest,
    /// mma.sync: on every device from compute capability 8.0 on, for every format.
    Mma,
    /// Warpgroups' wgmma: on compute capability 9.0, for every format.
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
    /// One warpgroup that brings keys and values, two that compute.
    pub const THREADS: u32 = 384;
    /// Of the ring of keys, and of that of values: of bf16, and of e4m3 once widened.
    pub const SLOTS: usize = 3;
    pub const SLOTS_WIDENED: usize = 2;
    /// Of e4m3 as stored.
    pub const STAGES: usize = 4;
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
        let by_wgmma = self.prefills_by_wgmma()?;
        let kernel = if by_wgmma { wgmma_kernel } else { mma_kernel };
        let (name, threads, shared) = kernel(call.heads.dim, call.kv.format());
        let launch = Launch::new(name, [blocks, 1, 1], threads, &args);
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
    fn prefills_by_wgmma(&self) -> Result<bool, KernelError> {
        let (major, minor) = self.driver.facts().compute_capability;
        let has = (major, minor) == (9, 0);
        match self.config.prefill {
            PrefillKernel::Wgmma if !has => Err(KernelError::Device(format!(
                "wgmma prefills on compute capability 9.0, here is {major}.{minor}; choose mma"
            ))),
            PrefillKernel::Wgmma => Ok(true),
            PrefillKernel::Fastest => Ok(has),
            PrefillKernel::Mma => Ok(false),
        }
    }
}

/// The kernel's name, its threads, and the shared memory it takes: queries and the ring.
fn mma_kernel(dim: usize, format: KvFormat) -> (&'static str, u32, usize) {
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
    (name, THREADS, TILE_ROWS * 2 * dim + ring + WORK_BYTES)
}

/// As [`mma_kernel`]: queries, two rings, what waits to be widened, and barriers in what is left of
/// 1024 bytes.
fn wgmma_kernel(dim: usize, format: KvFormat) -> (&'static str, u32, usize) {
    let name = match (dim, format) {
        (64, KvFormat::Bf16) => "attention_prefill_sm90_d64_bf16",
        (64, KvFormat::Fp8) => "attention_prefill_sm90_d64_fp8",
        (_, KvFormat::Bf16) => "attention_prefill_sm90_d128_bf16",
        (_, KvFormat::Fp8) => "attention_prefill_sm90_d128_fp8",
    };
    let (slots, stages) = match format {
        KvFormat::Bf16 => (wgmma::SLOTS, 0),
        KvFormat::Fp8 => (wgmma::SLOTS_WIDENED, wgmma::STAGES),
    };
    let rings = 2 * slots * wgmma::STEP_KEYS * 2 * dim;
    let staged = stages * wgmma::STEP_KEYS * (dim + format.scale_bytes());
    (name, wgmma::THREADS, TILE_ROWS * 2 * dim + rings + staged + 1024)
}
