//! Products in f32: weights widened in registers, one fused multiply-add for each k, in K order.
//!
//! Lanes are columns, so every instruction set makes the same bits. Each weight value is widened
//! once for 64 rows.

use super::{
    Job,
    lanes::{self, Widen},
    packed::{BLOCK, LANES, Lanes, Tile, with_block_format},
};
use crate::{Format, cpu::isa::Isa};
use std::ops::Range;

/// Blocks widened at a time: 16 KiB, a part of the first-level cache.
const CHUNK_BLOCKS: usize = 8;
/// Rows that share one widening.
const ROWS: usize = 64;

/// All rows of `job` against tile `tile` of its part.
pub(super) fn tile(isa: Isa, job: &Job<'_>, tile: usize) {
    match job.part.format {
        Format::F32 => on::<lanes::F32>(isa, job, tile),
        Format::F16 => on::<lanes::F16>(isa, job, tile),
        Format::Bf16 => on::<lanes::Bf16>(isa, job, tile),
        format => with_block_format!(format, F => on::<F>(isa, job, tile), dense => ()),
    }
}

#[cfg(target_arch = "x86_64")]
fn on<W: Widen>(isa: Isa, job: &Job<'_>, tile: usize) {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn avx512<W: Widen>(job: &Job<'_>, tile: usize) {
        all_rows::<W, 8>(job, tile);
    }
    #[target_feature(enable = "avx2,fma,f16c")]
    fn avx2<W: Widen>(job: &Job<'_>, tile: usize) {
        all_rows::<W, 4>(job, tile);
    }
    match isa {
        // SAFETY: `Job`s are made for an `Isa` that was detected on this machine.
        Isa::Amx | Isa::Avx512 => unsafe { avx512::<W>(job, tile) },
        // SAFETY: as above.
        Isa::Avx2 => unsafe { avx2::<W>(job, tile) },
        Isa::Portable => all_rows::<W, 4>(job, tile),
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn on<W: Widen>(_: Isa, job: &Job<'_>, tile: usize) {
    all_rows::<W, 4>(job, tile);
}

#[inline(always)]
fn all_rows<W: Widen, const R: usize>(job: &Job<'_>, tile: usize) {
    let mut first = job.rows.start;
    while first < job.rows.end {
        let rows = first..(first + ROWS).min(job.rows.end);
        let mut sums = [[0.0; LANES]; ROWS];
        multiply::<W, R>(job, job.part.tile(tile), rows.clone(), &mut sums);
        for (row, sum) in rows.clone().zip(&sums) {
            job.store(row, tile, sum);
        }
        first = rows.end;
    }
}

/// sums[r] = x[rows.start + r] · the tile.
#[inline(always)]
fn multiply<W: Widen, const R: usize>(
    job: &Job<'_>,
    tile: Tile<'_>,
    rows: Range<usize>,
    sums: &mut [Lanes; ROWS],
) {
    let mut widened = [[[0.0; LANES]; BLOCK]; CHUNK_BLOCKS];
    for chunk in (0..tile.layout.blocks).step_by(CHUNK_BLOCKS) {
        let blocks = CHUNK_BLOCKS.min(tile.layout.blocks - chunk);
        for (block, out) in widened[..blocks].iter_mut().enumerate() {
            W::widen(tile, chunk + block, out);
        }
        let first = chunk * BLOCK;
        let len = (blocks * BLOCK).min(job.cols - first);
        let weights = &widened.as_flattened()[..len];
        let x = |row: usize| &job.x[(rows.start + row) * job.cols + first..][..len];
        let mut row = 0;
        while row + R <= rows.len() {
            let group: &mut [Lanes; R] = (&mut sums[row..row + R]).try_into().expect("R rows");
            accumulate(weights, std::array::from_fn(|r| x(row + r)), group);
            row += R;
        }
        while row < rows.len() {
            let group: &mut [Lanes; 1] = (&mut sums[row..row + 1]).try_into().expect("one row");
            accumulate(weights, [x(row)], group);
            row += 1;
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
