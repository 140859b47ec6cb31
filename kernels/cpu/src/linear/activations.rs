//! Activations rounded for integer and bf16 products.
//!
//! Rows are cut into row tiles of 16, and a row tile is stored block after block of 32 k, so that a
//! matrix tile is one run of memory. A last row tile of up to `FEW_ROWS` rows is stored as high as
//! it is; a higher one is filled up with zero rows. Rounding looks at one row's block alone.

use super::packed::{BLOCK, LANES};
use crate::{Isa, Pool};
use std::{marker::PhantomData, ops::Range};

/// Up to this many rows are multiplied row by row; more make a matrix tile.
pub(super) const FEW_ROWS: usize = 8;
/// Values below which rounding on the calling thread is cheaper than waking others.
const ALONE: usize = 1 << 14;

/// What one block of one row needs besides its int8 values.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Side {
    /// x ≈ scale · q.
    pub scale: f32,
    /// scale · Σ q.
    pub scaled_sum: f32,
    /// Σ q over the block, its first half and its second.
    pub sum: i32,
    pub low_sum: i32,
    pub high_sum: i32,
}

impl Side {
    #[inline(always)]
    pub fn new(scale: f32, low_sum: i32, high_sum: i32) -> Self {
        let sum = low_sum + high_sum;
        Self { scale, scaled_sum: scale * sum as f32, sum, low_sum, high_sum }
    }
}

/// 32 int8 values that never straddle a cache line.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub(super) struct Int8Run(pub [i8; BLOCK]);

/// 32 bf16 values: a cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Bf16Run(pub [u16; BLOCK]);

/// Rounded activations; grows to the largest product seen and stays.
#[derive(Default)]
pub(super) struct Rounded {
    bytes: Vec<Int8Run>,
    sides: Vec<Side>,
    pairs: Vec<Bf16Run>,
}

/// Rows 16 i … of int8 activations.
#[derive(Clone, Copy)]
pub(super) struct Int8Tile<'a> {
    /// [blocks][height] runs of 32 values.
    pub values: &'a [Int8Run],
    /// [blocks][height].
    pub sides: &'a [Side],
    /// Rows stored, the zero ones included.
    pub height: usize,
}

/// Rows stored for the row tile that starts at row `first` of `rows`.
fn stored_height(rows: usize, first: usize) -> usize {
    match rows - first {
        few if few <= FEW_ROWS => few,
        _ => LANES,
    }
}

/// All row tiles of int8 activations.
#[derive(Clone, Copy)]
pub(super) struct Int8<'a> {
    values: &'a [Int8Run],
    sides: &'a [Side],
    rows: usize,
    blocks: usize,
}

impl<'a> Int8<'a> {
    /// The row tile that starts at row `first`, a multiple of 16.
    #[inline(always)]
    pub fn tile(&self, first: usize) -> Int8Tile<'a> {
        let height = stored_height(self.rows, first);
        let range = first * self.blocks..(first + height) * self.blocks;
        Int8Tile { values: &self.values[range.clone()], sides: &self.sides[range], height }
    }

    /// [row_tiles][blocks][16] runs of `row_tiles` whole row tiles, the first at row `first`.
    pub fn values(&self, first: usize, row_tiles: usize) -> &'a [Int8Run] {
        &self.values[first * self.blocks..(first + row_tiles * LANES) * self.blocks]
    }
}

/// All row tiles of bf16 activations; none is filled up.
#[derive(Clone, Copy)]
pub(super) struct Bf16<'a> {
    values: &'a [Bf16Run],
    rows: usize,
    blocks: usize,
}

impl<'a> Bf16<'a> {
    /// [blocks][height] runs of 32 values, and the height, of the row tile that starts at `first`.
    pub fn tile(&self, first: usize) -> (&'a [Bf16Run], usize) {
        let height = (self.rows - first).min(LANES);
        (&self.values[first * self.blocks..(first + height) * self.blocks], height)
    }
}

/// The first elements of a slice, written by many threads, each element by one of them.
struct DisjointSlice<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: the threads that share it write disjoint elements.
unsafe impl<T: Send> Sync for DisjointSlice<'_, T> {}

impl<'a, T: Copy> DisjointSlice<'a, T> {
    fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), borrow: PhantomData }
    }

    #[inline(always)]
    fn set(&self, at: usize, value: T) {
        assert!(at < self.len);
        // SAFETY: in bounds; every row has elements of its own and one thread.
        unsafe { self.start.add(at).write(value) }
    }
}

/// x [rows, cols], what to round and where each row's blocks go.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub x: &'a [f32],
    pub rows: usize,
    pub cols: usize,
}

