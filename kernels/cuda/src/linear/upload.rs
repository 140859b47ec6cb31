//! Weights on their way to the device.

use super::route::{RECORDS_ROWS_MAX, Route, route};
use crate::{
    Array, Cuda, Driver, Element,
    elementwise::VECTOR,
    fp8::ScaledRows,
    random::random,
    shares::by_shares,
    skinny::{Extent, Numbers, Place, Records},
};
use kernels::{
    Format, KernelError, Random, RandomFormat, Scaled, Stored, WeightPart, plain::dequant,
};
use std::ops::Range;

/// Rows are sent in pieces of about this size.
pub(crate) const PIECE_BYTES: usize = 8 << 20;

/// [N, K], row-major.
pub(super) fn bf16<D: Driver>(
    device: &Cuda<D>,
    parts: &[WeightPart<'_>],
    (rows, cols): (usize, usize),
) -> Result<Array<D>, KernelError> {
    let row_bytes = cols * Element::Bf16.bytes();
    let values = Array::zeroed(device.driver(), "a weight", rows.saturating_mul(row_bytes))?;
    let staged = Staged::new(device, parts, cols)?;
    pieces(parts, cols, |first, part, rows| {
        staged.bring((part, rows), (&values, first * row_bytes))
    })?;
    Ok(values)
}

/// Records of zeros, once the device has chosen how it multiplies what is unpacked of them.
pub(crate) fn room<D: Driver>(
    driver: &D,
    numbers: Numbers,
    extent: Extent,
) -> Result<Records<D>, KernelError> {
    let unpacked = route(RECORDS_ROWS_MAX + 1, numbers, extent, driver.facts().fp8_products());
    driver.expect_products((extent.rows, extent.cols), unpacked == Route::Codes)?;
    Records::zeroed(driver, numbers, extent)
}

/// [N, K] in records of bf16 or, rounded on the device, of e4m3.
pub(super) fn records<D: Driver>(
    device: &Cuda<D>,
    parts: &[WeightPart<'_>],
    extent: Extent,
    numbers: Numbers,
) -> Result<Records<D>, KernelError> {
    let driver = device.driver();
    let values = room(driver, numbers, extent)?;
    Piece::room(driver, numbers, extent)?.fill(device, parts, &values.place(driver))?;
    Ok(values)
}

/// Rows on their way into records of bf16 or, rounded on the device, of e4m3.
pub(crate) struct Piece<D: Driver> {
    /// In bf16.
    rows: Array<D>,
    /// In e4m3.
    codes: Option<Array<D>>,
}

impl<D: Driver> Piece<D> {
    /// For weights of that extent.
    pub(crate) fn room(driver: &D, numbers: Numbers, extent: Extent) -> Result<Self, KernelError> {
        let row_bytes = extent.cols * Element::Bf16.bytes();
        let rows_most = rows_each(row_bytes).min(extent.rows);
        let array = |bytes| Array::zeroed(driver, "a piece of a weight", bytes);
        let is_e4m3 = numbers == Numbers::E4m3;
        let codes = is_e4m3.then(|| array(rows_most * extent.cols)).transpose()?;
        Ok(Self { rows: array(rows_most * row_bytes)?, codes })
    }

    pub(crate) fn fill(
        &self,
        device: &Cuda<D>,
        parts: &[WeightPart<'_>],
        to: &Place,
    ) -> Result<(), KernelError> {
        let (driver, cols) = (device.driver(), to.extent.cols);
        let staged = Staged::new(device, parts, cols)?;
        let x = self.rows.address(driver);
        pieces(parts, cols, |first, part, rows| {
            let count = rows.len();
            staged.bring((part, rows), (&self.rows, 0))?;
            let (Some(codes), Some(scales)) = (&self.codes, to.scales) else {
                return device.pack_rows(to, (first, count), x);
            };
            let codes = codes.address(driver);
            device.quantize_rows(&ScaledRows {
                codes,
                scales: scales + (first * size_of::<f32>()) as u64,
                x,
                rows: count as u64,
                cols: cols as u64,
            })?;
            device.pack_rows(to, (first, count), codes)
        })
    }
}

fn rows_each(row_bytes: usize) -> usize {
    (PIECE_BYTES / row_bytes).max(1)
}

/// Hands out all rows, some of a part at a time, with the number in the stack of the first.
fn pieces(
    parts: &[WeightPart<'_>],
    cols: usize,
    mut take: impl FnMut(usize, &WeightPart<'_>, Range<usize>) -> Result<(), KernelError>,
) -> Result<(), KernelError> {
    let rows_each = rows_each(cols * Element::Bf16.bytes());
    let mut first = 0;
    for part in parts {
        for start in (0..part.rows).step_by(rows_each) {
            take(first + start, part, start..(start + rows_each).min(part.rows))?;
        }
        first += part.rows;
    }
    Ok(())
}

/// Brings rows of a stack to the device, as bf16. Rows of e4m3 go as they are, beside their scales,
/// and random ones not at all: the device makes bf16 of them. Everything else is widened here.
struct Staged<'a, D: Driver> {
    device: &'a Cuda<D>,
    /// Codes of a piece and, behind them, scales.
    e4m3: Option<Array<D>>,
}

impl<'a, D: Driver> Staged<'a, D> {
    fn new(
        device: &'a Cuda<D>,
        parts: &[WeightPart<'_>],
        cols: usize,
    ) -> Result<Self, KernelError> {
        let bytes = |part: &WeightPart<'_>| {
            let scaled = e4m3(part)?;
            let rows = rows_each(cols * Element::Bf16.bytes()).min(part.rows);
            Some(rows * (cols + scaled.count(cols) * size_of::<f32>()))
        };
        let most = parts.iter().filter_map(bytes).max();
        let array = |bytes| Array::zeroed(device.driver(), "a piece of a weight", bytes);
        Ok(Self { device, e4m3: most.map(array).transpose()? })
    }

    /// Rows of a part, from an offset of an array on.
    fn bring(
        &self,
        (part, rows): (&WeightPart<'_>, Range<usize>),
        (to, offset): (&Array<D>, usize),
    ) -> Result<(), KernelError> {
        let driver = self.device.driver();
        let out = to.address(driver) + offset as u64;
        if let Some(random) = random_bf16(part) {
            return self.device.random_rows(out, random, (rows.start, rows.len(), part.cols));
        }
        if let (Some(scaled), Some(staged)) = (e4m3(part), &self.e4m3) {
            return self.bring_e4m3((scaled, rows, part.cols), staged, out);
        }
        let row_bytes = part.cols * Element::Bf16.bytes();
        driver.write_with(&to.memory, offset, rows.len() * row_bytes, &mut |to| {
            rounded(part, rows.start, to);
        })
    }

    fn bring_e4m3(
        &self,
        (scaled, rows, cols): (&Scaled<'_>, Range<usize>, usize),
        staged: &Array<D>,
        out: u64,
    ) -> Result<(), KernelError> {
        let driver = self.device.driver();
        let bytes = rows.len() * cols;
        let codes = &scaled.values[rows.start * cols..][..bytes];
        driver.write_with(&staged.memory, 0, bytes, &mut |to| copied(codes, to))?;
        let count = scaled.count(cols);
        let scales = &scaled.scales[rows.start * count..rows.end * count];
        let scales: Vec<u8> = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
        driver.write(&staged.memory, bytes, &scales)?;
        let codes = staged.address(driver);
        let scales = codes + bytes as u64;
        self.device.dequantize_rows((out, codes, scales), bytes, scaled.run)
    }
}

/// What the device widens: columns are whole vectors, and whole runs of one scale.
fn e4m3<'a>(part: &'a WeightPart<'_>) -> Option<&'a Scaled<'a>> {
    let Stored::Scaled(scaled) = &part.stored else { return None };
    let whole = part.cols.is_multiple_of(scaled.run) && scaled.run.is_multiple_of(VECTOR);
    whole.then_some(scaled)
}

/// Bytes that a thread copies or makes at least.
const COPIED_BYTES: usize = 2 << 20;
const MADE_BYTES: usize = 128 << 10;

fn copied(from: &[u8], to: &mut [u8]) {
    by_shares(to, (1, COPIED_BYTES), |at, to| to.copy_from_slice(&from[at..][..to.len()]));
}

/// Rows of a part from `first` on, as bf16.
fn rounded(part: &WeightPart<'_>, first: usize, to: &mut [u8]) {
    let row_bytes = part.cols * Element::Bf16.bytes();
    if let Stored::Plain { format: Format::Bf16, data } = &part.stored {
        return copied(&data[first * row_bytes..][..to.len()], to);
    }
    by_shares(to, (row_bytes, MADE_BYTES), |at, to| {
        let mut row = vec![0.0; part.cols];
        for (n, to) in to.chunks_exact_mut(row_bytes).enumerate() {
            dequant::part_row(part, first + at / row_bytes + n, &mut row);
            for (to, value) in to.as_chunks_mut().0.iter_mut().zip(&row) {
                *to = half::bf16::from_f32(*value).to_le_bytes();
            }
        }
    });
}

/// Random integers that are to be bf16 are widened on the host, as a checkpoint's are.
fn random_bf16(part: &WeightPart<'_>) -> Option<Random> {
    random(part).filter(|random| random.format == RandomFormat::Bf16)
}
