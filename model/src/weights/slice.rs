//! Reads parts of stored tensors: runs of rows, and vectors.

use std::{borrow::Cow, ops::Range};

use formats::{TensorInfo, Tensors};
use half::{bf16, f16};
use kernels::{Format, WeightPart};

use super::expected::format;
use crate::ModelError;

/// Which part of a matrix [N, K] a rank holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    /// Some rows.
    Rows(Range<usize>),
    /// As `Rows`, whole heads of this size, each put from interleaved into rotate-half order.
    Heads { rows: Range<usize>, head_dim: usize },
}

/// A cut in terms of the file's bytes.
struct Extent {
    format: Format,
    rows: Range<usize>,
    /// K.
    cols: usize,
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
        let [all_rows, cols] = info.shape[..] else { return Err(inconsistent()) };
        let (Cut::Rows(rows) | Cut::Heads { rows, .. }) = cut;
        let (all_rows, cols) = (all_rows as usize, cols as usize);
        if rows.end > all_rows {
            return Err(inconsistent());
        }
        let row_bytes = cols / format.block_elements() * format.block_bytes();
        Ok(Self { format, rows: rows.clone(), cols, row_bytes })
    }
}

/// Bytes that [`part`] would read.
pub(super) fn part_bytes(tensors: &Tensors, name: &str, cut: &Cut) -> Result<u64, ModelError> {
    let extent = Extent::new(find(tensors, name)?, cut)?;
    Ok(extent.rows.len() as u64 * extent.row_bytes as u64)
}

/// Numbers in what [`part`] would read.
pub(super) fn part_elements(tensors: &Tensors, name: &str, cut: &Cut) -> Result<u64, ModelError> {
    let extent = Extent::new(find(tensors, name)?, cut)?;
    Ok(extent.rows.len() as u64 * extent.cols as u64)
}

/// Reads one part of a matrix, and no other bytes of the file.
pub(super) fn part(
    tensors: &Tensors,
    name: &str,
    cut: &Cut,
) -> Result<WeightPart<'static>, ModelError> {
    let Extent { format, rows, cols, row_bytes } = Extent::new(find(tensors, name)?, cut)?;
    let mut data = vec![0; rows.len() * row_bytes];
    tensors.read_at(name, (rows.start * row_bytes) as u64, &mut data)?;
    if let Cut::Heads { head_dim, .. } = cut {
        data = to_rotate_half(&data, *head_dim, row_bytes);
    }
    let (rows, data) = (rows.len(), Cow::Owned(data));
    Ok(WeightPart { format, rows, stored_cols: cols, cols: 0..cols, data })
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
