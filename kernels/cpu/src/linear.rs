//! The matrix product out [T, N] = x [T, K] · W [N, K]ᵀ + bias in every weight format.
//!
//! Weights stay quantised in memory, repacked into tiles of 16 outputs. A row's result never
//! depends on the other rows, the threads or the order of the work: each sum runs over K in one
//! fixed order.
//!
//! It refuses shapes that do not fit.

mod activations;
#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod amx_bf16;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod blocks;
mod lanes;
mod pack;
mod packed;
#[cfg(target_arch = "x86_64")]
mod tiles;
mod wide;

#[cfg(test)]
mod tests;

use super::{isa::Isa, pool::Pool};
use activations::{Rounded, Source};
use kernels::{KernelError, ShapeError, WeightPart};
use packed::{BLOCK, LANES, Lanes, Part, TileFormat, quantised, with_block_format};
use serde::{Deserialize, Serialize};
use std::{marker::PhantomData, ops::Range};

/// What a product may round besides its f32 sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Precision {
    /// Activations to int8 blocks of 32 against quantised weights, and to bf16 against bf16 ones
    /// where the machine has tiles for it.
    Fast,
    /// Nothing: f32 activations against the stored weights.
    Exact,
}

/// A weight [N, K], packed for the CPU.
pub struct CpuWeight {
    parts: Vec<Part>,
    rows: usize,
    cols: usize,
    precision: Precision,
}

impl CpuWeight {
    /// Repacks `parts`, stacked by rows; their formats may differ, their K may not.
    ///
    /// # Errors
    /// `KernelError::Weight` for parts that are not whole or differ in K; `KernelError::Memory`
    /// where there is none.
    pub fn pack(parts: &[WeightPart<'_>], precision: Precision) -> Result<Self, KernelError> {
        let (all_rows, cols) = WeightPart::check(parts)?;
        let mut packed = Vec::with_capacity(parts.len());
        let mut rows = 0;
        for part in parts {
            packed.push(pack::pack(part, rows, precision)?);
            rows += part.rows;
        }
        Ok(Self { parts: packed, rows: all_rows, cols, precision })
    }

    /// N.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// K.
    pub fn cols(&self) -> usize {
        self.cols
    }

    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Of memory, packed.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.data.len()).sum()
    }

    fn kernel(&self, part: &Part, isa: Isa) -> Kernel {
        match (self.precision, part.format) {
            (Precision::Fast, TileFormat::Bf16) if isa == Isa::Amx => Kernel::Bf16,
            (Precision::Fast, format) if quantised(format).is_some() => Kernel::Blocks,
            _ => Kernel::Wide,
        }
    }

    /// out [K] = row `n`, as the stored format means it.
    ///
    /// # Panics
    /// When `n` is not below `rows` or `out` is not K long.
    pub fn read_row(&self, n: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols, "a row has {} columns", self.cols);
        let part = self.parts.iter().find(|part| (part.first..part.first + part.rows).contains(&n));
        let Some(part) = part else { panic!("row {n} of {}", self.rows) };
        let (tile, lane) = ((n - part.first) / LANES, (n - part.first) % LANES);
        let tile = part.tile(tile);
        let mut values = [[0.0; LANES]; BLOCK];
        for block in 0..tile.layout.blocks {
            lanes::widen(part.format, tile, block, &mut values);
            for (place, lanes) in (block * BLOCK..).zip(&values) {
                let col = part.order.as_ref().map_or(place, |order| order[place] as usize);
                if let Some(out) = out.get_mut(col) {
                    *out = lanes[lane];
                }
            }
        }
    }
}

/// Room for activations as products want them; grows to the largest product seen and stays.
#[derive(Default)]
pub struct LinearScratch {
    rounded: RoundedScratch,
    /// In the order of a weight's columns.
    ordered: Vec<f32>,
}

#[derive(Default)]
struct RoundedScratch {
    int8: Rounded,
    bf16: Rounded,
}

/// What to multiply.
#[derive(Clone, Copy)]
pub struct Product<'a> {
    /// [rows, K] row-major.
    pub x: &'a [f32],
    /// T.
    pub rows: usize,
    pub weight: &'a CpuWeight,
    /// [N].
    pub bias: Option<&'a [f32]>,
}

