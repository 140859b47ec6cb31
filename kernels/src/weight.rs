//! Weight matrices as checkpoints store them: numbers, GGUF blocks, integers in groups, scaled
//! e4m3. Readers bring every file's own layout into one of these; backends pack these as they like.

mod columns;
mod random;

use crate::KernelError;
use half::f16;
pub use random::{RANDOM_INT4_ZERO, RANDOM_STEP, Random, RandomFormat, random_int4_scale};
use std::borrow::Cow;

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

    /// Bytes of a row of `cols` elements, whole blocks.
    pub fn row_bytes(self, cols: usize) -> usize {
        cols / self.block_elements() * self.block_bytes()
    }
}

/// Some rows of a matrix, as a checkpoint stores them.
#[derive(Clone, Debug)]
pub struct WeightPart<'a> {
    /// N of this part.
    pub rows: usize,
    /// K.
    pub cols: usize,
    pub stored: Stored<'a>,
}

/// What the numbers of a part consist of. Rows lie one after another without gaps.
#[derive(Clone, Debug)]
pub enum Stored<'a> {
    /// [N, K] numbers, or blocks of them along K.
    Plain { format: Format, data: Cow<'a, [u8]> },
    /// Integers: scale · (q − zero).
    Grouped(Grouped<'a>),
    /// e4m3: scale · value.
    Scaled(Scaled<'a>),
    /// None: they follow from a seed.
    Random(Random),
}

/// Integers that share a scale and a zero point by groups of columns (GPTQ, AWQ).
#[derive(Clone, Debug)]
pub struct Grouped<'a> {
    /// 4 or 8.
    pub bits: usize,
    /// [N, K], the lowest bits of a byte first; rows begin with a byte of their own.
    pub values: Cow<'a, [u8]>,
    pub groups: Groups,
    /// [N, G].
    pub scales: Vec<f16>,
    /// [N, G], 0 to 2^bits.
    pub zeros: Vec<u16>,
}

/// Which group a column is of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Groups {
    /// Column k is of group (first + k) / size: runs, of which a rank's columns may begin inside
    /// one.
    Runs { size: usize, first: usize },
    /// [K] the group of each column (GPTQ's act-order).
    Listed(Vec<u32>),
}

/// e4m3 (OCP 8-bit floating point, no infinities) with scales along each row.
#[derive(Clone, Debug)]
pub struct Scaled<'a> {
    /// [N, K], none of them NaN.
    pub values: Cow<'a, [u8]>,
    /// Columns with one scale: column k has scale k / `run`.
    pub run: usize,
    /// [N, ⌈K / run⌉].
    pub scales: Vec<f32>,
}

/// A part without its numbers: enough to reckon what a device takes for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartShape {
    /// N.
    pub rows: usize,
    /// K.
    pub cols: usize,
    /// How integers in groups lie, where the numbers are such.
    pub integers: Option<IntegerShape>,
}

impl PartShape {
    /// A part that is no integers in groups.
    pub fn numbers(rows: usize, cols: usize) -> Self {
        Self { rows, cols, integers: None }
    }

    /// N and K of matrices stacked by rows.
    pub fn stacked(stack: &[Self]) -> (usize, usize) {
        (stack.iter().map(|part| part.rows).sum(), stack.first().map_or(0, |part| part.cols))
    }
}

/// What [`Grouped`] integers are, without the integers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IntegerShape {
    /// 4 or 8.
    pub bits: usize,
    pub groups: Groups,
    /// G.
    pub count: usize,
}

impl Groups {
    /// The group of column `k`.
    pub fn of(&self, k: usize) -> usize {
        match self {
            Self::Runs { size, first } => (first + k) / size,
            Self::Listed(groups) => groups[k] as usize,
        }
    }

    /// As many as `cols` columns name, where they are runs.
    fn count(&self, cols: usize) -> usize {
        cols.checked_sub(1).map_or(0, |last| self.of(last) + 1)
    }
}

