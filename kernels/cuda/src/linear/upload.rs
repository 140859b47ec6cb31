//! Weights on their way to the device.

use crate::{Array, Cuda, Driver, Element, Fp8, Fp8Scaling, fp8::ScaledRows, random::random};
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

/// [N, K] in e4m3, rounded on the device.
pub(super) fn fp8<D: Driver>(
    device: &Cuda<D>,
    parts: &[WeightPart<'_>],
    (rows, cols): (usize, usize),
) -> Result<Fp8<D>, KernelError> {
    let driver = device.driver();
    let row_bytes = cols * Element::Bf16.bytes();
    let piece_bytes = rows_each(row_bytes).min(rows) * row_bytes;
    let piece_memory = Array::zeroed(driver, "a piece of a weight", piece_bytes)?;
    let mut values = Fp8::zeros(device, (rows, cols), Fp8Scaling::Row)?;
    let all = values.scaled_rows(device, piece_memory.address(driver));
    pieces(parts, cols, |first, piece| {
        let rows = match piece {
            Piece::Bytes(bytes) => {
                piece_memory.write(driver, bytes)?;
                bytes.len() / row_bytes
            }
            Piece::Random { random, rows } => {
                device.random_rows(all.x, random, (rows.start, rows.len(), cols))?;
                rows.len()
            }
        };
        device.quantize_rows(&ScaledRows {
            codes: all.codes + (first * cols) as u64,
            scales: all.scales + (first * size_of::<f32>()) as u64,
            rows: rows as u64,
            ..all
        })
    })?;
    values.fill();
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
