//! Integer products over quantised blocks with AMX, for row tiles of more than a few rows.
//!
//! A chunk of a weight tile is unpacked into the first-level cache once and multiplied with every
//! row tile; the block's scales are applied to the integer sums by AVX-512, in the order of
//! `blocks`. Zero points are taken off the weights while unpacking: the integers come out the same.

use super::{
    Job,
    activations::{Int8, Int8Tile, Side},
    avx512::{self, Scaled, lanes_of, step, unpack},
    packed::{BLOCK, BlockFormat, LANES, Scales, Tile},
    row_runs, row_tiles,
    tiles::{Int8Product, Shapes, Tiles, int8_pair},
};
use std::{arch::x86_64::*, ops::Range};

/// Blocks unpacked at a time: 12 KiB.
const CHUNK: usize = 24;
/// Row tiles that share an unpacked chunk, so that their activations stay in the second-level
/// cache.
const ROW_TILES: usize = 16;

/// The integer sums of two products: two blocks, or the halves of one.
type Pair = [[__m512i; LANES]; 2];

/// What a thread needs at hand.
struct Buffers {
    weights: [[__m512i; 8]; CHUNK],
    scales: [Scaled; CHUNK],
    /// The running sums of each row tile.
    sums: [[__m512; LANES]; ROW_TILES],
    /// One pair is being made while the other is read.
    products: [Pair; 2],
}

/// All rows of `job` against the tiles `tiles` of its part.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn tiles<F: BlockFormat>(job: &Job<'_>, x: Int8<'_>, tiles: Range<usize>) {
    if x.tile(job.rows.start).height < LANES {
        return avx512::tiles::<F>(job, x, tiles);
    }
    let zero = _mm512_setzero_si512();
    let scales = Scaled { low: _mm512_setzero_ps(), other: _mm512_setzero_ps() };
    let mut buffers = Buffers {
        weights: [[zero; 8]; CHUNK],
        scales: [scales; CHUNK],
        sums: [[_mm512_setzero_ps(); LANES]; ROW_TILES],
        products: [[[zero; LANES]; 2]; 2],
    };
    // SAFETY: this function is called where AMX was detected; the thread has no other tiles.
    let _tiles = unsafe { Tiles::configure(&shapes::<F>()) };
    for rows in row_runs(job.rows.clone(), ROW_TILES) {
        for tile in tiles.clone() {
            column::<F>(job, x, tile, rows.clone(), &mut buffers);
        }
    }
}

/// A product covers a block, or half of one where each half has its own scale.
fn shapes<F: BlockFormat>() -> Shapes {
    let k = if F::SCALES == Scales::SuperHalves { BLOCK / 2 } else { BLOCK };
    let (out, x, w) = ((LANES, 64), (LANES, k), (k / 4, 64));
    [out, out, x, x, w, w, (0, 0), (0, 0)]
}

/// Some row tiles against one tile.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn column<F: BlockFormat>(
    job: &Job<'_>,
    x: Int8<'_>,
    tile: usize,
    rows: Range<usize>,
    buffers: &mut Buffers,
) {
    let weights = job.part.tile(tile);
    let blocks = weights.layout.blocks;
    let chunk = blocks.div_ceil(blocks.div_ceil(CHUNK).max(1)).max(1);
    for start in (0..blocks).step_by(chunk) {
        let range = start..(start + chunk).min(blocks);
        load::<F>(weights, range.clone(), buffers);
        for (at, (first, height)) in row_tiles(rows.clone()).enumerate() {
            let x = x.tile(first);
            if x.height < LANES {
                break;
            }
            if start == 0 {
                buffers.sums[at] = [_mm512_setzero_ps(); LANES];
            }
            multiply::<F>(buffers, x, range.clone(), at);
            if range.end == blocks {
                for row in 0..height {
                    job.store(first + row, tile, &lanes_of(buffers.sums[at][row]));
                }
            }
        }
    }
    let last = (rows.end - 1) / LANES * LANES;
    if x.tile(last).height < LANES {
        avx512::row_tile::<F>(job, x.tile(last), tile, last..rows.end);
    }
}

