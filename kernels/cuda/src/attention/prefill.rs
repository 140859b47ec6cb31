//! Sequences with several rows. Kernels: `attention_prefill.cu`, `attention_prefill_sm90.cu`, and
//! for what they leave of tiles that are cut along their keys `attention_combine.cu`.

use super::{Call, TILE_ROWS, sums_bytes, sums_places};
use crate::{Cuda, Driver, KvFormat, Launch};
use kernels::{BatchRoom, KernelError, StepSequence, Tensor};
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

/// Threads in a block of `attention_combine.cu`.
const COMBINE_THREADS: u32 = 128;

/// Up to so many rows have spans of one length.
const SPAN_ROWS: [usize; 3] = [32, 64, TILE_ROWS];

/// Keys of a span of so many rows, a multiple of every kernel's steps.
fn span_keys(rows: usize) -> usize {
    match rows {
        0..=32 => 1024,
        33..=64 => 2048,
        _ => 4096,
    }
}

/// Spans of keys that a sequence is cut into, 1 where it is not: by its own rows and context alone.
fn spans(rows: usize, context: usize) -> usize {
    if rows > TILE_ROWS { 1 } else { context.div_ceil(span_keys(rows)).max(1) }
}

/// Places for sums that a sequence takes: one for each row and span.
fn places(rows: usize, context: usize) -> usize {
    match spans(rows, context) {
        1 => 0,
        spans => rows.saturating_mul(spans),
    }
}

/// Of any sequence that there is room for.
pub(super) fn places_max(room: &BatchRoom) -> usize {
    let of = |rows: usize| match spans(rows, room.context) {
        1 => 0,
        spans => rows.min(room.tokens).saturating_mul(spans),
    };
    SPAN_ROWS.into_iter().map(of).max().unwrap_or(0)
}

/// Tiles and spans of a step, at most.
pub(crate) fn tiles_max(room: &BatchRoom) -> usize {
    let cut = room.sequences.saturating_mul(spans(2, room.context));
    room.tokens.div_ceil(TILE_ROWS).saturating_add(cut)
}

/// What one launch works on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tiles {
    first: usize,
    len: usize,
    /// Whether some are cut.
    cut: bool,
}

/// The tiles of a step as they are told to `step.cu`. Cut ones share the room for sums: where it is
/// full, a launch begins that starts over.
#[derive(Default)]
pub(crate) struct Tiling {
    /// Of each sequence itself, its first item, and the place of its sums; -1 where it is not cut.
    pub words: Vec<i32>,
    pub items: usize,
    pub launches: Vec<Tiles>,
    /// Places that the last launch has taken.
    taken: usize,
}

impl Tiling {
    /// Integers of a sequence in `words`.
    pub const WORDS: usize = 3;

    /// `places_max`: that there are.
    pub fn push(&mut self, index: usize, sequence: &StepSequence, places_max: usize) {
        let (rows, context) = (sequence.rows, sequence.context());
        let places = places(rows, context);
        let cut = places > 0;
        let items = if cut { spans(rows, context) } else { rows.div_ceil(TILE_ROWS) };
        if self.launches.is_empty() || self.taken + places > places_max {
            self.launches.push(Tiles { first: self.items, len: 0, cut: false });
            self.taken = 0;
        }
        if let Some(launch) = self.launches.last_mut() {
            launch.len += items;
            launch.cut |= cut;
        }
        let place = if cut { self.taken as i32 } else { -1 };
        self.words.extend([index as i32, self.items as i32, place]);
        self.items += items;
        self.taken += places;
    }
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
    sums: u64,
    weights: u64,
    block_table_cols: i32,
    q_heads: i32,
    kv_heads: i32,
    window: i32,
    first_tile: i32,
    score_scale: f32,
}

