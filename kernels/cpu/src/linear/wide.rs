//! Products in f32: weights widened in registers, one fused multiply-add for each k, in K order.
//!
//! Lanes are columns, so every instruction set makes the same bits. Each weight value is widened
//! once for 64 rows.

use super::{
    Job,
    lanes::{self, Widen},
    packed::{BLOCK, LANES, Lanes, Tile, TileFormat, with_block_format},
};
use crate::isa::Isa;
use std::ops::Range;

/// Blocks widened at a time: 16 KiB, a part of the first-level cache.
const CHUNK_BLOCKS: usize = 8;
/// Rows that share one widening.
const ROWS: usize = 64;

/// What a thread needs at hand.
#[repr(C, align(64))]
struct Buffers {
    widened: [[Lanes; BLOCK]; CHUNK_BLOCKS],
    sums: [Lanes; ROWS],
}

/// All rows of `job` against the tiles `tiles` of its part.
pub(super) fn tiles(isa: Isa, job: &Job<'_>, tiles: Range<usize>) {
    match job.part.format {
        TileFormat::F32 => on::<lanes::F32>(isa, job, tiles),
        TileFormat::F16 => on::<lanes::F16>(isa, job, tiles),
        TileFormat::Bf16 => on::<lanes::Bf16>(isa, job, tiles),
        TileFormat::E4m3 => on::<lanes::E4m3>(isa, job, tiles),
        format => with_block_format!(format, F => on::<F>(isa, job, tiles), dense => ()),
    }
}

#[cfg(target_arch = "x86_64")]
fn on<W: Widen>(isa: Isa, job: &Job<'_>, tiles: Range<usize>) {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn avx512<W: Widen>(job: &Job<'_>, tiles: Range<usize>) {
        all_rows::<W, 8>(job, tiles);
    }
    #[target_feature(enable = "avx2,fma,f16c")]
    fn avx2<W: Widen>(job: &Job<'_>, tiles: Range<usize>) {
        all_rows::<W, 4>(job, tiles);
    }
    match isa {
        // SAFETY: `linear` passes only what was detected on this machine.
        Isa::Amx | Isa::Avx512 => unsafe { avx512::<W>(job, tiles) },
        // SAFETY: as above.
        Isa::Avx2 => unsafe { avx2::<W>(job, tiles) },
        Isa::Portable => all_rows::<W, 4>(job, tiles),
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn on<W: Widen>(_: Isa, job: &Job<'_>, tiles: Range<usize>) {
    all_rows::<W, 4>(job, tiles);
}

#[inline(always)]
fn all_rows<W: Widen, const R: usize>(job: &Job<'_>, tiles: Range<usize>) {
    let mut buffers =
        Buffers { widened: [[[0.0; LANES]; BLOCK]; CHUNK_BLOCKS], sums: [[0.0; LANES]; ROWS] };
    for first in job.rows.clone().step_by(ROWS) {
        let rows = first..(first + ROWS).min(job.rows.end);
        for tile in tiles.clone() {
            buffers.sums[..rows.len()].fill([0.0; LANES]);
            multiply::<W, R>(job, job.part.tile(tile), rows.clone(), &mut buffers);
            for (row, sum) in rows.clone().zip(&buffers.sums) {
                job.store(row, tile, sum);
            }
        }
    }
}

/// The sums of row rows.start + r += x · the tile.
#[inline(always)]
fn multiply<W: Widen, const R: usize>(
    job: &Job<'_>,
    tile: Tile<'_>,
    rows: Range<usize>,
    buffers: &mut Buffers,
) {
    let Buffers { widened, sums } = buffers;
    for chunk in (0..tile.layout.blocks).step_by(CHUNK_BLOCKS) {
        let blocks = CHUNK_BLOCKS.min(tile.layout.blocks - chunk);
        for (block, out) in widened[..blocks].iter_mut().enumerate() {
            W::widen(tile, chunk + block, out);
        }
        let first = chunk * BLOCK;
        let len = (blocks * BLOCK).min(job.cols - first);
        let weights = &widened.as_flattened()[..len];
        let x = |row: usize| &job.x[(rows.start + row) * job.cols + first..][..len];
        let (groups, rest) = sums[..rows.len()].as_chunks_mut::<R>();
        let done = groups.len() * R;
        for (group, sums) in groups.iter_mut().enumerate() {
            accumulate(weights, std::array::from_fn(|r| x(group * R + r)), sums);
        }
        let (pairs, rest) = rest.as_chunks_mut::<2>();
        for (pair, sums) in pairs.iter_mut().enumerate() {
            accumulate(weights, std::array::from_fn(|r| x(done + pair * 2 + r)), sums);
        }
        if let [last] = rest {
            accumulate(weights, [x(rows.len() - 1)], std::array::from_mut(last));
        }
    }
}

/// sums[r] += x[r] · weights, one k after the other.
#[inline(always)]
fn accumulate<const R: usize>(weights: &[Lanes], x: [&[f32]; R], sums: &mut [Lanes; R]) {
    let mut acc = *sums;
    for (k, weight) in weights.iter().enumerate() {
        for r in 0..R {
            let value = x[r][k];
            for i in 0..LANES {
                acc[r][i] = value.mul_add(weight[i], acc[r][i]);
            }
        }
    }
    *sums = acc;
}
