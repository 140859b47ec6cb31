//! Integer products over quantised blocks with AVX2: a tile is two registers of eight columns wide.

use super::{
    Job,
    activations::{Int8, Int8Run, Int8Tile, Side},
    avx512::prefetch,
    packed::{BlockFormat, LANES, Lanes, Scales, Tile},
};
use std::{arch::x86_64::*, ops::Range};

/// Rows that share one unpacking.
const ROWS: usize = 4;

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
    let mut acc = [[_mm256_setzero_ps(); R]; 2];
    let mut scales = [Scaled::load::<F, 0>(tile, 0), Scaled::load::<F, 1>(tile, 0)];
    for block in 0..tile.layout.blocks {
        prefetch(tile.block(block));
        if tile.layout.begins_scales(F::SCALES, block) {
            scales = [Scaled::load::<F, 0>(tile, block), Scaled::load::<F, 1>(tile, block)];
        }
        let start = block * x.height + first;
        let q: &[Int8Run; R] = x.values[start..start + R].try_into().expect("R rows");
        let sides: &[Side; R] = x.sides[start..start + R].try_into().expect("R rows");
        add::<F, R, 0>(&mut acc[0], scales[0], tile.block(block), (q, sides));
        add::<F, R, 1>(&mut acc[1], scales[1], tile.block(block), (q, sides));
    }
    std::array::from_fn(|r| {
        // SAFETY: two registers of eight floats are 16.
        unsafe { std::mem::transmute::<[__m256; 2], Lanes>([acc[0][r], acc[1][r]]) }
    })
}

/// Adds a block's products with the columns of one side: registers suffice for one at a time.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add<F: BlockFormat, const R: usize, const SIDE: usize>(
    acc: &mut [__m256; R],
    scales: Scaled,
    block: &[u8],
    (q, sides): (&[Int8Run; R], &[Side; R]),
) {
    let low = dots::<F, R, SIDE, 0>(block, q);
    let high = dots::<F, R, SIDE, 1>(block, q);
    for r in 0..R {
        let side = &sides[r];
        if F::SCALES == Scales::SuperHalves {
            acc[r] = step::<F>(acc[r], scales.low, side.scale, low[r], side.low_sum);
            acc[r] = step::<F>(acc[r], scales.other, side.scale, high[r], side.high_sum);
        } else {
            let sum = _mm256_add_epi32(low[r], high[r]);
            acc[r] = step::<F>(acc[r], scales.low, side.scale, sum, side.sum);
        }
        if F::SCALES.has_min() {
            acc[r] = _mm256_fmadd_ps(scales.other, _mm256_set1_ps(side.scaled_sum), acc[r]);
        }
    }
}

/// acc + (d · scale) · (sums − ZERO · zero); of eight bits, `dots` took the zero point off before.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn step<F: BlockFormat>(acc: __m256, d: __m256, scale: f32, sums: __m256i, zero: i32) -> __m256 {
    let sums = match F::ZERO == 0 || F::BITS == 8 {
        true => sums,
        false => _mm256_sub_epi32(sums, _mm256_set1_epi32(F::ZERO * zero)),
    };
    _mm256_fmadd_ps(_mm256_mul_ps(d, _mm256_set1_ps(scale)), _mm256_cvtepi32_ps(sums), acc)
}

/// Σ q_w · q_x over one half of a block, for the columns of one side and each row.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn dots<F: BlockFormat, const R: usize, const SIDE: usize, const HALF: usize>(
    block: &[u8],
    x: &[Int8Run; R],
) -> [__m256i; R] {
    assert_eq!(block.len(), F::BITS * 64);
    let mut sums = [_mm256_setzero_si256(); R];
    let mut pairs = [_mm256_setzero_si256(); R];
    let ones = _mm256_set1_epi16(1);
    for g in 4 * HALF..4 * HALF + 4 {
        let words = words::<F, SIDE>(block, g);
        let magnitudes = if F::BITS == 8 { _mm256_abs_epi8(words) } else { words };
        let full = (g + 1).is_multiple_of(const { groups_in_16_bits(F::BITS) });
        for r in 0..R {
            let four = x[r].0.as_chunks::<4>().0[g];
            let mut four = _mm256_set1_epi32(i32::from_le_bytes(four.map(|q| q as u8)));
            if F::BITS == 8 {
                four = _mm256_sign_epi8(four, words);
            }
            pairs[r] = _mm256_add_epi16(pairs[r], _mm256_maddubs_epi16(magnitudes, four));
            if full {
                sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(pairs[r], ones));
                pairs[r] = _mm256_setzero_si256();
            }
        }
    }
    sums
}