impl Source<'_> {
    /// The same rows with column `order[i]` at i, zero where that is none.
    pub fn in_order<'b>(&self, order: &[u32], room: &'b mut Vec<f32>) -> Source<'b> {
        grow(room, self.rows * order.len(), 0.0);
        for (row, to) in room.chunks_exact_mut(order.len()).take(self.rows).enumerate() {
            let from = &self.x[row * self.cols..][..self.cols];
            for (to, &col) in to.iter_mut().zip(order) {
                *to = from.get(col as usize).copied().unwrap_or(0.0);
            }
        }
        Source { x: room, rows: self.rows, cols: order.len() }
    }

    fn blocks(&self) -> usize {
        self.cols.div_ceil(BLOCK)
    }

    /// Calls `each` with ranges of rows on all threads, or once where there is little to do.
    fn over_rows(&self, pool: &Pool, each: &(dyn Fn(Range<usize>) + Sync)) {
        if self.rows * self.cols < ALONE || self.rows == 1 {
            each(0..self.rows);
        } else {
            let shares = (2 * pool.threads()).min(self.rows);
            pool.for_each(shares, &|_, at| each(super::share(self.rows, shares, at)));
        }
    }

    /// Block `block` of `row`, padded with zeros.
    #[inline(always)]
    fn block(&self, row: usize, block: usize) -> [f32; BLOCK] {
        let values = &self.x[row * self.cols..][..self.cols][block * BLOCK..];
        match values.first_chunk() {
            Some(whole) => *whole,
            None => {
                let mut padded = [0.0; BLOCK];
                padded[..values.len()].copy_from_slice(values);
                padded
            }
        }
    }
}

