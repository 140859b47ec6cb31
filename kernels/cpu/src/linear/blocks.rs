//! Integer products over quantised blocks: what all instruction sets compute, and the portable way.
//!
//! Each block of 32 k is an exact integer sum; then, block after block in K order,
//! acc = fma(d · scale, sum, acc) and, for formats with a minimum, acc = fma(min, scaled_sum, acc).
//! Formats with two scales a block take two such steps. Exact sums and one order of f32 operations
//! make every instruction set return the same bits.

use super::{
    Job,
    activations::{Int8, Int8Tile},
    lanes,
    packed::{BLOCK, BlockFormat, LANES, Lanes, Scales, Tile},
};
use crate::Isa;
use std::ops::Range;

/// All rows of `job` against the tiles `tiles` of its part.
pub(super) fn tiles<F: BlockFormat>(isa: Isa, job: &Job<'_>, x: Int8<'_>, tiles: Range<usize>) {
    #[cfg(target_arch = "x86_64")]
    match isa {
        // SAFETY: `linear` passes only what was detected on this machine.
        Isa::Amx => return unsafe { super::amx::tiles::<F>(job, x, tiles) },
        // SAFETY: as above.
        Isa::Avx512 => return unsafe { super::avx512::tiles::<F>(job, x, tiles) },
        // SAFETY: as above.
        Isa::Avx2 => return unsafe { super::avx2::tiles::<F>(job, x, tiles) },
        Isa::Portable => {}
    }
    let _ = isa;
    for tile in tiles {
        let weights = job.part.tile(tile);
        for (first, height) in super::row_tiles(job.rows.clone()) {
            let x = x.tile(first);
            for row in 0..height {
                job.store(first + row, tile, &one_row::<F>(weights, x, row));
            }
        }
    }
}

/// Row `row` of `x` · the tile.
fn one_row<F: BlockFormat>(tile: Tile<'_>, x: Int8Tile<'_>, row: usize) -> Lanes {
    let mut acc = [0.0; LANES];
    for block in 0..tile.layout.blocks {
        let at = block * x.height + row;
        let (q, side) = (&x.values[at], &x.sides[at]);
        let scales = lanes::block_scales::<F>(tile, block);
        let [low, high] = dot_halves::<F>(tile.block(block), &q.0);
        let mut add = |d: &Lanes, sums: &[i32; LANES], zero: i32| {
            for i in 0..LANES {
                let sum = (sums[i] - F::ZERO * zero) as f32;
                acc[i] = (d[i] * side.scale).mul_add(sum, acc[i]);
            }
        };
        if F::SCALES == Scales::SuperHalves {
            add(&scales.low, &low, side.low_sum);
            add(&scales.high, &high, side.high_sum);
        } else {
            add(&scales.low, &std::array::from_fn(|i| low[i] + high[i]), side.sum);
        }
        if F::SCALES.has_min() {
            for (acc, min) in acc.iter_mut().zip(scales.min) {
                *acc = min.mul_add(side.scaled_sum, *acc);
            }
        }
    }
    acc
}

/// Σ q_w · q_x of each column over the first and the second 16 k.
fn dot_halves<F: BlockFormat>(block: &[u8], x: &[i8; BLOCK]) -> [[i32; LANES]; 2] {
    let mut sums = [[0; LANES]; 2];
    for (half, sums) in sums.iter_mut().enumerate() {
        for g in half * 4..half * 4 + 4 {
            let words = lanes::group::<F>(block, g);
            for byte in 0..4 {
                let x = i32::from(x[g * 4 + byte]);
                for i in 0..LANES {
                    sums[i] += (words[i] >> (8 * byte) & 255) as i32 * x;
                }
            }
        }
    }
    sums
}
