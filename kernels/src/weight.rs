//! Weight matrices as checkpoints store them.

use crate::KernelError;
use std::{borrow::Cow, ops::Range};

/// How numbers are stored. The block formats are GGUF's (ggml), byte for byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

impl Format {
    /// Elements in one block: a row is a whole number of blocks.
    pub fn block_elements(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes in one block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// A rank's columns may begin and end only at multiples of this.
    pub fn split_elements(self) -> usize {
        self.block_elements().min(32)
    }
}

/// Some rows of a stored matrix, and the columns of them that this rank multiplies.
#[derive(Clone, Debug)]
pub struct WeightPart<'a> {
    pub format: Format,
    /// N of this part.
    pub rows: usize,
    /// Elements in each stored row of `data`, a whole number of blocks.
    pub stored_cols: usize,
    /// The columns in use, within `stored_cols`, at multiples of `split_elements`; its length is K.
    pub cols: Range<usize>,
    /// `rows` stored rows without gaps.
    pub data: Cow<'a, [u8]>,
}

impl WeightPart<'_> {
    /// N and K of the stack of `parts`, once every part is known to be whole: blocks complete,
    /// columns inside the stored row at places where its format may be cut, data as long as it
    /// says.
    ///
    /// # Errors
    /// `KernelError::Weight` names the first part that is not.
    pub fn check(parts: &[WeightPart<'_>]) -> Result<(usize, usize), KernelError> {
        let cols = parts.first().map_or(0, |part| part.cols.len());
        if cols == 0 {
            return Err(KernelError::Weight("no columns".into()));
        }
        for part in parts {
            part.check_one(cols).map_err(KernelError::Weight)?;
        }
        Ok((parts.iter().map(|part| part.rows).sum(), cols))
    }

    fn check_one(&self, cols: usize) -> Result<(), String> {
        let Self { format, rows, stored_cols, cols: range, data } = self;
        let split = format.split_elements();
        if !stored_cols.is_multiple_of(format.block_elements()) {
            return Err(format!("rows of {stored_cols} elements are no whole {format:?} blocks"));
        }
        if range.start > range.end || range.end > *stored_cols || range.len() != cols {
            return Err(format!("columns {range:?} of {stored_cols}, wanted {cols} columns"));
        }
        if !range.start.is_multiple_of(split) || !range.end.is_multiple_of(split) {
            return Err(format!("columns {range:?} cut {format:?} off multiples of {split}"));
        }
        let bytes = self.row_bytes().checked_mul(*rows);
        if bytes != Some(data.len()) {
            return Err(format!("{rows} rows of {stored_cols} {format:?} in {} bytes", data.len()));
        }
        Ok(())
    }

    /// Bytes of one stored row.
    pub fn row_bytes(&self) -> usize {
        self.stored_cols / self.format.block_elements() * self.format.block_bytes()
    }

    /// The bytes of stored row `n`, every stored column of it.
    pub fn stored_row(&self, n: usize) -> &[u8] {
        &self.data[n * self.row_bytes()..][..self.row_bytes()]
    }
}
