//! The matrix product out [T, N] = x [T, K] · W [N, K]ᵀ + bias in every weight format.
//!
//! Weights stay quantised in memory, repacked into tiles of 16 outputs. A row's result never depends
//! on the other rows, the threads or the order of the work: each sum runs over K in one fixed order.
//!
//! It refuses columns that split a quantisation block, and shapes that do not fit.

mod lanes;
mod pack;
mod packed;
mod wide;

#[cfg(test)]
mod tests;

use super::{isa::Isa, pool::Pool};
use crate::{KernelError, ShapeError, WeightPart};
use packed::{BLOCK, LANES, Lanes, Part};
use std::{marker::PhantomData, ops::Range};

/// What a product may round besides its f32 sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// `KernelError::Weight` for columns that split a block or differ between parts, or data of the
    /// wrong length; `KernelError::Memory` where there is none.
    pub fn pack(parts: &[WeightPart<'_>], precision: Precision) -> Result<Self, KernelError> {
        let cols = parts.first().map_or(0, |part| part.cols.len());
        let mut packed = Vec::with_capacity(parts.len());
        let mut rows = 0;
        for part in parts {
            if part.cols.len() != cols {
                let found = part.cols.len();
                return Err(KernelError::Weight(format!("parts of {cols} and {found} columns")));
            }
            packed.push(pack::pack(part, rows)?);
            rows += part.rows;
        }
        Ok(Self { parts: packed, rows, cols, precision })
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
        self.parts.iter().map(|part| part.data.bytes().len()).sum()
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
        for (block, out) in out.chunks_mut(BLOCK).enumerate() {
            lanes::widen(part.format, tile, block, &mut values);
            out.iter_mut().zip(&values).for_each(|(out, lanes)| *out = lanes[lane]);
        }
    }
}

/// Room for rounded activations; grows to the largest product seen and stays.
#[derive(Default)]
pub struct LinearScratch {}

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
    let _ = scratch;
    let output = Output::new(out, weight.rows, bias);
    let tiles = weight.parts.iter().map(Part::tiles).sum();
    pool.run(&|thread| {
        let mut mine = share(tiles, pool.threads(), thread);
        let mut first = 0;
        for part in &weight.parts {
            let job = Job { part, x, cols: weight.cols, rows: 0..rows, output: &output };
            let end = first + part.tiles();
            while mine.start < end.min(mine.end) {
                wide::tile(isa, &job, mine.start - first);
                mine.start += 1;
            }
            first = end;
        }
    });
    Ok(())
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

/// The part of `0..total` that thread `thread` of `threads` takes.
fn share(total: usize, threads: usize, thread: usize) -> Range<usize> {
    total * thread / threads..total * (thread + 1) / threads
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
        match self.bias {
            None => out.copy_from_slice(&sums[..width]),
            Some(bias) => {
                let bias = &bias[col..col + width];
                for i in 0..width {
                    out[i] = sums[i] + bias[i];
                }
            }
        }
    }
}
