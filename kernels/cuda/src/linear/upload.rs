//! Weights on their way to the device.

use crate::{
    Array, Cuda, Driver, Element,
    fp8::ScaledRows,
    skinny::{Extent, Numbers, Records},
};
use kernels::{Format, KernelError, Stored, WeightPart, plain::dequant};

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
    pieces(parts, cols, |first, piece| {
        device.driver().write(&to.memory, (first_row + first) * row_bytes, piece)
    })
}

/// [N, K] in records of bf16 or, rounded on the device, of e4m3.
pub(super) fn records<D: Driver>(
    device: &Cuda<D>,
    parts: &[WeightPart<'_>],
    (rows, cols): (usize, usize),
    numbers: Numbers,
) -> Result<Records<D>, KernelError> {
    let driver = device.driver();
    let row_bytes = cols * Element::Bf16.bytes();
    let rows_most = rows_each(row_bytes).min(rows);
    let piece_memory = Array::zeroed(driver, "a piece of a weight", rows_most * row_bytes)?;
    let values = Records::zeroed(driver, numbers, Extent { rows, cols, lead: 0 })?;
    let Some(scales) = values.scales() else {
        pieces(parts, cols, |first, piece| {
            piece_memory.write(driver, piece)?;
            let rows = (first, piece.len() / row_bytes);
            device.pack_rows(&values, rows, piece_memory.address(driver))
        })?;
        return Ok(values);
    };
    let codes = Array::zeroed(driver, "a piece of a weight", rows_most * cols)?;
    pieces(parts, cols, |first, piece| {
        piece_memory.write(driver, piece)?;
        let rows = piece.len() / row_bytes;
        device.quantize_rows(&ScaledRows {
            codes: codes.address(driver),
            scales: scales.address(driver) + (first * size_of::<f32>()) as u64,
            x: piece_memory.address(driver),
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

/// Hands out all rows as bf16, some at a time, with the number of the first.
fn pieces(
    parts: &[WeightPart<'_>],
    cols: usize,
    mut take: impl FnMut(usize, &[u8]) -> Result<(), KernelError>,
) -> Result<(), KernelError> {
    let rows_each = rows_each(cols * Element::Bf16.bytes());
    let (mut first, mut rounded) = (0, Vec::new());
    for part in parts {
        let mut row = vec![0.0; cols];
        for start in (0..part.rows).step_by(rows_each) {
            let end = (start + rows_each).min(part.rows);
            if let Stored::Plain { format: Format::Bf16, data } = &part.stored {
                let bytes = Format::Bf16.row_bytes(cols);
                take(first, &data[start * bytes..end * bytes])?;
            } else {
                rounded.clear();
                for n in start..end {
                    dequant::part_row(part, n, &mut row);
                    let values = row.iter();
                    rounded.extend(values.flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()));
                }
                take(first, &rounded)?;
            }
            first += end - start;
        }
    }
    Ok(())
}
