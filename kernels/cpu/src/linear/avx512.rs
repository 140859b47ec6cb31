//! Integer products over quantised blocks with AVX-512 VNNI: a tile's block is unpacked into
//! registers once for up to eight rows.

use super::{
    Job,
    activations::{FEW_ROWS, Int8, Int8Run, Int8Tile, Side, scale_of},
    lanes,
    packed::{BLOCK, BlockFormat, LANES, Lanes, Scales, Tile},
};
use std::{arch::x86_64::*, ops::Range};

/// How far ahead of the block in use memory is asked for, in bytes.
const PREFETCH: usize = 2048;

/// All rows of `job` against the tiles `tiles` of its part.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn tiles<F: BlockFormat>(job: &Job<'_>, x: Int8<'_>, tiles: Range<usize>) {
    for tile in tiles {
        for (first, height) in super::row_tiles(job.rows.clone()) {
            row_tile::<F>(job, x.tile(first), tile, first..first + height);
        }
    }
}

/// The rows `rows` of one row tile against one tile.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn row_tile<F: BlockFormat>(
    job: &Job<'_>,
    x: Int8Tile<'_>,
    tile: usize,
    rows: Range<usize>,
) {
    let weights = job.part.tile(tile);
    let mut row = 0;
    while row < rows.len() {
        let first = rows.start + row;
        row += match rows.len() - row {
            1 => few::<F, 1>(job, weights, (x, row), (first, tile)),
            2 => few::<F, 2>(job, weights, (x, row), (first, tile)),
            3 => few::<F, 3>(job, weights, (x, row), (first, tile)),
            4 | 5 => few::<F, 4>(job, weights, (x, row), (first, tile)),
            6 | 7 => few::<F, 6>(job, weights, (x, row), (first, tile)),
            _ => few::<F, FEW_ROWS>(job, weights, (x, row), (first, tile)),
        };
    }
}

/// R rows of the row tile `x.0` from `x.1` on, stored from `at` (row, tile) on. Returns R.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn few<F: BlockFormat, const R: usize>(
    job: &Job<'_>,
    tile: Tile<'_>,
    x: (Int8Tile<'_>, usize),
    at: (usize, usize),
) -> usize {
    let (x, first) = x;
    let mut acc = [_mm512_setzero_ps(); R];
    for block in 0..tile.layout.blocks {
        let values = tile.block(block);
        prefetch(values);
        let words: [__m512i; 8] = unpack::<F>(values);
        let scales = Scaled::load::<F>(tile, block);
        let start = block * x.height + first;
        let q: &[Int8Run; R] = x.values[start..start + R].try_into().expect("R rows");
        let sides = &x.sides[start..start + R];
        for r in 0..R {
            let side = &sides[r];
            if F::SCALES == Scales::SuperHalves {
                let low = dot::<4>(zero::<F>(side.low_sum), &words, &q[r].0, 0);
                let high = dot::<4>(zero::<F>(side.high_sum), &words, &q[r].0, 4);
                acc[r] = step(acc[r], scales.low, side.scale, low);
                acc[r] = step(acc[r], scales.other, side.scale, high);
            } else {
                let sum = dot::<8>(zero::<F>(side.sum), &words, &q[r].0, 0);
                acc[r] = step(acc[r], scales.low, side.scale, sum);
            }
            if F::SCALES.has_min() {
                acc[r] = _mm512_fmadd_ps(scales.other, _mm512_set1_ps(side.scaled_sum), acc[r]);
            }
        }
    }
    for (r, acc) in acc.into_iter().enumerate() {
        job.store(at.0 + r, at.1, &lanes_of(acc));
    }
    R
}

/// What the zero point adds up to.
#[inline]
#[target_feature(enable = "avx512f")]
fn zero<F: BlockFormat>(sum: i32) -> __m512i {
    if F::ZERO == 0 { _mm512_setzero_si512() } else { _mm512_set1_epi32(-F::ZERO * sum) }
}

/// acc + (d · scale) · sum.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn step(acc: __m512, d: __m512, scale: f32, sum: __m512i) -> __m512 {
    _mm512_fmadd_ps(_mm512_mul_ps(d, _mm512_set1_ps(scale)), _mm512_cvtepi32_ps(sum), acc)
}

/// from + Σ over G groups of four k, the first of them `first`.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn dot<const G: usize>(
    from: __m512i,
    words: &[__m512i; 8],
    x: &[i8; BLOCK],
    first: usize,
) -> __m512i {
    let mut sum = from;
    for g in first..first + G {
        let four = i32::from_le_bytes([
            x[4 * g] as u8,
            x[4 * g + 1] as u8,
            x[4 * g + 2] as u8,
            x[4 * g + 3] as u8,
        ]);
        sum = _mm512_dpbusd_epi32(sum, words[g], _mm512_set1_epi32(four));
    }
    sum
}

