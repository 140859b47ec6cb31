//! GGUF versions 2 and 3: typed metadata, tensor descriptions, then aligned data.

mod metadata;

use std::io::Read;

use crate::{Dtype, FormatError, TensorInfo, cursor::Cursor, error::shown, tensors::check_layout};
pub use metadata::{Array, Metadata, Value};

const MAGIC: [u8; 4] = *b"GGUF";
const ALIGNMENT: u64 = 32;
const ALIGNMENT_MAX: u64 = 1 << 16;
const DIMENSIONS_MAX: u32 = 4;
/// Name length, dimension count, type and offset: what every tensor description has at least.
const TENSOR_BYTES_MIN: u64 = 24;
/// Key length, type and one byte of value.
const ENTRY_BYTES_MIN: u64 = 13;

/// Everything before the tensor data.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    pub metadata: Metadata,
    /// Where the metadata ends and the tensor descriptions begin.
    pub metadata_end: u64,
    /// In order of offset.
    pub tensors: Vec<TensorInfo>,
}

/// Reads the header; `len` is the size of the whole file.
///
/// # Errors
/// Anything that the format forbids or that `len` contradicts; unknown versions and types.
pub fn read(from: impl Read, len: u64) -> Result<Header, FormatError> {
    let mut cursor = Cursor::new(buffered(from), len);
    let (metadata, tensor_count) = read_metadata(&mut cursor)?;
    let metadata_end = cursor.position();
    let tensor_count = cursor.fitting("the number of tensors", tensor_count, TENSOR_BYTES_MIN)?;
    let alignment = alignment(&metadata)?;
    let mut tensors = Vec::with_capacity(tensor_count);
    for _ in 0..tensor_count {
        tensors.push(tensor(&mut cursor, alignment)?);
    }
    // A file of metadata alone need not be padded.
    let data_start = cursor.position().next_multiple_of(alignment);
    for tensor in &mut tensors {
        tensor.offset = tensor.offset.checked_add(data_start).ok_or_else(|| {
            FormatError::Malformed(format!("the offset of tensor {}", shown(&tensor.name)))
        })?;
    }
    check_layout(&mut tensors, len)?;
    Ok(Header { metadata, metadata_end, tensors })
}

/// Reads the header of a file held in memory.
///
/// # Errors
/// As [`read`].
pub fn parse(file: &[u8]) -> Result<Header, FormatError> {
    read(file, file.len() as u64)
}

/// Reads the metadata alone; `prefix` may end anywhere after it.
///
/// # Errors
/// As [`read`], tensors aside.
pub fn parse_metadata(prefix: &[u8]) -> Result<Metadata, FormatError> {
    read_metadata(&mut Cursor::new(prefix, prefix.len() as u64)).map(|(metadata, _)| metadata)
}

/// The end of the metadata, without keeping any of it past the call.
pub(crate) fn metadata_end(from: impl Read, len: u64) -> Result<u64, FormatError> {
    let mut cursor = Cursor::new(buffered(from), len);
    read_metadata(&mut cursor)?;
    Ok(cursor.position())
}

fn buffered(from: impl Read) -> impl Read {
    std::io::BufReader::with_capacity(1 << 16, from)
}

/// Metadata and the declared number of tensors.
fn read_metadata<R: Read>(cursor: &mut Cursor<R>) -> Result<(Metadata, u64), FormatError> {
    if cursor.array::<4>("the magic number")? != MAGIC {
        return Err(FormatError::Malformed("no GGUF file: the magic number is missing".into()));
    }
    let version = cursor.u32("the version")?;
    if !(2..=3).contains(&version) {
        let order = match version.swap_bytes() {
            1..=3 => " (a big-endian file)",
            _ => "",
        };
        let text = format!("GGUF version {version}{order}; versions 2 and 3 are read");
        return Err(FormatError::Unsupported(text));
    }
    let tensor_count = cursor.u64("the number of tensors")?;
    let entries = cursor.count("the number of metadata entries", ENTRY_BYTES_MIN)?;
    Ok((Metadata::read(cursor, entries)?, tensor_count))
}

fn alignment(metadata: &Metadata) -> Result<u64, FormatError> {
    match metadata.unsigned("general.alignment")? {
        None => Ok(ALIGNMENT),
        Some(given) if given.is_power_of_two() && given <= ALIGNMENT_MAX => Ok(given),
        Some(given) => Err(FormatError::Malformed(format!("an alignment of {given}"))),
    }
}