impl Grouped<'_> {
    /// Bytes of `cols` integers of so many bits.
    pub fn row_bytes(bits: usize, cols: usize) -> usize {
        (cols * bits).div_ceil(8)
    }

    /// Integers [N, K], one to a byte, as [`Self::values`] has them.
    pub fn packed(bits: usize, cols: usize, integers: &[u8]) -> Vec<u8> {
        if bits == 8 {
            return integers.to_vec();
        }
        let pair = |pair: &[u8]| pair[0] | pair.get(1).copied().unwrap_or_default() << 4;
        integers.chunks(cols.max(1)).flat_map(|row| row.chunks(2).map(pair)).collect()
    }

    /// The integers of row `n` of `cols`.
    pub fn integers(&self, n: usize, cols: usize) -> impl Iterator<Item = u8> {
        let bytes = Self::row_bytes(self.bits, cols);
        let (bits, row) = (self.bits, &self.values[n * bytes..][..bytes]);
        let each = 8 / bits;
        let mask = u8::MAX >> (8 - bits);
        let integers = (0..each).map(move |at| at * bits);
        row.iter()
            .flat_map(move |byte| integers.clone().map(move |at| byte >> at & mask))
            .take(cols)
    }

    /// G.
    pub fn count(&self, rows: usize) -> usize {
        self.scales.len() / rows.max(1)
    }

    fn check(&self, rows: usize, cols: usize) -> Result<(), String> {
        let Self { bits, values, groups, scales, zeros } = self;
        if !matches!(bits, 4 | 8) {
            return Err(format!("integers of {bits} bits; 4 and 8 are supported"));
        }
        match groups {
            Groups::Runs { size: 0, .. } => return Err("groups of no columns".into()),
            Groups::Listed(listed) if listed.len() != cols => {
                return Err(format!("groups of {} columns, wanted {cols}", listed.len()));
            }
            _ => {}
        }
        let count = self.count(rows);
        let row_bytes = cols.checked_mul(*bits).map(|bits| bits.div_ceil(8));
        let wanted = row_bytes.and_then(|bytes| bytes.checked_mul(rows));
        let lengths = [(values.len(), wanted), (scales.len(), rows.checked_mul(count))];
        if lengths.iter().any(|(has, wanted)| Some(*has) != *wanted) || zeros.len() != scales.len()
        {
            return Err(format!(
                "[{rows}, {cols}] in {} bytes of integers, {} scales and {} zero points",
                values.len(),
                scales.len(),
                zeros.len()
            ));
        }
        let highest = match groups {
            Groups::Runs { size, first } => (first + cols.saturating_sub(1)) / size,
            Groups::Listed(listed) => listed.iter().max().map_or(0, |group| *group as usize),
        };
        if highest >= count {
            return Err(format!("a column is of group {highest} of {count}"));
        }
        let most = 1u16 << bits;
        match zeros.iter().find(|zero| **zero > most) {
            Some(zero) => Err(format!("a zero point of {zero} beside integers of {bits} bits")),
            None => Ok(()),
        }
    }
}

impl Scaled<'_> {
    /// Scales of one row.
    pub fn count(&self, cols: usize) -> usize {
        cols.div_ceil(self.run.max(1))
    }

    fn check(&self, rows: usize, cols: usize) -> Result<(), String> {
        let wanted = rows.checked_mul(self.count(cols));
        let whole = Some(self.values.len()) == rows.checked_mul(cols);
        if self.run == 0 || !whole || Some(self.scales.len()) != wanted {
            return Err(format!(
                "[{rows}, {cols}] in {} values of e4m3 and {} scales for {} columns each",
                self.values.len(),
                self.scales.len(),
                self.run
            ));
        }
        Ok(())
    }
}

impl<'a> WeightPart<'a> {
    /// Rows of numbers or of GGUF blocks.
    pub fn plain(format: Format, rows: usize, cols: usize, data: impl Into<Cow<'a, [u8]>>) -> Self {
        Self { rows, cols, stored: Stored::Plain { format, data: data.into() } }
    }

    /// N and K of the stack of `parts`, once every part is known to be whole: blocks complete, data
    /// as long as the shape says, every group there.
    ///
    /// # Errors
    /// `KernelError::Weight` names the first part that is not.
    pub fn check(parts: &[Self]) -> Result<(usize, usize), KernelError> {
        let cols = parts.first().map_or(0, |part| part.cols);
        if cols == 0 {
            return Err(KernelError::Weight("no columns".into()));
        }
        for part in parts {
            if part.cols != cols {
                let found = part.cols;
                return Err(KernelError::Weight(format!("parts of {cols} and {found} columns")));
            }
            part.check_one().map_err(KernelError::Weight)?;
        }
        Ok((parts.iter().map(|part| part.rows).sum(), cols))
    }

    /// As [`Self::check`], for one part.
    pub(crate) fn check_one(&self) -> Result<(), String> {
        let Self { rows, cols, stored } = self;
        match stored {
            Stored::Plain { format, data } => {
                if !cols.is_multiple_of(format.block_elements()) {
                    return Err(format!("rows of {cols} elements are no whole {format:?} blocks"));
                }
                if format.row_bytes(*cols).checked_mul(*rows) != Some(data.len()) {
                    return Err(format!(
                        "{rows} rows of {cols} {format:?} in {} bytes",
                        data.len()
                    ));
                }
                Ok(())
            }
            Stored::Grouped(grouped) => grouped.check(*rows, *cols),
            Stored::Scaled(scaled) => scaled.check(*rows, *cols),
            Stored::Random(Random { format: RandomFormat::Int4 { group: 0 }, .. }) => {
                Err("groups of no columns".into())
            }
            Stored::Random(_) => Ok(()),
        }
    }

    /// The part without its numbers.
    pub fn shape(&self) -> PartShape {
        let integers = match &self.stored {
            Stored::Grouped(grouped) => Some(IntegerShape {
                bits: grouped.bits,
                groups: grouped.groups.clone(),
                count: grouped.count(self.rows),
            }),
            Stored::Random(random) => random.integers(self.cols),
            Stored::Plain { .. } | Stored::Scaled(_) => None,
        };
        PartShape { rows: self.rows, cols: self.cols, integers }
    }

    /// Bytes of the numbers, without what scales them.
    pub fn bytes(&self) -> usize {
        match &self.stored {
            Stored::Plain { data, .. } => data.len(),
            Stored::Grouped(grouped) => grouped.values.len(),
            Stored::Scaled(scaled) => scaled.values.len(),
            Stored::Random(random) => match random.format {
                RandomFormat::Bf16 => 2 * self.rows * self.cols,
                RandomFormat::Int4 { .. } => self.rows * self.cols / 2,
            },
        }
    }
}
