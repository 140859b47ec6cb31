//! The tensors of one or more files, found by name and read by position.

use std::{
    collections::BTreeMap,
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use crate::{FormatError, error::shown, gguf, locate::Layout, safetensors};

/// How numbers are stored: rows are runs of blocks of `block_elements` numbers in `block_bytes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dtype {
    /// As the format's own documentation writes it, e.g. `BF16`, `Q4_K`.
    pub name: &'static str,
    pub block_elements: usize,
    pub block_bytes: usize,
}

impl Dtype {
    pub(crate) const fn plain(name: &'static str, bytes: usize) -> Self {
        Self { name, block_elements: 1, block_bytes: bytes }
    }

    pub(crate) const fn blocks(name: &'static str, elements: usize, bytes: usize) -> Self {
        Self { name, block_elements: elements, block_bytes: bytes }
    }

    /// Bytes of a row-major tensor, `None` where rows are no whole number of blocks or the
    /// arithmetic overflows.
    pub fn bytes_of(&self, shape: &[u64]) -> Option<u64> {
        let row = shape.last().copied().unwrap_or(1);
        let block = self.block_elements as u64;
        if !row.is_multiple_of(block) {
            return None;
        }
        let rows = shape.iter().rev().skip(1).try_fold(1u64, |n, dim| n.checked_mul(*dim))?;
        rows.checked_mul(row)?;
        rows.checked_mul(row / block)?.checked_mul(self.block_bytes as u64)
    }
}

/// Where one tensor lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    pub name: String,
    pub dtype: Dtype,
    /// Outermost dimension first; the last is contiguous.
    pub shape: Vec<u64>,
    /// From the start of the file.
    pub offset: u64,
    pub bytes: u64,
}

/// Refuses tensors that overlap, share a name or reach beyond the file. Sorts them by offset.
pub(crate) fn check_layout(tensors: &mut [TensorInfo], file_len: u64) -> Result<(), FormatError> {
    let malformed = |text: String| Err(FormatError::Malformed(text));
    for tensor in tensors.iter() {
        if tensor.offset.checked_add(tensor.bytes).is_none_or(|end| end > file_len) {
            return Err(FormatError::Truncated(format!(
                "tensor {} takes {} bytes from byte {}, the file has {file_len}",
                shown(&tensor.name),
                tensor.bytes,
                tensor.offset
            )));
        }
    }
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some([a, _]) = tensors.array_windows().find(|[a, b]| a.name == b.name) {
        return malformed(format!("two tensors are named {}", shown(&a.name)));
    }
    tensors.sort_by_key(|tensor| (tensor.offset, tensor.bytes));
    match tensors.array_windows().find(|[a, b]| b.offset < a.offset + a.bytes) {
        Some([a, b]) => {
            malformed(format!("tensors {} and {} overlap", shown(&a.name), shown(&b.name)))
        }
        None => Ok(()),
    }
}

struct Part {
    path: PathBuf,
    file: File,
}

/// The tensors of a checkpoint, over however many files it is spread. Reading takes `&self`, so
/// ranks may share one.
pub struct Tensors {
    parts: Vec<Part>,
    by_name: BTreeMap<String, (usize, TensorInfo)>,
}

impl Tensors {
    /// Opens every file and checks every header against the file's size; no tensor data is read.
    /// For GGUF also returns the metadata, of the first part where there are several.
    ///
    /// # Errors
    /// Every way in which a file can be unreadable, truncated, malformed or of an unknown type.
    pub fn open(layout: &Layout) -> Result<(Self, Option<gguf::Metadata>), FormatError> {
        let mut tensors = Self { parts: Vec::new(), by_name: BTreeMap::new() };
        match layout {
            Layout::Safetensors { files, index, .. } => {
                for path in files {
                    tensors.add(path, |file, len| safetensors::read(file, len))?;
                }
                if let Some(index) = index {
                    tensors.check_index(index)?;
                }
                Ok((tensors, None))
            }
            Layout::Gguf { files } => {
                let mut first = None;
                for (number, path) in files.iter().enumerate() {
                    let mut metadata = None;
                    tensors.add(path, |file, len| {
                        let header = gguf::read(file, len)?;
                        gguf::check_split(&header.metadata, number, files.len())?;
                        metadata = Some(header.metadata);
                        Ok(header.tensors)
                    })?;
                    first = first.or(metadata);
                }
                Ok((tensors, first))
            }
        }
    }

    fn add(
        &mut self,
        path: &Path,
        read: impl FnOnce(&File, u64) -> Result<Vec<TensorInfo>, FormatError>,
    ) -> Result<(), FormatError> {
        let file = File::open(path).map_err(|e| FormatError::io(path, e))?;
        let len = file.metadata().map_err(|e| FormatError::io(path, e))?.len();
        let part = self.parts.len();
        for info in read(&file, len).map_err(|e| e.at(path))? {
            if self.by_name.contains_key(&info.name) {
                let text = format!("tensor {} is in an earlier file too", shown(&info.name));
                return Err(FormatError::Malformed(text).at(path));
            }
            self.by_name.insert(info.name.clone(), (part, info));
        }
        self.parts.push(Part { path: path.to_owned(), file });
        Ok(())
    }

    /// Every tensor that the index promises must be in the file that it names.
    fn check_index(&self, index: &safetensors::Index) -> Result<(), FormatError> {
        for (name, file) in &index.weight_map {
            let there = self.by_name.get(name).is_some_and(|(part, _)| {
                self.parts[*part].path.file_name().is_some_and(|found| found == file.as_str())
            });
            if !there {
                return Err(FormatError::Malformed(format!(
                    "the index promises tensor {} in {file}, which does not have it",
                    shown(name)
                )));
            }
        }
        Ok(())
    }

    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|(_, info)| info)
    }

    /// In order of name.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }

    /// Bytes of all tensors together.
    pub fn total_bytes(&self) -> u64 {
        self.by_name.values().map(|(_, info)| info.bytes).sum()
    }

    /// Fills `into` with the tensor's bytes from `start` on.
    ///
    /// # Errors
    /// An unknown name, a range beyond the tensor, and what the system refuses.
    pub fn read_at(&self, name: &str, start: u64, into: &mut [u8]) -> Result<(), FormatError> {
        let (part, info) = self
            .by_name
            .get(name)
            .ok_or_else(|| FormatError::NotFound(format!("there is no tensor {}", shown(name))))?;
        if start.checked_add(into.len() as u64).is_none_or(|end| end > info.bytes) {
            return Err(FormatError::Truncated(format!(
                "{} bytes from byte {start} of tensor {}, which has {}",
                into.len(),
                shown(name),
                info.bytes
            )));
        }
        let part = &self.parts[*part];
        part.file
            .read_exact_at(into, info.offset + start)
            .map_err(|e| FormatError::io(&part.path, e))
    }
}