/// The offset is still relative to the start of the data.
fn tensor<R: Read>(cursor: &mut Cursor<R>, alignment: u64) -> Result<TensorInfo, FormatError> {
    let name = cursor.string("the name of a tensor")?;
    let malformed =
        |what: String| Err(FormatError::Malformed(format!("tensor {} has {what}", shown(&name))));
    let dimensions = cursor.u32("a number of dimensions")?;
    if !(1..=DIMENSIONS_MAX).contains(&dimensions) {
        return malformed(format!("{dimensions} dimensions"));
    }
    let mut shape = Vec::with_capacity(dimensions as usize);
    for _ in 0..dimensions {
        shape.push(cursor.u64("a dimension")?);
    }
    shape.reverse();
    let number = cursor.u32("a tensor's type")?;
    let Some(dtype) = dtype(number) else {
        let text = format!("tensor {} of type number {number}", shown(&name));
        return Err(FormatError::Unsupported(text));
    };
    let offset = cursor.u64("a tensor's offset")?;
    if !offset.is_multiple_of(alignment) {
        return malformed(format!("offset {offset}, no multiple of {alignment}"));
    }
    let Some(bytes) = dtype.bytes_of(&shape) else {
        return malformed(format!("shape {shape:?}, impossible for type {}", dtype.name));
    };
    Ok(TensorInfo { name, dtype, shape, offset, bytes })
}

fn dtype(number: u32) -> Option<Dtype> {
    Some(match number {
        0 => Dtype::plain("F32", 4),
        1 => Dtype::plain("F16", 2),
        2 => Dtype::blocks("Q4_0", 32, 18),
        3 => Dtype::blocks("Q4_1", 32, 20),
        6 => Dtype::blocks("Q5_0", 32, 22),
        7 => Dtype::blocks("Q5_1", 32, 24),
        8 => Dtype::blocks("Q8_0", 32, 34),
        9 => Dtype::blocks("Q8_1", 32, 36),
        10 => Dtype::blocks("Q2_K", 256, 84),
        11 => Dtype::blocks("Q3_K", 256, 110),
        12 => Dtype::blocks("Q4_K", 256, 144),
        13 => Dtype::blocks("Q5_K", 256, 176),
        14 => Dtype::blocks("Q6_K", 256, 210),
        15 => Dtype::blocks("Q8_K", 256, 292),
        16 => Dtype::blocks("IQ2_XXS", 256, 66),
        17 => Dtype::blocks("IQ2_XS", 256, 74),
        18 => Dtype::blocks("IQ3_XXS", 256, 98),
        19 => Dtype::blocks("IQ1_S", 256, 50),
        20 => Dtype::blocks("IQ4_NL", 32, 18),
        21 => Dtype::blocks("IQ3_S", 256, 110),
        22 => Dtype::blocks("IQ2_S", 256, 82),
        23 => Dtype::blocks("IQ4_XS", 256, 136),
        24 => Dtype::plain("I8", 1),
        25 => Dtype::plain("I16", 2),
        26 => Dtype::plain("I32", 4),
        27 => Dtype::plain("I64", 8),
        28 => Dtype::plain("F64", 8),
        29 => Dtype::blocks("IQ1_M", 256, 56),
        30 => Dtype::plain("BF16", 2),
        34 => Dtype::blocks("TQ1_0", 256, 54),
        35 => Dtype::blocks("TQ2_0", 256, 66),
        39 => Dtype::blocks("MXFP4", 32, 17),
        _ => return None,
    })
}

/// Refuses part `number` of `parts` files whose metadata says otherwise.
pub(crate) fn check_split(
    metadata: &Metadata,
    number: usize,
    parts: usize,
) -> Result<(), FormatError> {
    let says = metadata.unsigned("split.count")?.unwrap_or(1).max(1);
    let at = metadata.unsigned("split.no")?.unwrap_or(0);
    match says == parts as u64 && at == number as u64 {
        true => Ok(()),
        false => Err(FormatError::Malformed(format!(
            "part {} of {says} by its metadata, {} of {parts} by its name; \
             keep the parts of a split file together under their own names",
            at.saturating_add(1),
            number + 1
        ))),
    }
}
