//! Reads parts of single tensors: runs of rows or of columns, and vectors.

use std::{ops::Range, panic::resume_unwind, thread};

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

/// Threads that fill the rows of one large matrix, and bytes that each has at least.
const THREADS: usize = 4;
const RUN_BYTES: usize = 16 << 20;
/// Rows of which some columns are kept are read in pieces of about this size.
const PIECE_BYTES: usize = 4 << 20;

/// Fills rows of `row_bytes`, a multiple of `unit` rows at a time, on several threads where they
/// are many. `fill` hears which row is the first that it is to fill.
pub(super) fn by_rows(
    to: &mut [u8],
    (row_bytes, unit): (usize, usize),
    fill: impl Fn(usize, &mut [u8]) -> Result<(), ModelError> + Sync,
) -> Result<(), ModelError> {
    let runs = (to.len() / RUN_BYTES).clamp(1, THREADS);
    if runs == 1 || row_bytes == 0 {
        return fill(0, to);
    }
    let each = (to.len() / row_bytes).div_ceil(runs).next_multiple_of(unit);
    thread::scope(|scope| {
        let fill = &fill;
        let runs = to.chunks_mut(each * row_bytes).enumerate();
        let run = |(at, run)| scope.spawn(move || fill(at * each, run));
        let threads: Vec<_> = runs.map(run).collect();
        let ended = threads.into_iter().map(|thread| thread.join());
        let ended: Vec<_> =
            ended.map(|end| end.unwrap_or_else(|panic| resume_unwind(panic))).collect();
        ended.into_iter().collect()
    })
}

/// Some bytes of each of some rows of a tensor.
#[derive(Clone, Debug)]
pub(super) struct Rows {
    pub rows: Range<usize>,
    /// Of a whole row.
    pub row_bytes: usize,
    /// Of those.
    pub kept: Range<usize>,
}

impl Rows {
    /// Reads them, one row after another.
    pub fn read(&self, tensors: &Tensors, name: &str) -> Result<Vec<u8>, ModelError> {
        let mut data = vec![0; self.rows.len() * self.kept.len()];
        by_rows(&mut data, (self.kept.len(), 1), |first, to| {
            self.read_run(tensors, name, self.rows.start + first, to)
        })?;
        Ok(data)
    }

    /// Rows `first` and on, as many as fill `to`.
    fn read_run(
        &self,
        tensors: &Tensors,
        name: &str,
        first: usize,
        to: &mut [u8],
    ) -> Result<(), ModelError> {
        let Self { row_bytes, ref kept, .. } = *self;
        if kept.len() == row_bytes {
            return Ok(tensors.read_at(name, (first * row_bytes) as u64, to)?);
        }
        if kept.is_empty() {
            return Ok(());
        }
        // Whole rows, from a file one after another: their pieces are shorter than pages.
        let each = (PIECE_BYTES / row_bytes).max(1);
        let mut piece = vec![0; each.min(to.len() / kept.len()) * row_bytes];
        for (at, to) in to.chunks_mut(each * kept.len()).enumerate() {
            let rows = &mut piece[..to.len() / kept.len() * row_bytes];
            tensors.read_at(name, ((first + at * each) * row_bytes) as u64, rows)?;
            let rows = rows.chunks_exact(row_bytes);
            to.chunks_exact_mut(kept.len())
                .zip(rows)
                .for_each(|(to, row)| to.copy_from_slice(&row[kept.clone()]));
        }
        Ok(())
    }
}

/// Reads rows of a matrix of numbers or GGUF blocks, and no other bytes of the file, or whole
/// blocks of columns.
pub(super) fn plain(
    tensors: &Tensors,
    module: &Module,
    format: Format,
    cut: &Cut,
) -> Result<WeightPart<'static>, ModelError> {
    let row_bytes = format.row_bytes(module.cols);
    let (rows, cols) = (cut.rows(), cut.cols(module));
    let first = module.place.map_or(0, |place| place.index * module.rows);
    let kept = format.row_bytes(cols.start)..format.row_bytes(cols.end);
    let read = Rows { rows: first + rows.start..first + rows.end, row_bytes, kept };
    let mut data = read.read(tensors, &module.tensor("weight"))?;
    if let Cut::Heads { head_dim, .. } = cut {
        data = to_rotate_half(&data, *head_dim, row_bytes);
    }
    Ok(WeightPart::plain(format, rows.len(), cols.len(), data))
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

#[cfg(test)]
mod tests {
    use super::*;
    use formats::Layout;

    #[test]
    fn rows_of_large_matrices_are_filled_by_several_threads() {
        let (row_bytes, rows) = (4096, 2 * RUN_BYTES / 4096 + 700);
        let mut to = vec![0; rows * row_bytes];
        let fill = |first: usize, to: &mut [u8]| {
            assert!(first.is_multiple_of(48) && to.len() < rows * row_bytes);
            for (at, row) in to.chunks_exact_mut(row_bytes).enumerate() {
                row.fill(((first + at) % 251) as u8);
            }
            Ok(())
        };
        by_rows(&mut to, (row_bytes, 48), fill).expect("no error");
        let right =
            |(at, row): (usize, &[u8])| row.iter().all(|byte| usize::from(*byte) == at % 251);
        assert!(to.chunks_exact(row_bytes).enumerate().all(right));
        // The first in the order of rows.
        let fail = |first: usize, _: &mut [u8]| Err(ModelError::Checkpoint(format!("row {first}")));
        let error = by_rows(&mut to, (row_bytes, 1), fail).expect_err("all fail");
        assert_eq!(error.to_string(), "checkpoint: row 0");
    }

    #[test]
    fn columns_of_many_rows_are_read_piece_by_piece() {
        let (rows, cols) = (2 * PIECE_BYTES / 1000 + 10, 1000);
        let byte = |row: usize, col: usize| (row * 7 + col * 13) as u8;
        let header = format!(
            r#"{{"x":{{"dtype":"U8","shape":[{rows},{cols}],"data_offsets":[0,{}]}}}}"#,
            rows * cols
        );
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.bytes());
        file.extend((0..rows * cols).map(|at| byte(at / cols, at % cols)));
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("x.safetensors");
        std::fs::write(&path, file).expect("a file");
        let layout =
            Layout::Safetensors { folder: folder.path().into(), files: vec![path], index: None };
        let (tensors, _) = Tensors::open(&layout).expect("one tensor");
        for (part, kept) in
            [(0..rows, 300..310), (3..rows - 2, 0..999), (5..9, 0..1000), (0..4, 7..7)]
        {
            let read = Rows { rows: part.clone(), row_bytes: cols, kept: kept.clone() };
            let got = read.read(&tensors, "x").expect("bytes");
            let wanted = part.flat_map(|row| kept.clone().map(move |col| byte(row, col)));
            assert!(got.into_iter().eq(wanted), "{kept:?}");
        }
        let beyond = Rows { rows: rows - 1..rows + 1, row_bytes: cols, kept: 0..10 };
        assert!(beyond.read(&tensors, "x").is_err());
    }
}