impl<D: Driver> Cuda<D> {
    pub(super) fn prefill(
        &self,
        out: &mut Tensor<Self>,
        call: &Call<'_, D>,
    ) -> Result<(), KernelError> {
        let by_wgmma = self.prefills_by_wgmma()?;
        let kernel = if by_wgmma { wgmma_kernel } else { mma_kernel };
        let (name, threads, shared) = kernel(call.heads.dim, call.kv.format());
        let mut args = self.prefill_args(out, call)?;
        for tiles in &call.batch.cuts.prefills {
            // One block a tile and head; heads that share keys are neighbours.
            let blocks = u32::try_from(tiles.len * call.heads.q).ok();
            let Some(blocks) = blocks.filter(|&blocks| blocks <= i32::MAX as u32) else {
                return Err(KernelError::Device(
                    "more tiles of attention than a grid holds".into(),
                ));
            };
            args.first_tile = tiles.first as i32;
            let launch = Launch::new(name, [blocks, 1, 1], threads, &args);
            self.driver.launch(launch.shared(shared as u32))?;
            if tiles.cut {
                let dim = call.heads.dim;
                let name =
                    if dim == 64 { "attention_combine_d64" } else { "attention_combine_d128" };
                self.driver.launch(Launch::new(name, [blocks, 1, 1], COMBINE_THREADS, &args))?;
            }
        }
        Ok(())
    }

    fn prefill_args(
        &self,
        out: &Tensor<Self>,
        call: &Call<'_, D>,
    ) -> Result<PrefillArgs, KernelError> {
        let Call { batch, kv, heads, .. } = *call;
        let driver = &self.driver;
        // Sums of every place, then the weights beside them.
        let sums = self.workspace(sums_bytes(&batch.room))?;
        let sums_len = sums_places(&batch.room) * heads.q * heads.dim;
        Ok(PrefillArgs {
            out: self.at(out),
            qkv: self.at(call.qkv),
            keys: kv.keys().address(driver),
            values: kv.values().address(driver),
            tiles: batch.cuts.tiles.address(driver),
            row_starts: batch.row_starts.address(driver),
            context_lens: batch.context_lens.address(driver),
            tables: batch.tables.address(driver),
            block_tables: batch.block_tables.address(driver),
            sums,
            weights: sums + (sums_len * size_of::<f32>()) as u64,
            block_table_cols: batch.block_table_cols as i32,
            q_heads: heads.q as i32,
            kv_heads: heads.kv as i32,
            window: call.keys_seen(),
            first_tile: 0,
            score_scale: std::f32::consts::LOG2_E / (heads.dim as f32).sqrt(),
        })
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

#[cfg(test)]
mod tests {
    use super::*;
    use kernels::Heads;

    fn sequence(start: usize, rows: usize) -> StepSequence {
        StepSequence { table: 0, start, rows, rope_start: 0 }
    }

    #[test]
    fn few_rows_behind_long_contexts_are_cut() {
        for (rows, context, wanted) in [
            (2, 1024, 1),
            (2, 1025, 2),
            (32, 8192, 8),
            (33, 2049, 2),
            (64, 8192, 4),
            (65, 4096, 1),
            (128, 32768, 8),
            (129, 32768, 1),
        ] {
            assert_eq!(spans(rows, context), wanted, "{rows} rows of {context}");
        }
    }

    #[test]
    fn every_sequence_has_room_for_its_sums() {
        for (tokens, context) in [(512, 4097), (40, 9000), (2, 1025), (128, 1000), (100, 5000)] {
            let heads = Heads { q: 2, kv: 1, dim: 64 };
            let room = BatchRoom { tokens, sequences: 1, tables: 1, context, heads };
            for rows in 2..=tokens.min(context) {
                let (takes, tiles) = (places(rows, context), rows.div_ceil(TILE_ROWS));
                assert!(takes <= places_max(&room), "{rows} rows in {room:?}");
                assert!(tiles.max(spans(rows, context)) <= tiles_max(&room), "{rows} in {room:?}");
            }
        }
    }

    #[test]
    fn sums_that_have_no_room_wait_for_the_next_launch() {
        let mut tiling = Tiling::default();
        // Two spans, then three tiles that are not cut, then two and three spans.
        let sequences = [(2000, 30), (0, 300), (1024, 32), (2100, 20)];
        for (index, (start, rows)) in sequences.into_iter().enumerate() {
            tiling.push(index, &sequence(start, rows), 128);
        }
        assert_eq!(tiling.words, [0, 0, 0, 1, 2, -1, 2, 5, 60, 3, 7, 0]);
        let launches: Vec<_> = tiling.launches.iter().map(|t| (t.first, t.len, t.cut)).collect();
        assert_eq!(launches, [(0, 7, true), (7, 3, true)]);
        assert_eq!(tiling.items, 10);
    }
}
