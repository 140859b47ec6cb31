//! safetensors: a JSON header of names, types, shapes and offsets, then the data without gaps.

mod header;
mod index;

use std::{collections::BTreeSet, io::Read};

use crate::{Dtype, FormatError, TensorInfo, cursor::Cursor, error::shown, tensors::check_layout};
pub use index::Index;

/// Headers beyond this are refused, as the reference implementation does.
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// Reads the header; `len` is the size of the whole file. Returns the tensors in order of offset.
///
/// # Errors
/// Anything that the format forbids or that `len` contradicts.
pub fn read(from: impl Read, len: u64) -> Result<Vec<TensorInfo>, FormatError> {
    let mut cursor = Cursor::new(from, len);
    let header_len = cursor.count("the length of the header", 1)?;
    if header_len as u64 > HEADER_BYTES_MAX {
        let text = format!("a header of {header_len} bytes, above {HEADER_BYTES_MAX}");
        return Err(FormatError::Malformed(text));
    }
    let header = cursor.bytes("the header", header_len)?;
    let data_start = cursor.position();
    let mut tensors = header::parse(&header)?
        .into_iter()
        .map(|(name, entry)| entry.place(name, data_start))
        .collect::<Result<Vec<_>, _>>()?;
    check_layout(&mut tensors, len)?;
    let mut end = data_start;
    for tensor in &tensors {
        if tensor.offset != end {
            let text = format!("{} unused bytes before {}", tensor.offset - end, tensor.name);
            return Err(FormatError::Malformed(text));
        }
        end += tensor.bytes;
    }
    match len - end {
        0 => Ok(tensors),
        extra => Err(FormatError::Malformed(format!("{extra} unused bytes after the tensors"))),
    }
}

/// Reads the header of a file held in memory.
///
/// # Errors
/// As [`read`].
pub fn parse(file: &[u8]) -> Result<Vec<TensorInfo>, FormatError> {
    read(file, file.len() as u64)
}

fn dtype(name: &str) -> Option<Dtype> {
    const DTYPES: [Dtype; 15] = [
        Dtype::plain("F32", 4),
        Dtype::plain("F16", 2),
        Dtype::plain("BF16", 2),
        Dtype::plain("F64", 8),
        Dtype::plain("F8_E4M3", 1),
        Dtype::plain("F8_E5M2", 1),
        Dtype::plain("F8_E8M0", 1),
        Dtype::plain("BOOL", 1),
        Dtype::plain("U8", 1),
        Dtype::plain("I8", 1),
        Dtype::plain("U16", 2),
        Dtype::plain("I16", 2),
        Dtype::plain("U32", 4),
        Dtype::plain("I32", 4),
        Dtype::plain("I64", 8),
    ];
    const U64: Dtype = Dtype::plain("U64", 8);
    DTYPES.iter().chain([&U64]).find(|dtype| dtype.name == name).copied()
}

impl header::Entry {
    fn place(self, name: String, data_start: u64) -> Result<TensorInfo, FormatError> {
        let dtype = dtype(&self.dtype).ok_or_else(|| {
            let kind = shown(&self.dtype);
            FormatError::Unsupported(format!("tensor {} of type {kind}", shown(&name)))
        })?;
        let [begin, end] = self.data_offsets;
        let bytes = end.checked_sub(begin);
        let offset = data_start.checked_add(begin);
        match (bytes, offset) {
            (Some(bytes), Some(offset)) if dtype.bytes_of(&self.shape) == Some(bytes) => {
                Ok(TensorInfo { name, dtype, shape: self.shape, offset, bytes })
            }
            _ => Err(FormatError::Malformed(format!(
                "tensor {} of type {} and shape {:?} cannot lie at bytes {begin} to {end}",
                shown(&name),
                dtype.name,
                self.shape
            ))),
        }
    }
}

/// Names that appear twice make a header ambiguous.
pub(crate) fn unique(seen: &mut BTreeSet<String>, name: &str) -> Result<(), String> {
    match seen.insert(name.to_owned()) {
        true => Ok(()),
        false => Err(format!("{} appears twice", shown(name))),
    }
}
