//! Weight matrices as checkpoints store them.

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
