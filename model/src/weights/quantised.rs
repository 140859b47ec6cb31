//! Matrices of several tensors: GPTQ, AWQ and fp8.
//!
//! Layouts as the reference implementations store them (AutoGPTQ and GPTQModel `qlinear`, AutoAWQ
//! `packing_utils`, compressed-tensors `forward`). W [N, K] is brought into the kernels' form:
//! integers or codes by row, scales by row.

mod words;

use formats::Tensors;
use half::f16;
use kernels::{Grouped, Groups, IntegerShape, Scaled, Stored, WeightPart};

use super::{
    module::{Cut, Module},
    slice,
};
use crate::{ModelError, config::Quantisation};
use words::Words;

/// Bits of a stored word.
const WORD: usize = 32;

/// How integers lie in words of 32 bits, the lowest bits first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    /// qweight [K · bits / 32, N], qzeros [G, N · bits / 32].
    Gptq { bits: usize, group: Option<usize>, zeros_as_stored: bool },
    /// qweight [K, N / 8], qzeros [G, N / 8], eight outputs in the order 0, 2, 4, 6, 1, 3, 5, 7.
    Awq { group: Option<usize> },
}

impl Packing {
    pub fn of(quantisation: Quantisation) -> Option<Self> {
        match quantisation {
            Quantisation::Gptq { bits, group, zeros_as_stored } => {
                Some(Self::Gptq { bits, group, zeros_as_stored })
            }
            Quantisation::Awq { group } => Some(Self::Awq { group }),
            _ => None,
        }
    }

    pub fn bits(self) -> usize {
        match self {
            Self::Gptq { bits, .. } => bits,
            Self::Awq { .. } => 4,
        }
    }

    /// Integers in a word.
    pub fn each(self) -> usize {
        WORD / self.bits()
    }

    /// Columns with one scale, of K.
    fn group(self, cols: usize) -> usize {
        let (Self::Gptq { group, .. } | Self::Awq { group }) = self;
        group.unwrap_or(cols)
    }

    /// Where output `n` lies in its word of zero points, in bits.
    fn shift(self, n: usize) -> usize {
        let at = n % self.each();
        match self {
            Self::Gptq { bits, .. } => at * bits,
            Self::Awq { .. } if at.is_multiple_of(2) => at / 2 * 4,
            Self::Awq { .. } => (4 + at / 2) * 4,
        }
    }

    fn one(self, word: u32, shift: usize) -> u8 {
        (word >> shift & ((1 << self.bits()) - 1)) as u8
    }
}

/// Names and shapes of a module of integers.
pub(super) fn integer_tensors(
    tensors: &Tensors,
    module: &Module,
    packing: Packing,
) -> Vec<(String, Vec<usize>)> {
    let Module { rows, cols, .. } = *module;
    let (words, groups) = (rows.div_ceil(packing.each()), cols.div_ceil(packing.group(cols)));
    let qweight = match packing {
        Packing::Gptq { .. } => vec![cols.div_ceil(packing.each()), rows],
        Packing::Awq { .. } => vec![cols, words],
    };
    let mut found = vec![
        (module.tensor("qweight"), qweight),
        (module.tensor("qzeros"), vec![groups, words]),
        (module.tensor("scales"), vec![groups, rows]),
    ];
    let order = module.tensor("g_idx");
    if matches!(packing, Packing::Gptq { .. }) && tensors.get(&order).is_some() {
        found.push((order, vec![cols]));
    }
    found
}

/// Names and shapes of a module in fp8; `scales` is the shape of block scales, `None` where there
/// is one for each row or for all.
pub(super) fn fp8_tensors(
    tensors: &Tensors,
    module: &Module,
    scales: Option<Vec<usize>>,
) -> Vec<(String, Vec<usize>)> {
    let mut found = vec![(module.tensor("weight"), vec![module.rows, module.cols])];
    let name = scale_name(tensors, module);
    let shape = scales.unwrap_or_else(|| {
        // One for all comes with or without dimensions.
        let stored = tensors.get(&name).map(|info| info.shape.clone()).unwrap_or_default();
        match stored[..] {
            [] | [1] => stored.iter().map(|n| *n as usize).collect(),
            [_] => vec![module.rows],
            _ => vec![module.rows, 1],
        }
    });
    found.push((name, shape));
    let activations = module.tensor("input_scale");
    if let Some(info) = tensors.get(&activations) {
        // Activations are scaled as they come; a scale found beforehand is not needed.
        found.push((activations, info.shape.iter().map(|n| *n as usize).collect()));
    }
    found
}