/// out [rows, N] = x · weightᵀ + bias with at most the instructions of `isa`.
///
/// # Errors
/// `KernelError::Shape` when a slice is shorter than its shape.
pub fn linear(
    pool: &Pool,
    isa: Isa,
    scratch: &mut LinearScratch,
    out: &mut [f32],
    product: Product<'_>,
) -> Result<(), KernelError> {
    check(out, &product)?;
    let Product { x, rows, weight, bias } = product;
    let isa = isa.min(Isa::detect());
    let output = Output::new(out, weight.rows, bias);
    let LinearScratch { rounded, ordered } = scratch;
    for parts in weight.parts.chunk_by(|a, b| a.order == b.order) {
        let source = Source { x, rows, cols: weight.cols };
        let source = match &parts[0].order {
            None => source,
            Some(order) => source.in_order(order, ordered),
        };
        multiply(pool, isa, rounded, (weight, parts), source, &output);
    }
    Ok(())
}

/// Some parts of a weight, whose columns lie as those of `source`.
fn multiply(
    pool: &Pool,
    isa: Isa,
    scratch: &mut RoundedScratch,
    (weight, parts): (&CpuWeight, &[Part]),
    source: Source<'_>,
    output: &Output<'_>,
) {
    let Source { x, rows, cols } = source;
    let uses = |kernel| parts.iter().any(|part| weight.kernel(part, isa) == kernel);
    let rounded = Inputs {
        int8: uses(Kernel::Blocks).then(|| scratch.int8.int8(pool, isa, source)),
        bf16: uses(Kernel::Bf16).then(|| scratch.bf16.bf16(pool, isa, source)),
    };
    let tiles = parts.iter().map(Part::tiles).sum();
    let cuts = row_cuts(pool.threads(), tiles, rows);
    let pieces = pieces(pool.threads() / cuts, tiles);
    pool.for_each(cuts * pieces, &|_, item| {
        let rows = row_share(rows, cuts, item % cuts);
        let mine = tile_share(tiles, pieces, item / cuts);
        let mut first = 0;
        for part in parts {
            let end = first + part.tiles();
            let tiles = mine.start.max(first)..mine.end.min(end);
            if !tiles.is_empty() && !rows.is_empty() {
                let job = Job { part, x, cols, rows: rows.clone(), output };
                let tiles = tiles.start - first..tiles.end - first;
                job.run(weight.kernel(part, isa), isa, &rounded, tiles);
            }
            first = end;
        }
    });
}

/// How a part is multiplied.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kernel {
    /// Widened to f32.
    Wide,
    /// Integer products over blocks.
    Blocks,
    /// bf16 tiles.
    Bf16,
}

/// Rounded activations, as far as some part wants them.
struct Inputs<'a> {
    int8: Option<activations::Int8<'a>>,
    bf16: Option<activations::Bf16<'a>>,
}

/// Into how many row shares a product is cut: as few as give every thread some tiles.
fn row_cuts(threads: usize, tiles: usize, rows: usize) -> usize {
    let row_tiles = rows.div_ceil(LANES).max(1);
    let fits = |cuts: &usize| threads.is_multiple_of(*cuts) && *cuts <= row_tiles;
    let enough = |cuts: &usize| tiles >= 4 * (threads / cuts);
    (1..=threads).filter(fits).find(enough).unwrap_or_else(|| {
        // Too few tiles for all threads however the rows are cut: as many cuts as there may be.
        (1..=threads).rfind(fits).unwrap_or(1)
    })
}

/// Into how many pieces `threads` threads cut the tiles: a few each, so that one that comes late or
/// is held up leaves some to the others, but none so small that claiming it counts.
fn pieces(threads: usize, tiles: usize) -> usize {
    const EACH: usize = 4;
    if threads == 1 { 1 } else { (threads * EACH).min(tiles.div_ceil(PAIR)).max(1) }
}

/// Tiles that kernels like to take together.
const PAIR: usize = 2;

/// Piece `at` of `pieces` of the tiles, in whole pairs.
fn tile_share(tiles: usize, pieces: usize, at: usize) -> Range<usize> {
    let pairs = share(tiles.div_ceil(PAIR), pieces, at);
    (pairs.start * PAIR).min(tiles)..(pairs.end * PAIR).min(tiles)
}

/// Share `at` of `cuts` of the rows, in whole row tiles.
fn row_share(rows: usize, cuts: usize, at: usize) -> Range<usize> {
    let tiles = share(rows.div_ceil(LANES), cuts, at);
    (tiles.start * LANES).min(rows)..(tiles.end * LANES).min(rows)
}