/// Unpacks some blocks, as signed bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c")]
fn load<F: BlockFormat>(tile: Tile<'_>, blocks: Range<usize>, buffers: &mut Buffers) {
    let zero = _mm512_set1_epi8(F::ZERO as i8);
    for (at, block) in blocks.enumerate() {
        let values = tile.block(block);
        avx512::prefetch(values);
        for (to, words) in buffers.weights[at].iter_mut().zip(unpack::<F>(values)) {
            *to = _mm512_sub_epi8(words, zero);
        }
        buffers.scales[at] = Scaled::load::<F>(tile, block);
    }
}

/// The sums at `at` += x · the unpacked blocks, for a whole row tile.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn multiply<F: BlockFormat>(
    buffers: &mut Buffers,
    x: Int8Tile<'_>,
    blocks: Range<usize>,
    at: usize,
) {
    let halves = F::SCALES == Scales::SuperHalves;
    let each = if halves { 1 } else { 2 };
    let count = blocks.len();
    let pairs = count.div_ceil(each);
    let sides = &x.sides.as_chunks::<LANES>().0[blocks.clone()];
    let mut acc = buffers.sums[at];
    product(buffers, x, &blocks, (0, halves));
    for pair in 0..pairs {
        if pair + 1 < pairs {
            product(buffers, x, &blocks, (pair + 1, halves));
        }
        let products = &buffers.products[pair % 2];
        let block = pair * each;
        if halves {
            scale_halves(&mut acc, products, buffers.scales[block], &sides[block]);
            continue;
        }
        scale::<F>(&mut acc, &products[0], buffers.scales[block], &sides[block]);
        if block + 1 < count {
            scale::<F>(&mut acc, &products[1], buffers.scales[block + 1], &sides[block + 1]);
        }
    }
    buffers.sums[at] = acc;
}

/// Adds a block's integer sums.
#[inline]
#[target_feature(enable = "avx512f,fma")]
fn scale<F: BlockFormat>(
    acc: &mut [__m512; LANES],
    sums: &[__m512i; LANES],
    scales: Scaled,
    sides: &[Side; LANES],
) {
    for r in 0..LANES {
        acc[r] = step(acc[r], scales.low, sides[r].scale, sums[r]);
        if F::ZERO == 0 {
            acc[r] = _mm512_fmadd_ps(scales.other, _mm512_set1_ps(sides[r].scaled_sum), acc[r]);
        }
    }
}

/// Adds the integer sums of a block's halves.
#[inline]
#[target_feature(enable = "avx512f,fma")]
fn scale_halves(acc: &mut [__m512; LANES], sums: &Pair, scales: Scaled, sides: &[Side; LANES]) {
    for r in 0..LANES {
        acc[r] = step(acc[r], scales.low, sides[r].scale, sums[0][r]);
        acc[r] = step(acc[r], scales.other, sides[r].scale, sums[1][r]);
    }
}

/// Integer sums of pair `at.0` of the chunk: two blocks (the last twice where it has no second),
/// or, where `at.1` says so, the halves of one.
#[inline(always)]
fn product(buffers: &mut Buffers, x: Int8Tile<'_>, blocks: &Range<usize>, at: (usize, bool)) {
    let (pair, halves) = at;
    let (one, other) =
        if halves { (pair, pair) } else { (pair * 2, (pair * 2 + 1).min(blocks.len() - 1)) };
    let x_of = |block: usize| {
        let start = (blocks.start + block) * LANES;
        x.values[start..start + LANES].as_ptr().cast::<i8>()
    };
    let skip = if halves { BLOCK / 2 } else { 0 };
    let [out0, out1] = &mut buffers.products[pair % 2];
    let weights = |block: usize| buffers.weights[block].as_ptr().cast::<i8>();
    let first = Int8Product { x: x_of(one), w: weights(one), out: out0.as_mut_ptr().cast() };
    let second = Int8Product {
        x: x_of(other).wrapping_add(skip),
        w: weights(other).wrapping_add(skip * LANES),
        out: out1.as_mut_ptr().cast(),
    };
    // SAFETY: called with tiles of `shapes`. A row tile's block is 16 rows of 32 bytes, of which a
    // half product reads 16 from `skip` on; an unpacked block is 8 rows of 64 bytes, 16 for each k
    // in fours, of which it reads 4; sums are 16 rows of 64 bytes.
    unsafe { int8_pair(first, second) };
}