fn scale_name(tensors: &Tensors, module: &Module) -> String {
    let inverse = module.tensor("weight_scale_inv");
    match tensors.get(&inverse) {
        Some(_) => inverse,
        None => module.tensor("weight_scale"),
    }
}

/// Refuses scales of integers that are zero, no number or no f16, and columns of groups that are
/// not there.
pub(super) fn check_integers(
    tensors: &Tensors,
    module: &Module,
    packing: Packing,
) -> Result<(), ModelError> {
    let usable = |scale: &f16| scale.is_finite() && scale.to_bits() << 1 != 0;
    if !integer_scales(tensors, module, packing)?.iter().all(usable) {
        return Err(ModelError::Checkpoint(format!(
            "tensor {} has a scale that is zero, no number, or no f16",
            module.tensor("scales")
        )));
    }
    listed_groups(tensors, module, packing).map(|_| ())
}

/// Refuses scales of e4m3 that are zero or no numbers.
pub(super) fn check_fp8(tensors: &Tensors, module: &Module) -> Result<(), ModelError> {
    let scales = fp8_scales(tensors, module)?;
    match scales.iter().find(|scale| !scale.is_finite() || **scale == 0.0) {
        None => Ok(()),
        Some(bad) => {
            let name = scale_name(tensors, module);
            Err(ModelError::Checkpoint(format!("tensor {name} has a scale of {bad}")))
        }
    }
}

/// Reads a cut of a module of integers that [`check_integers`] has seen; columns that begin in the
/// middle of a word are none.
pub(super) fn integers(
    tensors: &Tensors,
    module: &Module,
    packing: Packing,
    cut: &Cut,
) -> Result<WeightPart<'static>, ModelError> {
    let (rows, cols) = (cut.rows(), cut.cols(module));
    let read = Words { tensors, name: module.tensor("qweight"), module, packing };
    let mut values = vec![0; rows.len() * Grouped::row_bytes(packing.bits(), cols.len())];
    let row_bytes = (Grouped::row_bytes(packing.bits(), cols.len()), packing.each());
    slice::by_rows(&mut values, row_bytes, |first, to| read.put(rows.start + first, &cols, to))?;
    let count = group_count(module, packing);
    let stored = integer_scales(tensors, module, packing)?;
    let scale = |row: usize, group: usize| stored[group * module.rows + row];
    let zero_words =
        words(tensors, &module.tensor("qzeros"), 0, count * word_cols(module, packing))?;
    let zero = |row: usize, group: usize| {
        let word = zero_words[group * word_cols(module, packing) + row / packing.each()];
        u16::from(packing.one(word, packing.shift(row)))
    };
    let offset = match packing {
        Packing::Gptq { zeros_as_stored: false, .. } => 1,
        _ => 0,
    };
    let whole = integer_shape(tensors, module, packing)?;
    let first = match &whole.groups {
        Groups::Runs { size, .. } => cols.start / size,
        Groups::Listed(_) => 0,
    };
    let IntegerShape { bits, groups, count } = whole.columns(&cols);
    let each = || rows.clone().flat_map(|row| (first..first + count).map(move |at| (row, at)));
    let grouped = Grouped {
        bits,
        values: values.into(),
        groups,
        scales: each().map(|(row, group)| scale(row, group)).collect(),
        zeros: each().map(|(row, group)| zero(row, group) + offset).collect(),
    };
    Ok(WeightPart { rows: rows.len(), cols: cols.len(), stored: Stored::Grouped(grouped) })
}

/// How the integers of a module lie. Of the files only the columns' groups are read, where they are
/// listed.
pub(super) fn integer_shape(
    tensors: &Tensors,
    module: &Module,
    packing: Packing,
) -> Result<IntegerShape, ModelError> {
    let groups = groups(tensors, module, packing)?;
    Ok(IntegerShape { bits: packing.bits(), groups, count: group_count(module, packing) })
}

/// G.
fn group_count(module: &Module, packing: Packing) -> usize {
    module.cols.div_ceil(packing.group(module.cols))
}