fn check(out: &[f32], product: &Product<'_>) -> Result<(), KernelError> {
    let Product { x, rows, weight, bias } = *product;
    let enough = |what: &str, len: usize, shape: [usize; 2]| {
        if shape[0].checked_mul(shape[1]).is_some_and(|wanted| wanted <= len) {
            return Ok(());
        }
        let detail = format!("{what} of {len} values is not [{}, {}]", shape[0], shape[1]);
        Err(ShapeError { op: "linear", detail })
    };
    enough("out", out.len(), [rows, weight.rows])?;
    enough("x", x.len(), [rows, weight.cols])?;
    enough("bias", bias.map_or(weight.rows, <[f32]>::len), [1, weight.rows])?;
    Ok(())
}

/// Share `at` of `shares` of `0..total`.
fn share(total: usize, shares: usize, at: usize) -> Range<usize> {
    total * at / shares..total * (at + 1) / shares
}

/// First row and height of each row tile; `rows` starts at one.
fn row_tiles(rows: Range<usize>) -> impl Iterator<Item = (usize, usize)> {
    let end = rows.end;
    rows.step_by(LANES).map(move |first| (first, LANES.min(end - first)))
}

/// `rows` in runs of `tiles` row tiles.
#[cfg(target_arch = "x86_64")]
fn row_runs(rows: Range<usize>, tiles: usize) -> impl Iterator<Item = Range<usize>> {
    let end = rows.end;
    rows.step_by(tiles * LANES).map(move |first| first..end.min(first + tiles * LANES))
}

/// Rows of x and one part of the weight.
struct Job<'a> {
    part: &'a Part,
    x: &'a [f32],
    /// K.
    cols: usize,
    rows: Range<usize>,
    output: &'a Output<'a>,
}

impl Job<'_> {
    /// Multiplies with the tiles `tiles` of the part.
    fn run(&self, kernel: Kernel, isa: Isa, x: &Inputs<'_>, tiles: Range<usize>) {
        match (kernel, x.int8, x.bf16) {
            (Kernel::Blocks, Some(x), _) => with_block_format!(
                self.part.format,
                F => blocks::tiles::<F>(isa, self, x, tiles),
                dense => ()
            ),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `CpuWeight::kernel` names this one only where AMX was detected.
            (Kernel::Bf16, _, Some(x)) => unsafe { amx_bf16::tiles(self, x, tiles) },
            _ => wide::tiles(isa, self, tiles),
        }
    }

    /// Writes the sums of one row and tile.
    #[inline(always)]
    fn store(&self, row: usize, tile: usize, sums: &Lanes) {
        self.output.store(row, self.part.first + tile * LANES, self.part.width(tile), sums);
    }
}

/// The result [rows, N], written by many threads, each element once.
struct Output<'a> {
    start: *mut f32,
    len: usize,
    /// N.
    cols: usize,
    bias: Option<&'a [f32]>,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: threads write disjoint elements: each takes other (rows, tile) pairs.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    fn new(out: &'a mut [f32], cols: usize, bias: Option<&'a [f32]>) -> Self {
        let (start, len) = (out.as_mut_ptr(), out.len());
        Self { start, len, cols, bias, borrow: PhantomData }
    }

    /// out [row, col..col + width] = sums + bias.
    #[inline(always)]
    fn store(&self, row: usize, col: usize, width: usize, sums: &Lanes) {
        let at = row * self.cols + col;
        assert!(width <= LANES && col + width <= self.cols && at + width <= self.len);
        // SAFETY: within the slice by the assertion; no other thread has this row and tile.
        let out = unsafe { std::slice::from_raw_parts_mut(self.start.add(at), width) };
        let bias = self.bias.map(|bias| &bias[col..col + width]);
        match (out.as_chunks_mut::<LANES>().0.first_mut(), bias) {
            (Some(out), None) => *out = *sums,
            (Some(out), Some(bias)) => {
                for i in 0..LANES {
                    out[i] = sums[i] + bias[i];
                }
            }
            (None, None) => out.copy_from_slice(&sums[..width]),
            (None, Some(bias)) => {
                for i in 0..width {
                    out[i] = sums[i] + bias[i];
                }
            }
        }
    }
}
