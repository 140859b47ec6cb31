//! Weights on their way to the device.

use super::route::{RECORDS_ROWS_MAX, Route, route};
use crate::{
    Array, Cuda, Driver, Element,
    fp8::ScaledRows,
    random::random,
    skinny::{Extent, Numbers, Records},
};
use kernels::{Format, KernelError, Random, RandomFormat, Stored, WeightPart, plain::dequant};
use std::ops::Range;

/// Rows are sent in pieces of about this size.
const PIECE_BYTES: usize = 8 << 20;

/// [N, K], row-major.
pub(super) fn bf16<D: Driver>(
    device: &Cuda<D>,
    parts: &[WeightPart<'_>],
    (rows, cols): (usize, usize),
) -> Result<Array<D>, KernelError> {
    let row_bytes = cols * Element::Bf16.bytes();
    let values = Array::zeroed(device.driver(), "a weight", rows.saturating_mul(row_bytes))?;
    bf16_at(device, parts, cols, (&values, 0))?;
    Ok(values)
}

/// Writes `parts` from row `first_row` of an array of bf16 on.
pub(crate) fn bf16_at<D: Driver>(
    device: &Cuda<D>,
    parts: &[WeightPart<'_>],
    cols: usize,
    (to, first_row): (&Array<D>, usize),
) -> Result<(), KernelError> {
    let row_bytes = cols * Element::Bf16.bytes();
    let start = to.address(device.driver());
    pieces(parts, cols, |first, piece| {
        let offset = (first_row + first) * row_bytes;
        match piece {
            Piece::Bytes(bytes) => device.driver().write(&to.memory, offset, bytes),
            Piece::Random { random, rows } => {
                device.random_rows(start + offset as u64, random, (rows.start, rows.len(), cols))
            }
        }
    })
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
    let Extent { rows, cols, .. } = extent;
    let values = room(driver, numbers, extent)?;
    let row_bytes = cols * Element::Bf16.bytes();
    let rows_most = rows_each(row_bytes).min(rows);
    let piece_memory = Array::zeroed(driver, "a piece of a weight", rows_most * row_bytes)?;
    let x = piece_memory.address(driver);
    // Leaves a piece's rows in bf16 at x.
    let rows_of = |piece: Piece<'_>| match piece {
        Piece::Bytes(bytes) => {
            piece_memory.write(driver, bytes)?;
            Ok::<_, KernelError>(bytes.len() / row_bytes)
        }
        Piece::Random { random, rows } => {
            device.random_rows(x, random, (rows.start, rows.len(), cols))?;
            Ok(rows.len())
        }
    };
    let Some(scales) = values.scales() else {
        pieces(parts, cols, |first, piece| {
            let rows = rows_of(piece)?;
            device.pack_rows(&values, (first, rows), x)
        })?;
        return Ok(values);
    };
    let codes = Array::zeroed(driver, "a piece of a weight", rows_most * cols)?;
    pieces(parts, cols, |first, piece| {
        let rows = rows_of(piece)?;
        device.quantize_rows(&ScaledRows {
            codes: codes.address(driver),
            scales: scales.address(driver) + (first * size_of::<f32>()) as u64,
            x,
            rows: rows as u64,
            cols: cols as u64,
        })?;
        device.pack_rows(&values, (first, rows), codes.address(driver))
    })?;
    Ok(values)
}

fn rows_each(row_bytes: usize) -> usize {
    (PIECE_BYTES / row_bytes).max(1)
}

/// Some rows of a stack.
enum Piece<'a> {
    /// As bf16.
    Bytes(&'a [u8]),
    /// Rows of a part whose numbers the device makes.
    Random { random: Random, rows: Range<usize> },
}

/// Hands out all rows, some at a time, with the number of the first.
fn pieces(
    parts: &[WeightPart<'_>],
    cols: usize,
    mut take: impl FnMut(usize, Piece<'_>) -> Result<(), KernelError>,
) -> Result<(), KernelError> {
    let rows_each = rows_each(cols * Element::Bf16.bytes());
    let (mut first, mut rounded) = (0, Vec::new());
    for part in parts {
        let mut row = vec![0.0; cols];
        for start in (0..part.rows).step_by(rows_each) {
            let end = (start + rows_each).min(part.rows);
            if let Stored::Plain { format: Format::Bf16, data } = &part.stored {
                let bytes = Format::Bf16.row_bytes(cols);
                take(first, Piece::Bytes(&data[start * bytes..end * bytes]))?;
            } else if let Some(random) = random_bf16(part) {
                take(first, Piece::Random { random, rows: start..end })?;
            } else {
                rounded.clear();
                for n in start..end {
                    dequant::part_row(part, n, &mut row);
                    let values = row.iter();
                    rounded.extend(values.flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()));
                }
                take(first, Piece::Bytes(&rounded))?;
            }
            first += end - start;
        }
    }
    Ok(())
}

/// Random integers that are to be bf16 are widened on the host, as a checkpoint's are.
fn random_bf16(part: &WeightPart<'_>) -> Option<Random> {
    random(part).filter(|random| random.format == RandomFormat::Bf16)
}
