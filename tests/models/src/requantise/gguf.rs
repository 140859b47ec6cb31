//! A GGUF file with the metadata of another, whose `general.file_type` no longer holds.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

use formats::gguf::parse_metadata;

use crate::{
    Result,
    quantise::Encoded,
    source::{Source, Tensor},
};

/// Where the header says how many tensors there are.
const COUNT_AT: usize = 8;

pub fn write(out: &Path, source: &Source, tensors: &[(Tensor, Vec<Encoded>)]) -> Result<()> {
    let Some(metadata) = source.text_files.get("metadata.gguf") else {
        return Err("a GGUF file has the metadata of another: give one as the model".into());
    };
    if source.config().family.name == "llama" {
        return Err("GGUF files of Llama have rows in an order that is not made here".into());
    }
    let alignment = parse_metadata(metadata)?.unsigned("general.alignment")?.unwrap_or(32) as usize;
    let each = || tensors.iter().flat_map(|(t, stored)| stored.iter().map(|s| (&t.stems[1], s)));
    let mut header = metadata.clone();
    header[COUNT_AT..COUNT_AT + 8].copy_from_slice(&(each().count() as u64).to_le_bytes());
    let mut offset = 0;
    for (stem, stored) in each() {
        let name = format!("{stem}.{}", stored.ending);
        header.extend((name.len() as u64).to_le_bytes());
        header.extend(name.as_bytes());
        header.extend((stored.shape.len() as u32).to_le_bytes());
        header.extend(stored.shape.iter().rev().flat_map(|n| (*n as u64).to_le_bytes()));
        header.extend(number(stored.dtype)?.to_le_bytes());
        header.extend((offset as u64).to_le_bytes());
        offset += stored.data.len().next_multiple_of(alignment);
    }
    header.resize(header.len().next_multiple_of(alignment), 0);
    let mut file = BufWriter::new(File::create_new(out)?);
    file.write_all(&header)?;
    for (_, stored) in each() {
        file.write_all(&stored.data)?;
        let padding = stored.data.len().next_multiple_of(alignment) - stored.data.len();
        file.write_all(&vec![0; padding])?;
    }
    Ok(file.flush()?)
}

/// Of a type in GGUF files.
fn number(dtype: &str) -> Result<u32> {
    const NUMBERS: [(&str, u32); 5] =
        [("F32", 0), ("F16", 1), ("Q4_0", 2), ("Q4_1", 3), ("Q8_0", 8)];
    let found = NUMBERS.iter().find(|(name, _)| *name == dtype);
    Ok(found.ok_or_else(|| format!("{dtype} is not written to GGUF files"))?.1)
}
