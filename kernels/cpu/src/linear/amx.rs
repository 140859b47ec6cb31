//! Integer products over quantised blocks with AMX, for row tiles of more than a few rows.
//!
//! A chunk of a weight tile is unpacked into the first-level cache once and multiplied with every
//! row tile; the block's scales are applied to the integer sums by AVX-512, in the order of
//! `blocks`. Zero points are taken off the weights while unpacking: the integers come out the same.
//!
//! Tile instructions take long and overlap only with what stands close to them, so they are spread
//! among the vector instructions: while product i is scaled, product i + 1 is stored, i + 2 made
//! and i + 3 loaded, on and on from row tile to row tile.

use super::{
    Job,
    activations::{Int8, Int8Run, Side},
    avx512::{self, Scaled, step, unpack},
    packed::{BLOCK, BlockFormat, LANES, Scales, Tile},
    row_runs,
    tiles::{Shapes, Tiles, int8_load_w, int8_load_x, int8_product, int8_store},
};
use std::{
    arch::{asm, x86_64::*},
    marker::PhantomData,
    ops::Range,
};

/// Blocks unpacked at a time: 12 KiB.
const CHUNK: usize = 24;
/// Row tiles that share an unpacked chunk, so that their activations stay in the second-level
/// cache.
const ROW_TILES: usize = 16;
/// Products between tiles and registers; a power of two.
const SLOTS: usize = 4;

/// What a thread needs at hand.
struct Buffers {
    weights: [[__m512i; 8]; CHUNK],
    scales: [Scaled; CHUNK],
    /// The running sums of each row tile.
    sums: [[__m512; LANES]; ROW_TILES],
    /// The integer sums of a block, or of half of one.
    products: [[__m512i; LANES]; SLOTS],
}