/// As `lanes::group`, for the columns of one side, but signed where there are eight bits: unsigned
/// ones would overflow 16 bits in pairs. Spelt out, for compilers put words together byte by byte.
#[inline]
#[target_feature(enable = "avx2")]
fn words<F: BlockFormat, const SIDE: usize>(block: &[u8], g: usize) -> __m256i {
    if F::BITS == 8 {
        const { assert!(F::BITS < 8 || F::ZERO == 128) };
        return _mm256_xor_si256(word_row::<SIDE>(block, g), _mm256_set1_epi8(-128));
    }
    let low = shifted(word_row::<SIDE>(block, g % 4), g / 4 * 4);
    let low = _mm256_and_si256(low, _mm256_set1_epi8(15));
    let (row, shift, mask) = match F::BITS {
        5 => (4, g, 1),
        6 => (4 + g / 4, g % 4 * 2, 3),
        _ => return low,
    };
    let high = shifted(word_row::<SIDE>(block, row), shift);
    let high = _mm256_and_si256(high, _mm256_set1_epi8(mask));
    _mm256_or_si256(low, _mm256_slli_epi32::<4>(high))
}

/// The words of one side from row `row` of a block's words.
#[inline]
#[target_feature(enable = "avx2")]
fn word_row<const SIDE: usize>(block: &[u8], row: usize) -> __m256i {
    let words = &block[row * LANES * 4 + SIDE * 32..][..32];
    // SAFETY: 32 bytes are there.
    unsafe { _mm256_loadu_si256(words.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn shifted(words: __m256i, bits: usize) -> __m256i {
    _mm256_srl_epi32(words, _mm_cvtsi32_si128(bits as i32))
}

/// Groups of four k whose products fit into 16 bits: pairs of weights of up to `bits` bits, or of
/// up to ±128, times ±127.
const fn groups_in_16_bits(bits: usize) -> usize {
    match bits {
        4 | 5 => 4,
        6 => 2,
        _ => 1,
    }
}

/// The scales of a block for the columns of one side: d, and the d of its second half or its
/// minimum.
#[derive(Clone, Copy)]
struct Scaled {
    low: __m256,
    other: __m256,
}

impl Scaled {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn load<F: BlockFormat, const SIDE: usize>(tile: Tile<'_>, block: usize) -> Self {
        let at = tile.layout.scales_of(F::SCALES, block);
        let d = halves::<SIDE>(tile.bytes, at);
        let subs = |at: usize| &tile.bytes[tile.layout.subs_of(block) + at + 8 * SIDE..][..8];
        match F::SCALES {
            Scales::Half => Self { low: d, other: d },
            Scales::HalfMin => Self { low: d, other: halves::<SIDE>(tile.bytes, at + 2 * LANES) },
            Scales::GroupZero => {
                let zeros = halves::<SIDE>(tile.bytes, at + 2 * LANES);
                let above = _mm256_sub_ps(_mm256_set1_ps(F::ZERO as f32), zeros);
                Self { low: d, other: _mm256_mul_ps(d, above) }
            }
            Scales::SuperMin => {
                let dmin = halves::<SIDE>(tile.bytes, at + 2 * LANES);
                let scale = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight(subs(0))));
                let min = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight(subs(LANES))));
                let min = _mm256_xor_ps(_mm256_mul_ps(dmin, min), _mm256_set1_ps(-0.0));
                Self { low: _mm256_mul_ps(d, scale), other: min }
            }
            Scales::SuperHalves => {
                let low = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight(subs(0))));
                let high = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight(subs(LANES))));
                Self { low: _mm256_mul_ps(d, low), other: _mm256_mul_ps(d, high) }
            }
        }
    }
}

/// The eight f16 of one side, of 16 at `at`.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn halves<const SIDE: usize>(from: &[u8], at: usize) -> __m256 {
    let halves = &from[at + 16 * SIDE..][..16];
    // SAFETY: 16 bytes are there.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(halves.as_ptr().cast()) })
}

/// Eight bytes.
#[inline]
#[target_feature(enable = "avx2")]
fn eight(bytes: &[u8]) -> __m128i {
    assert_eq!(bytes.len(), 8);
    // SAFETY: 8 bytes are there.
    unsafe { _mm_loadl_epi64(bytes.as_ptr().cast()) }
}