/// [G, N]; NaN where the number in the file is no f16.
fn integer_scales(
    tensors: &Tensors,
    module: &Module,
    packing: Packing,
) -> Result<Vec<f16>, ModelError> {
    let len = group_count(module, packing) * module.rows;
    slice::halves(tensors, &module.tensor("scales"), len)
}

/// [K] the group of each column, where the files list them; each is one that there is.
fn listed_groups(
    tensors: &Tensors,
    module: &Module,
    packing: Packing,
) -> Result<Option<Vec<u32>>, ModelError> {
    let name = module.tensor("g_idx");
    if matches!(packing, Packing::Awq { .. }) || tensors.get(&name).is_none() {
        return Ok(None);
    }
    let (listed, count) = (words(tensors, &name, 0, module.cols)?, group_count(module, packing));
    match listed.iter().find(|group| **group as usize >= count) {
        None => Ok(Some(listed)),
        Some(group) => Err(ModelError::Checkpoint(format!(
            "tensor {name} names group {} of {count}",
            *group as i32
        ))),
    }
}

/// The group of every column.
fn groups(tensors: &Tensors, module: &Module, packing: Packing) -> Result<Groups, ModelError> {
    let size = packing.group(module.cols);
    let runs = Groups::Runs { size, first: 0 };
    let Some(listed) = listed_groups(tensors, module, packing)? else { return Ok(runs) };
    let in_runs = listed.iter().enumerate().all(|(k, group)| *group as usize == k / size);
    Ok(if in_runs { runs } else { Groups::Listed(listed) })
}

/// Words in a row of zero points.
fn word_cols(module: &Module, packing: Packing) -> usize {
    module.rows.div_ceil(packing.each())
}

/// Reads rows of a module in e4m3 that [`check_fp8`] has seen, whose scales are those of `block`
/// rows and columns, or columns of one block, or from a block's first on. The numbers are
/// the weights themselves, so it is only here that they are read and can be found to be none.
pub(super) fn fp8(
    tensors: &Tensors,
    module: &Module,
    block: (usize, usize),
    cut: &Cut,
) -> Result<WeightPart<'static>, ModelError> {
    let (rows, cols) = (cut.rows(), cut.cols(module));
    let name = module.tensor("weight");
    let read = slice::Rows { rows: rows.clone(), row_bytes: module.cols, kept: cols.clone() };
    let values = read.read(tensors, &name)?;
    // Without an end in the middle, the compiler looks at many codes at once.
    let no_number = |codes: &[u8]| codes.iter().fold(false, |no, code| no | (code & 0x7f == 0x7f));
    if values.chunks(4096).any(no_number) {
        return Err(ModelError::Checkpoint(format!(
            "tensor {name} has values that are no numbers"
        )));
    }
    let (block_rows, run) = block;
    let stored = fp8_scales(tensors, module)?;
    let runs = module.cols.div_ceil(run);
    let scale = |row: usize, at: usize| match stored[..] {
        [one] => one,
        _ => stored[row / block_rows * runs + at],
    };
    let runs_here = cols.start / run..cols.end.div_ceil(run);
    // One scale is that of any columns of its run.
    let run = if runs_here.len() == 1 { cols.len() } else { run };
    let scales = rows.clone().flat_map(|row| runs_here.clone().map(move |at| (row, at)));
    let scales = scales.map(|(row, at)| scale(row, at)).collect();
    let stored = Stored::Scaled(Scaled { values: values.into(), run, scales });
    Ok(WeightPart { rows: rows.len(), cols: cols.len(), stored })
}

/// Those of all rows and runs, or one.
fn fp8_scales(tensors: &Tensors, module: &Module) -> Result<Vec<f32>, ModelError> {
    let name = scale_name(tensors, module);
    let count = slice::find(tensors, &name)?.shape.iter().product::<u64>() as usize;
    slice::vector(tensors, &name, 0..count, None)
}

/// `len` words of a tensor of int32.
fn words(tensors: &Tensors, name: &str, first: usize, len: usize) -> Result<Vec<u32>, ModelError> {
    let mut bytes = vec![0; len * 4];
    tensors.read_at(name, first as u64 * 4, &mut bytes)?;
    Ok(bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect())
}