/// All rows of `job` against the tiles `tiles` of its part.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn tiles<F: BlockFormat>(job: &Job<'_>, x: Int8<'_>, tiles: Range<usize>) {
    if x.tile(job.rows.start).height < LANES || job.cols == 0 {
        return avx512::tiles::<F>(job, x, tiles);
    }
    let zero = _mm512_setzero_si512();
    let scales = Scaled { low: _mm512_setzero_ps(), other: _mm512_setzero_ps() };
    let mut buffers = Buffers {
        weights: [[zero; 8]; CHUNK],
        scales: [scales; CHUNK],
        sums: [[_mm512_setzero_ps(); LANES]; ROW_TILES],
        products: [[zero; LANES]; SLOTS],
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
    let last = (rows.end - 1) / LANES * LANES;
    let few = x.tile(last).height < LANES;
    let row_tiles = (last - rows.start) / LANES + usize::from(!few);
    let blocks = weights.layout.blocks;
    let chunk = blocks.div_ceil(blocks.div_ceil(CHUNK).max(1)).max(1);
    for start in (0..blocks).step_by(chunk) {
        let range = start..(start + chunk).min(blocks);
        load::<F>(weights, range.clone(), buffers);
        if row_tiles > 0 {
            let order = Order::new::<F>(x, rows.start, row_tiles, range);
            multiply::<F>(job, tile, buffers, order);
        }
    }
    if few {
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

/// The products of some row tiles with a chunk, in the order in which they are loaded.
struct Order<'a> {
    x: Int8<'a>,
    /// First row of the first row tile.
    first: usize,
    row_tiles: usize,
    blocks: Range<usize>,
    /// Products of a row tile, an even number: blocks (the last twice where it has no second), or
    /// halves of blocks.
    products: usize,
    /// The values of all row tiles, and how many of them are one row tile's.
    values: &'a [Int8Run],
    stride: usize,
    /// Where the chunk starts in the row tile that comes next, and the product that does.
    start: usize,
    product: usize,
}

impl<'a> Order<'a> {
    fn new<F: BlockFormat>(
        x: Int8<'a>,
        first: usize,
        row_tiles: usize,
        blocks: Range<usize>,
    ) -> Self {
        let count = blocks.len();
        let products = if halves::<F>() { 2 * count } else { count.next_multiple_of(2) };
        let values = x.values(first, row_tiles);
        let (stride, start) = (values.len() / row_tiles, blocks.start * LANES);
        Self { x, first, row_tiles, blocks, products, values, stride, start, product: 0 }
    }

    /// Where x and w of the next product lie; the first one's again after the last.
    #[inline(always)]
    fn next<F: BlockFormat>(&mut self, weights: &[[__m512i; 8]; CHUNK]) -> [*const i8; 2] {
        let (block, half) = match halves::<F>() {
            true => (self.product / 2, self.product % 2),
            false => (self.product.min(self.blocks.len() - 1), 0),
        };
        let x = self.values[self.start + block * LANES..][..LANES].as_ptr().cast::<i8>();
        let w = weights[block].as_ptr().cast::<i8>();
        self.product += 1;
        if self.product == self.products {
            self.product = 0;
            self.start += self.stride;
            if self.start >= self.values.len() {
                self.start = self.blocks.start * LANES;
            }
        }
        // A half is 16 of the 32 bytes of each row of x, and 4 of the 8 rows of w.
        [x.wrapping_add(half * BLOCK / 2), w.wrapping_add(half * BLOCK / 2 * LANES)]
    }
}

fn halves<F: BlockFormat>() -> bool {
    F::SCALES == Scales::SuperHalves
}

/// The sums of each row tile += x · the unpacked blocks; written out after the last block.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn multiply<F: BlockFormat>(
    job: &Job<'_>,
    tile: usize,
    buffers: &mut Buffers,
    mut order: Order<'_>,
) {
    let Buffers { weights, scales, sums, products } = buffers;
    // SAFETY: called with tiles of `shapes`. `Order` names blocks, or halves, of that size.
    unsafe {
        load_tiles::<0>(order.next::<F>(weights));
        int8_product::<0>();
        int8_store::<0>(&mut products[0]);
        load_tiles::<1>(order.next::<F>(weights));
        int8_product::<1>();
        load_tiles::<0>(order.next::<F>(weights));
    }
    let (count, mut made) = (order.blocks.len(), 0);
    let pairs = order.products / 2;
    let rows = order.first..job.rows.end.min(order.first + order.row_tiles * LANES);
    let mut done = Done::new(job, tile, &rows, LANES.div_ceil(pairs));
    for at in 0..order.row_tiles {
        let first = order.first + at * LANES;
        let x = order.x.tile(first);
        let sides = &x.sides.as_chunks::<LANES>().0[order.blocks.clone()];
        let start = order.blocks.start == 0;
        let mut acc = if start { [_mm512_setzero_ps(); LANES] } else { sums[at] };
        for pair in 0..pairs {
            let (one, other) = if halves::<F>() { (pair, pair) } else { (2 * pair, 2 * pair + 1) };
            let mut stage = Stage { weights, products, order: &mut order, made };
            stage.step::<F, 0, 1>(&mut acc, scales[one], &sides[one]);
            stage.made += 1;
            if other < count {
                stage.step::<F, 1, 0>(&mut acc, scales[other], &sides[other]);
            } else {
                stage.pass::<F, 1, 0>();
            }
            made += 2;
            done.write(sums);
        }
        sums[at] = acc;
        if order.blocks.end == job.part.layout.blocks {
            done.begin(at, first..rows.end.min(first + LANES));
        }
    }
    while !done.rows.is_empty() {
        done.write(sums);
    }
}

/// The rows of a finished row tile. They lie far apart, so that each costs a wait for its cache
/// line: they are asked for early and written a few at a time while the next row tile is made.
/// Nothing here calls a function: that would cost the vector registers in use.
struct Done<'a> {
    /// Where the tile's columns of row 0 lie, and from row to row.
    start: *mut f32,
    stride: usize,
    /// The columns that exist.
    mask: __mmask16,
    bias: __m512,
    borrow: PhantomData<&'a mut [f32]>,
    /// Not yet written.
    rows: Range<usize>,
    /// The row tile in `Buffers::sums`.
    at: usize,
    /// Rows written at a time.
    each: usize,
}