/// The block's values as unsigned bytes, one register for four k of 16 columns.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
pub(super) fn unpack<F: BlockFormat>(block: &[u8]) -> [__m512i; 8] {
    assert_eq!(block.len(), F::BITS * 64);
    // No closures: those would not inherit the instruction set.
    let mut unpacked = [_mm512_setzero_si512(); 8];
    for (g, register) in unpacked.iter_mut().enumerate() {
        let words = lanes::group::<F>(block, g);
        // SAFETY: 16 words and a register are both 64 bytes without invalid patterns.
        *register = unsafe { std::mem::transmute::<[u32; LANES], __m512i>(words) };
    }
    unpacked
}

/// Asks for what comes after this block.
#[inline(always)]
pub(super) fn prefetch(block: &[u8]) {
    for line in (0..block.len()).step_by(64) {
        let ahead = block.as_ptr().wrapping_add(PREFETCH + line);
        // SAFETY: every x86-64 has the instruction; it reads nothing that the program sees and
        // faults on no address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(ahead.cast()) };
    }
}

/// To int8, the largest to ±127.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2")]
pub(super) fn round_block(x: &[f32; BLOCK]) -> ([i8; BLOCK], Side) {
    // SAFETY: two registers of floats are there.
    let x = unsafe { [_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(LANES))] };
    let magnitude = _mm512_set1_epi32(0x7fff_ffff);
    let max = _mm512_max_epu32(
        _mm512_and_si512(_mm512_castps_si512(x[0]), magnitude),
        _mm512_and_si512(_mm512_castps_si512(x[1]), magnitude),
    );
    let (inverse, scale) = scale_of(_mm512_reduce_max_epu32(max));
    let inverse = _mm512_set1_ps(inverse);
    let low = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x[0], inverse)));
    let high = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x[1], inverse)));
    let bytes = _mm256_set_m128i(high, low);
    let sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), bytes);
    let sums = _mm256_hadd_epi32(sums, sums);
    let sums = _mm256_hadd_epi32(sums, sums);
    let (low, high) = (_mm256_extract_epi32::<0>(sums), _mm256_extract_epi32::<4>(sums));
    let mut q = [0; BLOCK];
    // SAFETY: 32 bytes have room for the register.
    unsafe { _mm256_storeu_si256(q.as_mut_ptr().cast(), bytes) };
    (q, Side::new(scale, low, high))
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn lanes_of(register: __m512) -> Lanes {
    let mut lanes = [0.0; LANES];
    // SAFETY: 16 floats have room for a register.
    unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), register) };
    lanes
}

/// The scales of a block: d, and the d of its second half or its minimum.
#[derive(Clone, Copy)]
pub(super) struct Scaled {
    pub low: __m512,
    pub other: __m512,
}

impl Scaled {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c")]
    pub fn load<F: BlockFormat>(tile: Tile<'_>, block: usize) -> Self {
        let at = tile.layout.scales_of(F::SCALES, block);
        let d = halves(tile.bytes, at);
        match F::SCALES {
            Scales::Half => Self { low: d, other: d },
            Scales::HalfMin => Self { low: d, other: halves(tile.bytes, at + 2 * LANES) },
            Scales::GroupZero => {
                let zeros = halves(tile.bytes, at + 2 * LANES);
                let above = _mm512_sub_ps(_mm512_set1_ps(F::ZERO as f32), zeros);
                Self { low: d, other: _mm512_mul_ps(d, above) }
            }
            Scales::SuperMin => {
                let dmin = halves(tile.bytes, at + 2 * LANES);
                let subs = tile.layout.subs_of(block);
                let scale = _mm512_cvtepu8_epi32(bytes(tile.bytes, subs));
                let min = _mm512_cvtepu8_epi32(bytes(tile.bytes, subs + LANES));
                let min = _mm512_mul_ps(dmin, _mm512_cvtepi32_ps(min));
                Self {
                    low: _mm512_mul_ps(d, _mm512_cvtepi32_ps(scale)),
                    other: _mm512_xor_ps(min, _mm512_set1_ps(-0.0)),
                }
            }
            Scales::SuperHalves => {
                let subs = tile.layout.subs_of(block);
                let low = _mm512_cvtepi8_epi32(bytes(tile.bytes, subs));
                let high = _mm512_cvtepi8_epi32(bytes(tile.bytes, subs + LANES));
                Self {
                    low: _mm512_mul_ps(d, _mm512_cvtepi32_ps(low)),
                    other: _mm512_mul_ps(d, _mm512_cvtepi32_ps(high)),
                }
            }
        }
    }
}

/// 16 f16 at `at`.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn halves(from: &[u8], at: usize) -> __m512 {
    let halves = &from[at..at + 2 * LANES];
    // SAFETY: 32 bytes are there.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(halves.as_ptr().cast()) })
}

/// 16 bytes at `at`.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn bytes(from: &[u8], at: usize) -> __m128i {
    let bytes = &from[at..at + LANES];
    // SAFETY: 16 bytes are there.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}