impl Rounded {
    /// Rounds to int8 blocks.
    pub fn int8(&mut self, pool: &Pool, isa: Isa, from: Source<'_>) -> Int8<'_> {
        let (rows, blocks) = (from.rows, from.blocks());
        let last = rows / LANES * LANES;
        let stored = (last + if last < rows { stored_height(rows, last) } else { 0 }) * blocks;
        grow(&mut self.bytes, stored, Int8Run([0; BLOCK]));
        grow(&mut self.sides, stored, Side::default());
        let used = rows * blocks;
        if stored > used {
            // Padding rows lie between others; those are all written below.
            self.bytes[last * blocks..stored].fill(Int8Run([0; BLOCK]));
            self.sides[last * blocks..stored].fill(Side::default());
        }
        let (bytes, sides) =
            (DisjointSlice::new(&mut self.bytes), DisjointSlice::new(&mut self.sides));
        from.over_rows(pool, &|range| int8_rows(isa, &from, range, &bytes, &sides));
        let (values, sides) = (&self.bytes[..stored], &self.sides[..stored]);
        Int8 { values, sides, rows, blocks }
    }

    /// Rounds to bf16.
    pub fn bf16(&mut self, pool: &Pool, isa: Isa, from: Source<'_>) -> Bf16<'_> {
        let (rows, blocks) = (from.rows, from.blocks());
        grow(&mut self.pairs, rows * blocks, Bf16Run([0; BLOCK]));
        let pairs = DisjointSlice::new(&mut self.pairs);
        from.over_rows(pool, &|range| bf16_rows(isa, &from, range, &pairs));
        Bf16 { values: &self.pairs[..rows * blocks], rows, blocks }
    }
}

fn grow<T: Clone>(to: &mut Vec<T>, len: usize, zero: T) {
    if to.len() < len {
        to.resize(len, zero);
    }
}

type Bytes<'a> = DisjointSlice<'a, Int8Run>;
type Sides<'a> = DisjointSlice<'a, Side>;

// No closures in the bodies: those would not inherit the instruction set.

/// Rounds rows with a function that is inlined into the caller's instruction set.
macro_rules! int8_body {
    ($round:path, $from:ident, $rows:ident, $bytes:ident, $sides:ident) => {
        for row in $rows {
            let first = row / LANES * LANES;
            let height = stored_height($from.rows, first);
            let start = first * $from.blocks() + row - first;
            for block in 0..$from.blocks() {
                let (q, side) = $round(&$from.block(row, block));
                $bytes.set(start + block * height, Int8Run(q));
                $sides.set(start + block * height, side);
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2")]
fn int8_avx512(from: &Source<'_>, rows: Range<usize>, bytes: &Bytes<'_>, sides: &Sides<'_>) {
    int8_body!(super::avx512::round_block, from, rows, bytes, sides);
}

fn int8_rows(
    isa: Isa,
    from: &Source<'_>,
    rows: Range<usize>,
    bytes: &Bytes<'_>,
    sides: &Sides<'_>,
) {
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx512 {
        // SAFETY: `linear` passes only what was detected on this machine.
        return unsafe { int8_avx512(from, rows, bytes, sides) };
    }
    let _ = isa;
    int8_body!(round_block, from, rows, bytes, sides);
}

#[inline(always)]
fn bf16_body(from: &Source<'_>, rows: Range<usize>, pairs: &DisjointSlice<'_, Bf16Run>) {
    for row in rows {
        let first = row / LANES * LANES;
        let height = (from.rows - first).min(LANES);
        let start = first * from.blocks() + row - first;
        for block in 0..from.blocks() {
            let x = from.block(row, block);
            let mut rounded = [0; BLOCK];
            for i in 0..BLOCK {
                rounded[i] = round_bf16(x[i]);
            }
            pairs.set(start + block * height, Bf16Run(rounded));
        }
    }
}

/// Runs a body compiled for the instruction set.
macro_rules! on_isa {
    ($name:ident, $body:ident, ($($arg:ident: $type:ty),*)) => {
        #[cfg(target_arch = "x86_64")]
        fn $name(isa: Isa, $($arg: $type),*) {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            fn avx512($($arg: $type),*) {
                $body($($arg),*);
            }
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $type),*) {
                $body($($arg),*);
            }
            match isa {
                // SAFETY: `linear` passes only what was detected on this machine.
                Isa::Amx | Isa::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                Isa::Avx2 => unsafe { avx2($($arg),*) },
                Isa::Portable => $body($($arg),*),
            }
        }

        #[cfg(not(target_arch = "x86_64"))]
        fn $name(_: Isa, $($arg: $type),*) {
            $body($($arg),*);
        }
    };
}

on_isa!(bf16_rows, bf16_body, (
    from: &Source<'_>, rows: Range<usize>, pairs: &DisjointSlice<'_, Bf16Run>
));

/// To nearest, ties to even; a NaN stays one.
#[inline(always)]
fn round_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    let bits = if bits & 0x7fff_ffff > 0x7f80_0000 { bits | 0x40_0000 } else { rounded };
    (bits >> 16) as u16
}

/// From the bits of the largest magnitude: what to multiply with, and the scale that undoes it.
/// With a NaN or an infinity the scale is NaN; below what can be divided by it is 0.
#[inline(always)]
pub(super) fn scale_of(max_bits: u32) -> (f32, f32) {
    let max = f32::from_bits(max_bits);
    if max_bits >= f32::INFINITY.to_bits() {
        (0.0, f32::NAN)
    } else if max > 1e-36 {
        (127.0 / max, max * (1.0 / 127.0))
    } else {
        (0.0, 0.0)
    }
}

/// To int8, the largest to ±127.
fn round_block(x: &[f32; BLOCK]) -> ([i8; BLOCK], Side) {
    /// Adding it leaves a small number's nearest integer in the low bits.
    const MAGIC: f32 = 12_582_912.0;
    let max = x.iter().fold(0, |max, x| (x.to_bits() & 0x7fff_ffff).max(max));
    let (inverse, scale) = scale_of(max);
    let q = x.map(|x| (x * inverse + MAGIC).to_bits() as i8);
    let sum = |half: &[i8]| half.iter().map(|&q| i32::from(q)).sum::<i32>();
    (q, Side::new(scale, sum(&q[..LANES]), sum(&q[LANES..])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_round_to_nearest() {
        let mut x = [0.0; BLOCK];
        x[0] = -254.0;
        x[1] = 5.0;
        x[20] = 3.2;
        let (q, side) = round_block(&x);
        assert_eq!((q[0], q[1], q[20], q[31]), (-127, 2, 2, 0));
        assert_eq!((side.scale, side.sum, side.low_sum, side.high_sum), (2.0, -123, -125, 2));
        assert_eq!(side.scaled_sum, -246.0);
        x[3] = f32::INFINITY;
        assert!(round_block(&x).1.scale.is_nan());
        assert_eq!(round_block(&[1e-40; BLOCK]).1.scale, 0.0);
    }

    #[test]
    fn bf16_rounds_to_even() {
        for x in [0.0, -0.0, 1.0, 1.003_906_3, 1.011_718_8, -3.3e38, f32::MAX, 1e-40] {
            assert_eq!(round_bf16(x), half::bf16::from_f32(x).to_bits(), "{x}");
        }
        assert!(half::bf16::from_bits(round_bf16(f32::NAN)).is_nan());
    }
}