impl<'a> Done<'a> {
    /// For some of the rows `rows`, `each` at a time.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new(job: &Job<'a>, tile: usize, rows: &Range<usize>, each: usize) -> Self {
        let (output, width) = (job.output, job.part.width(tile));
        let col = job.part.first + tile * LANES;
        let end = (rows.end - 1) * output.cols + col + width;
        assert!(width <= LANES && col + width <= output.cols && end <= output.len);
        let mask = u16::MAX >> (LANES - width);
        let bias = match output.bias.map(|bias| &bias[col..col + width]) {
            // SAFETY: `width` floats are there, and only those are read.
            Some(bias) => unsafe { _mm512_maskz_loadu_ps(mask, bias.as_ptr()) },
            // Leaves every sum as it is, a negative zero too.
            None => _mm512_set1_ps(-0.0),
        };
        let start = output.start.wrapping_add(col);
        let (stride, borrow) = (output.cols, PhantomData);
        Self { start, stride, mask, bias, borrow, rows: 0..0, at: 0, each }
    }

    #[inline(always)]
    fn begin(&mut self, at: usize, rows: Range<usize>) {
        self.at = at;
        self.prefetch(rows.start..rows.end.min(rows.start + 2 * self.each));
        self.rows = rows;
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn write(&mut self, sums: &[[__m512; LANES]; ROW_TILES]) {
        let ahead = self.rows.start + 2 * self.each;
        self.prefetch(ahead..self.rows.end.min(ahead + self.each));
        for _ in 0..self.each.min(self.rows.len()) {
            let row = self.rows.start;
            let sums = _mm512_add_ps(sums[self.at][row % LANES], self.bias);
            let to = self.start.wrapping_add(row * self.stride);
            // SAFETY: within the output by the assertion in `new`; no other thread has this row and
            // tile.
            unsafe { _mm512_mask_storeu_ps(to, self.mask, sums) };
            self.rows.start += 1;
        }
    }

    /// Asks for what will be written.
    #[inline(always)]
    fn prefetch(&self, rows: Range<usize>) {
        let mut row = rows.start;
        while row < rows.end {
            let to = self.start.wrapping_add(row * self.stride);
            // SAFETY: every x86-64 with tiles has the instruction; it changes nothing that the
            // program sees and faults on no address.
            unsafe { asm!("prefetchw [{}]", in(reg) to, options(nostack, preserves_flags)) };
            row += 1;
        }
    }
}

/// # Safety
/// As of `int8_load_x` and `int8_load_w`.
#[inline(always)]
unsafe fn load_tiles<const SET: usize>([x, w]: [*const i8; 2]) {
    // SAFETY: as the caller promises.
    unsafe {
        int8_load_x::<SET>(x);
        int8_load_w::<SET>(w);
    }
}

/// What the products at work need.
struct Stage<'a, 'x> {
    weights: &'a [[__m512i; 8]; CHUNK],
    products: &'a mut [[__m512i; LANES]; SLOTS],
    order: &'a mut Order<'x>,
    /// The product to be scaled.
    made: usize,
}

impl Stage<'_, '_> {
    /// Scales product `made`, an even one for SET 0, and moves those after it on.
    #[inline]
    #[target_feature(enable = "avx512f,fma")]
    fn step<F: BlockFormat, const SET: usize, const OTHER: usize>(
        &mut self,
        acc: &mut [__m512; LANES],
        scales: Scaled,
        sides: &[Side; LANES],
    ) {
        let [x, w] = self.order.next::<F>(self.weights);
        let slot = self.made % SLOTS;
        // SAFETY: as in `multiply`; set OTHER was multiplied, set SET loaded one step before.
        unsafe {
            int8_store::<OTHER>(&mut self.products[(self.made + 1) % SLOTS]);
            scale::<F, SET, 0>(acc, &self.products[slot], scales, sides);
            int8_product::<SET>();
            scale::<F, SET, 4>(acc, &self.products[slot], scales, sides);
            int8_load_x::<OTHER>(x);
            scale::<F, SET, 8>(acc, &self.products[slot], scales, sides);
            int8_load_w::<OTHER>(w);
            scale::<F, SET, 12>(acc, &self.products[slot], scales, sides);
        }
    }

    /// Lets product `made` be and moves those after it on.
    #[inline(always)]
    fn pass<F: BlockFormat, const SET: usize, const OTHER: usize>(&mut self) {
        let next = self.order.next::<F>(self.weights);
        // SAFETY: as in `step`.
        unsafe {
            int8_store::<OTHER>(&mut self.products[(self.made + 1) % SLOTS]);
            int8_product::<SET>();
            load_tiles::<OTHER>(next);
        }
    }
}

/// Adds four rows, from FIRST on, of a block's integer sums, or of those of its half SET.
#[inline]
#[target_feature(enable = "avx512f,fma")]
fn scale<F: BlockFormat, const SET: usize, const FIRST: usize>(
    acc: &mut [__m512; LANES],
    sums: &[__m512i; LANES],
    scales: Scaled,
    sides: &[Side; LANES],
) {
    let d = if halves::<F>() && SET == 1 { scales.other } else { scales.low };
    for r in FIRST..FIRST + 4 {
        acc[r] = step(acc[r], d, sides[r].scale, sums[r]);
        if F::SCALES.has_min() {
            acc[r] = _mm512_fmadd_ps(scales.other, _mm512_set1_ps(sides[r].scaled_sum), acc[r]);
        }
    }
}
