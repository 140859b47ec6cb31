//! Reads parts of stored tensors: runs of rows, runs of columns, vectors.

use std::{borrow::Cow, ops::Range};

use formats::{TensorInfo, Tensors};
use half::{bf16, f16};
use kernels::{Format, WeightPart};

use super::expected::format;
use crate::ModelError;

/// Which part of a matrix [N, K] a rank holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    /// All columns of some rows.
    Rows(Range<usize>),
    /// As `Rows`, whole heads of this size, each put from interleaved into rotate-half order.
    Heads { rows: Range<usize>, head_dim: usize },
    /// Some columns of all rows, at multiples of the format's `split_elements`.
    Cols(Range<usize>),
}

/// A cut in terms of the file's bytes.
struct Extent {
    format: Format,
    rows: Range<usize>,
    /// Columns covered by whole blocks.
    stored: Range<usize>,
    /// Bytes of a whole row in the file.
    row_bytes: usize,
}

impl Extent {
    fn new(info: &TensorInfo, cut: &Cut) -> Result<Self, ModelError> {
        let inconsistent = || {
            ModelError::Checkpoint(format!(
                "{cut:?} is no part of tensor {} {:?} in {}",
                info.name, info.shape, info.dtype.name
            ))
        };
        let format = format(info.dtype).ok_or_else(inconsistent)?;
        let [all_rows, all_cols] = info.shape[..] else { return Err(inconsistent()) };
        let (all_rows, all_cols) = (all_rows as usize, all_cols as usize);
        let (rows, cols) = match cut {
            Cut::Rows(rows) | Cut::Heads { rows, .. } => (rows.clone(), 0..all_cols),
            Cut::Cols(cols) => (0..all_rows, cols.clone()),
        };
        let aligned = [cols.start, cols.end].iter().all(|c| c % format.split_elements() == 0);
        if rows.end > all_rows || cols.end > all_cols || !aligned {
            return Err(inconsistent());
        }
        let block = format.block_elements();
        let stored = cols.start / block * block..cols.end.next_multiple_of(block);
        let row_bytes = all_cols / block * format.block_bytes();
        Ok(Self { format, rows, stored, row_bytes })
    }

    /// Bytes of the file before column `col`, a block's first, within a row.
    fn bytes_before(&self, col: usize) -> usize {
        col / self.format.block_elements() * self.format.block_bytes()
    }

    /// Bytes of each row that are read.
    fn stored_bytes(&self) -> usize {
        self.bytes_before(self.stored.end) - self.bytes_before(self.stored.start)
    }
}

/// Bytes that [`part`] would read.
pub(super) fn part_bytes(tensors: &Tensors, name: &str, cut: &Cut) -> Result<u64, ModelError> {
    let extent = Extent::new(find(tensors, name)?, cut)?;
    Ok(extent.rows.len() as u64 * extent.stored_bytes() as u64)
}

/// Reads one part of a matrix, and of the file only the blocks that it touches.
pub(super) fn part(
    tensors: &Tensors,
    name: &str,
    cut: &Cut,
) -> Result<WeightPart<'static>, ModelError> {
    let extent = Extent::new(find(tensors, name)?, cut)?;
    let stored_bytes = extent.stored_bytes();
    let first = extent.bytes_before(extent.stored.start);
    let mut data = vec![0; extent.rows.len() * stored_bytes];
    if stored_bytes == extent.row_bytes {
        tensors.read_at(name, (extent.rows.start * stored_bytes) as u64, &mut data)?;
    } else {
        for (row, into) in extent.rows.clone().zip(data.chunks_exact_mut(stored_bytes.max(1))) {
            tensors.read_at(name, (row * extent.row_bytes + first) as u64, into)?;
        }
    }
    if let Cut::Heads { head_dim, .. } = cut {
        data = to_rotate_half(&data, *head_dim, stored_bytes);
    }
    let cols = match cut {
        Cut::Cols(cols) => cols.start - extent.stored.start..cols.end - extent.stored.start,
        Cut::Rows(_) | Cut::Heads { .. } => 0..extent.stored.len(),
    };
    Ok(WeightPart {
        format: extent.format,
        rows: extent.rows.len(),
        stored_cols: extent.stored.len(),
        cols,
        data: Cow::Owned(data),
    })
}

/// Some numbers of a vector; `heads_of` as in [`Cut::Heads`].
pub(super) fn vector(
    tensors: &Tensors,
    name: &str,
    range: Range<usize>,
    heads_of: Option<usize>,
) -> Result<Vec<f32>, ModelError> {
    let info = find(tensors, name)?;
    let width = info.dtype.block_bytes;
    let mut bytes = vec![0; range.len() * width];
    tensors.read_at(name, (range.start * width) as u64, &mut bytes)?;
    if let Some(head_dim) = heads_of {
        bytes = to_rotate_half(&bytes, head_dim, width);
    }
    let (quads, _) = bytes.as_chunks::<4>();
    let (pairs, _) = bytes.as_chunks::<2>();
    match format(info.dtype) {
        Some(Format::F32) => Ok(quads.iter().map(|b| f32::from_le_bytes(*b)).collect()),
        Some(Format::F16) => Ok(pairs.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect()),
        Some(Format::Bf16) => Ok(pairs.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect()),
        _ => Err(ModelError::Unsupported(format!(
            "vector {name} is stored as {}, not F32, F16 or BF16",
            info.dtype.name
        ))),
    }
}

fn find<'a>(tensors: &'a Tensors, name: &str) -> Result<&'a TensorInfo, ModelError> {
    tensors.get(name).ok_or_else(|| ModelError::Checkpoint(format!("tensor {name} is missing")))
}

/// Within each head, dimension pairs (2i, 2i + 1) become (i, i + D/2).
fn to_rotate_half(rows: &[u8], head_dim: usize, row_bytes: usize) -> Vec<u8> {
    let mut ordered = Vec::with_capacity(rows.len());
    for head in rows.chunks_exact((head_dim * row_bytes).max(1)) {
        for row in (0..head_dim).step_by(2).chain((1..head_dim).step_by(2)) {
            ordered.extend_from_slice(&head[row * row_bytes..][..row_bytes]);
        }
    }
    ordered
}
