//! Reads parts of single tensors: runs of rows, and vectors.

use std::ops::Range;

use formats::{Dtype, TensorInfo, Tensors};
use half::{bf16, f16};
use kernels::{Format, WeightPart};

use super::module::{Cut, Module};
use crate::ModelError;

const FORMATS: [(&str, Format); 11] = [
    ("F32", Format::F32),
    ("F16", Format::F16),
    ("BF16", Format::Bf16),
    ("Q4_0", Format::Q4_0),
    ("Q4_1", Format::Q4_1),
    ("Q5_0", Format::Q5_0),
    ("Q5_1", Format::Q5_1),
    ("Q8_0", Format::Q8_0),
    ("Q4_K", Format::Q4K),
    ("Q5_K", Format::Q5K),
    ("Q6_K", Format::Q6K),
];

/// How the kernels call a file's number format.
pub(super) fn format(dtype: Dtype) -> Option<Format> {
    FORMATS.iter().find(|(name, _)| *name == dtype.name).map(|(_, format)| *format)
}

/// Reads rows of a matrix of numbers or GGUF blocks, and no other bytes of the file.
pub(super) fn plain(
    tensors: &Tensors,
    module: &Module,
    format: Format,
    cut: &Cut,
) -> Result<WeightPart<'static>, ModelError> {
    let row_bytes = format.row_bytes(module.cols);
    let rows = cut.rows();
    let mut data = vec![0; rows.len() * row_bytes];
    let first = module.place.map_or(0, |place| place.index * module.rows) + rows.start;
    tensors.read_at(&module.tensor("weight"), (first * row_bytes) as u64, &mut data)?;
    if let Cut::Heads { head_dim, .. } = cut {
        data = to_rotate_half(&data, *head_dim, row_bytes);
    }
    Ok(WeightPart::plain(format, rows.len(), module.cols, data))
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

/// The first `len` numbers of a vector as f16; NaN where they are none that f16 holds.
pub(super) fn halves(tensors: &Tensors, name: &str, len: usize) -> Result<Vec<f16>, ModelError> {
    // A large model has half a billion of these: those stored as f16 are not converted twice.
    if format(find(tensors, name)?.dtype) == Some(Format::F16) {
        let mut bytes = vec![0; len * 2];
        tensors.read_at(name, 0, &mut bytes)?;
        return Ok(bytes.as_chunks().0.iter().map(|half| f16::from_le_bytes(*half)).collect());
    }
    let half = |number: f32| {
        let half = f16::from_f32(number);
        if half.to_f32() == number { half } else { f16::NAN }
    };
    Ok(vector(tensors, name, 0..len, None)?.into_iter().map(half).collect())
}

/// Whether every number of a plain tensor is zero.
pub(super) fn is_zero(tensors: &Tensors, name: &str) -> Result<bool, ModelError> {
    let mut bytes = vec![0; find(tensors, name)?.bytes as usize];
    tensors.read_at(name, 0, &mut bytes)?;
    Ok(bytes.iter().all(|byte| *byte == 0))
}

pub(super) fn find<'a>(tensors: &'a Tensors, name: &str) -> Result<&'a TensorInfo, ModelError> {
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
