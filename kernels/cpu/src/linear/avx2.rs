//! Integer products over quantised blocks with AVX2: a tile is two registers of eight columns wide.

use super::{
    Job,
    activations::{Int8, Int8Run, Int8Tile},
    avx512::prefetch,
    lanes,
    packed::{BlockFormat, LANES, Lanes, Scales, Tile},
};
use std::{arch::x86_64::*, ops::Range};

/// Rows that share one unpacking.
const ROWS: usize = 4;

/// The integer sums of one row: eight columns, then the other eight.
type Sums = [__m256i; 2];

/// All rows of `job` against the tiles `tiles` of its part.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn tiles<F: BlockFormat>(job: &Job<'_>, x: Int8<'_>, tiles: Range<usize>) {
    for tile in tiles {
        let weights = job.part.tile(tile);
        for (first, height) in super::row_tiles(job.rows.clone()) {
            let x = x.tile(first);
            let mut row = 0;
            while row + ROWS <= height {
                store(job, tile, first + row, &few::<F, ROWS>(weights, x, row));
                row += ROWS;
            }
            while row < height {
                store(job, tile, first + row, &few::<F, 1>(weights, x, row));
                row += 1;
            }
        }
    }
}

fn store(job: &Job<'_>, tile: usize, first: usize, sums: &[Lanes]) {
    for (r, sums) in sums.iter().enumerate() {
        job.store(first + r, tile, sums);
    }
}

/// R rows of `x` from `first` on · the tile.
#[target_feature(enable = "avx2,fma,f16c")]
fn few<F: BlockFormat, const R: usize>(
    tile: Tile<'_>,
    x: Int8Tile<'_>,
    first: usize,
) -> [Lanes; R] {
    let mut acc = [[0.0; LANES]; R];
    for block in 0..tile.layout.blocks {
        prefetch(tile.block(block));
        let start = block * x.height + first;
        let q: &[Int8Run; R] = x.values[start..start + R].try_into().expect("R rows");
        let sides = &x.sides[start..start + R];
        let scales = lanes::block_scales::<F>(tile, block);
        let (low, high) = dots::<F, R>(tile.block(block), q);
        for r in 0..R {
            let side = &sides[r];
            if F::SCALES == Scales::SuperHalves {
                step::<F>(&mut acc[r], &scales.low, side.scale, low[r], side.low_sum);
                step::<F>(&mut acc[r], &scales.high, side.scale, high[r], side.high_sum);
            } else {
                let sum = [
                    _mm256_add_epi32(low[r][0], high[r][0]),
                    _mm256_add_epi32(low[r][1], high[r][1]),
                ];
                step::<F>(&mut acc[r], &scales.low, side.scale, sum, side.sum);
            }
            if F::SCALES.has_min() {
                for (acc, min) in acc[r].iter_mut().zip(scales.min) {
                    *acc = min.mul_add(side.scaled_sum, *acc);
                }
            }
        }
    }
    acc
}

/// acc += (d · scale) · (sums − ZERO · zero).
#[inline]
#[target_feature(enable = "avx2,fma")]
fn step<F: BlockFormat>(acc: &mut Lanes, d: &Lanes, scale: f32, sums: Sums, zero: i32) {
    // SAFETY: two registers of eight words are 16 words.
    let sums = unsafe { std::mem::transmute::<Sums, [i32; LANES]>(sums) };
    for i in 0..LANES {
        let sum = (sums[i] - F::ZERO * zero) as f32;
        acc[i] = (d[i] * scale).mul_add(sum, acc[i]);
    }
}

/// Σ q_w · q_x over the first and the second 16 k, for each row.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn dots<F: BlockFormat, const R: usize>(block: &[u8], x: &[Int8Run; R]) -> ([Sums; R], [Sums; R]) {
    assert_eq!(block.len(), F::BITS * 64);
    let mut sums = [[[_mm256_setzero_si256(); 2]; R]; 2];
    let ones = _mm256_set1_epi16(1);
    for (half, sums) in sums.iter_mut().enumerate() {
        let mut pairs = [[_mm256_setzero_si256(); 2]; R];
        for g in 4 * half..4 * half + 4 {
            let words = lanes::group::<F>(block, g);
            // SAFETY: 16 words are two registers of eight.
            let words = unsafe { std::mem::transmute::<[u32; LANES], Sums>(words) };
            let full = (g + 1).is_multiple_of(const { groups_in_16_bits(F::BITS) });
            for r in 0..R {
                let four = x[r].0.as_chunks::<4>().0[g];
                let four = _mm256_set1_epi32(i32::from_le_bytes(four.map(|q| q as u8)));
                for side in 0..2 {
                    if F::BITS == 8 {
                        let dot = dot_eight(words[side], four);
                        sums[r][side] = _mm256_add_epi32(sums[r][side], dot);
                        continue;
                    }
                    let products = _mm256_maddubs_epi16(words[side], four);
                    pairs[r][side] = _mm256_add_epi16(pairs[r][side], products);
                    if full {
                        let wide = _mm256_madd_epi16(pairs[r][side], ones);
                        sums[r][side] = _mm256_add_epi32(sums[r][side], wide);
                        pairs[r][side] = _mm256_setzero_si256();
                    }
                }
            }
        }
    }
    (sums[0], sums[1])
}

/// Groups of four k whose products fit into 16 bits: pairs of weights of up to `bits` bits times
/// −128.
const fn groups_in_16_bits(bits: usize) -> usize {
    match bits {
        4 | 5 => 4,
        6 => 2,
        _ => 1,
    }
}

/// Σ of four unsigned times signed bytes in each word. Pairs are summed in 16 bits, which seven
/// bits of weight cannot overflow; the eighth goes its own way.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn dot_eight(words: __m256i, x: __m256i) -> __m256i {
    let seven = _mm256_and_si256(words, _mm256_set1_epi8(127));
    let eighth = _mm256_and_si256(_mm256_srli_epi32::<7>(words), _mm256_set1_epi8(1));
    _mm256_add_epi32(
        _mm256_madd_epi16(_mm256_maddubs_epi16(seven, x), _mm256_set1_epi16(1)),
        _mm256_madd_epi16(_mm256_maddubs_epi16(eighth, x), _mm256_set1_epi16(128)),
    )
}
