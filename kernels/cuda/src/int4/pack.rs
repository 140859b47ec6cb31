//! Brings 4-bit weights to the device, which puts them into records. Kernel: `skinny_pack.cu`.

use super::{
    indices,
    part::{Columns, Int4Part, Source},
    plan::Plan,
};
use crate::{
    Array, Cuda, Driver, Launch,
    linear::upload::PIECE_BYTES,
    random::RandomRecords,
    shares::by_shares,
    skinny::{Bytes, Extent, Place, STRIP},
};
use kernels::KernelError;
use std::ops::Range;

const THREADS: usize = 256;
/// 128 as bf16: with a small integer in the mantissa, 128 and that.
const BIASED: u32 = 0x4300;
/// Bytes that a thread of the host packs at least.
const PACKED_BYTES: usize = 128 << 10;

#[repr(C)]
#[derive(Clone, Copy)]
struct PackInt4Args {
    records: u64,
    from: u64,
    factors: u64,
    columns: u64,
    runs: u64,
    words: u64,
    rows: u32,
    cols: u32,
    groups: u32,
    strip_records: u32,
    unit: u32,
    unused: u32,
}

/// What the device holds while weights of one extent and plan come: which column takes which place,
/// and some strips' rows.
pub(super) struct Piece<D: Driver> {
    /// [places] the column at each, -1 for none.
    pub columns: Array<D>,
    /// [places / unit] the group of a run of places, -1 for none.
    runs: Array<D>,
    /// Consecutive places of one group.
    unit: usize,
    rows: Array<D>,
}

impl<D: Driver> Piece<D> {
    pub(super) fn room(
        driver: &D,
        plan: &Plan,
        columns: &Columns<'_>,
        extent: Extent,
    ) -> Result<Self, KernelError> {
        let row_bytes = columns.cols / 2 + columns.count * size_of::<u32>();
        let rows = rows_each(row_bytes).min(extent.rows);
        Ok(Self {
            columns: indices(driver, "places of columns", &plan.columns)?,
            runs: indices(driver, "groups of columns", &plan.groups)?,
            unit: plan.unit,
            rows: Array::zeroed(driver, "a piece of a weight", rows * row_bytes)?,
        })
    }

    /// Fills the records of a weight.
    pub(super) fn fill(
        &self,
        device: &Cuda<D>,
        from: &Source<'_>,
        to: &Place,
    ) -> Result<(), KernelError> {
        let (extent, strip_records) = (to.extent, to.extent.records(to.numbers));
        match from {
            Source::Random(parts) => {
                let records = RandomRecords {
                    address: to.values,
                    bytes: Bytes::of(to.numbers, extent).values,
                    cols: extent.cols,
                    lead: extent.lead,
                    records: strip_records,
                    group: self.unit,
                    pairs: extent.pairs,
                };
                device.random_records(&records, parts)
            }
            Source::Integers(parts) => self.bring(&device.driver, parts, to),
        }
    }

    /// Some strips at a time.
    fn bring(&self, driver: &D, parts: &[Int4Part<'_>], to: &Place) -> Result<(), KernelError> {
        let (extent, strip_records) = (to.extent, to.extent.records(to.numbers));
        let rows = Rows::of(parts, extent);
        let from = self.rows.address(driver);
        let strip_bytes = strip_records * to.numbers.record_bytes();
        let rows_each = rows_each(rows.bytes(1));
        for first in (0..extent.rows).step_by(rows_each) {
            let here = first..(first + rows_each).min(extent.rows);
            let (bytes, strips) = (rows.bytes(here.len()), here.len().div_ceil(STRIP));
            let mut fill = |to: &mut [u8]| rows.put(here.clone(), to);
            driver.write_with(&self.rows.memory, 0, bytes, &mut fill)?;
            let words = strips * strip_bytes / 4;
            let args = PackInt4Args {
                records: to.values + (first / STRIP * strip_bytes) as u64,
                from,
                factors: from + (here.len() * rows.row_bytes) as u64,
                columns: self.columns.address(driver),
                runs: self.runs.address(driver),
                words: words as u64,
                rows: here.len() as u32,
                cols: rows.cols as u32,
                groups: rows.groups as u32,
                strip_records: strip_records as u32,
                unit: self.unit as u32,
                unused: 0,
            };
            let blocks = words.div_ceil(THREADS) as u32;
            let launch = Launch::new("skinny_pack_int4", [blocks, 1, 1], THREADS as u32, &args);
            driver.launch(launch)?;
        }
        Ok(())
    }
}

/// Rows that come at once: whole strips.
fn rows_each(row_bytes: usize) -> usize {
    (PIECE_BYTES / (STRIP * row_bytes)).max(1) * STRIP
}

/// Rows of a stack, as records have them one after another.
struct Rows<'a> {
    parts: &'a [Int4Part<'a>],
    extent: Extent,
    /// K.
    cols: usize,
    /// G.
    groups: usize,
    /// Of the integers.
    row_bytes: usize,
}

impl<'a> Rows<'a> {
    fn of(parts: &'a [Int4Part<'a>], extent: Extent) -> Self {
        let first = parts[0].columns();
        let (cols, groups) = (first.cols, first.count);
        Self { parts, extent, cols, groups, row_bytes: cols / 2 }
    }

    /// Of so many rows, with their scales and zero points.
    fn bytes(&self, rows: usize) -> usize {
        rows * (self.row_bytes + self.groups * size_of::<u32>())
    }

    /// The part that has what lies at `row`, and which of its rows that is.
    fn part_of(&self, row: usize) -> Option<(&Int4Part<'a>, usize)> {
        let mut row = self.extent.row_of_matrix(row);
        for part in self.parts {
            if row < part.rows {
                return Some((part, row));
            }
            row -= part.rows;
        }
        None
    }

    /// [rows, K] integers, two to a byte, then [rows, G] scales and zero points as records have
    /// them.
    fn put(&self, rows: Range<usize>, to: &mut [u8]) {
        let (numbers, factors) = to.split_at_mut(rows.len() * self.row_bytes);
        let at_most = |start: usize, unit: usize| rows.start + start / unit..rows.end;
        by_shares(numbers, (self.row_bytes, PACKED_BYTES), |start, to| {
            let rows = at_most(start, self.row_bytes).filter_map(|row| self.part_of(row));
            for (to, (part, row)) in to.chunks_exact_mut(self.row_bytes).zip(rows) {
                part.put_row(row, to);
            }
        });
        let factors_bytes = self.groups * size_of::<u32>();
        by_shares(factors, (factors_bytes, PACKED_BYTES), |start, to| {
            let rows = at_most(start, factors_bytes).filter_map(|row| self.part_of(row));
            for (to, (part, row)) in to.chunks_exact_mut(factors_bytes).zip(rows) {
                for (group, to) in to.as_chunks_mut().0.iter_mut().enumerate() {
                    let (zero, scale) = (part.zero(row, group), part.scale(row, group));
                    let factor = (BIASED | u32::from(zero)) << 16 | u32::from(scale.to_bits());
                    *to = factor.to_le_bytes();
                }
            }
        });
    }
}
