//! One matrix of a checkpoint, whatever tensors it is stored as.

use std::ops::Range;

use formats::{TensorInfo, Tensors};
use kernels::{Format, PartShape, WeightPart};

use super::{quantised, slice};
use crate::{ModelError, config::Quantisation};

/// A matrix [N, K] under one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Module {
    pub stem: String,
    pub rows: usize,
    pub cols: usize,
    /// Where the matrix is one of several in a tensor [count, N, K].
    pub place: Option<Place>,
}

/// A place among the matrices of one tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub index: usize,
    pub count: usize,
}

/// Which rows or columns of a module a rank holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    Rows(Range<usize>),
    /// As `Rows`, whole heads of this size, each put from interleaved into rotate-half order.
    Heads {
        rows: Range<usize>,
        head_dim: usize,
    },
    /// Some columns of all rows.
    Columns {
        rows: Range<usize>,
        cols: Range<usize>,
    },
}

impl Cut {
    pub fn rows(&self) -> &Range<usize> {
        let (Self::Rows(rows) | Self::Heads { rows, .. } | Self::Columns { rows, .. }) = self;
        rows
    }

    /// Of `module`.
    pub fn cols(&self, module: &Module) -> Range<usize> {
        match self {
            Self::Columns { cols, .. } => cols.clone(),
            Self::Rows(_) | Self::Heads { .. } => 0..module.cols,
        }
    }
}

/// How a module is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Storage {
    Plain(Format),
    Integers(quantised::Packing),
    /// e4m3 with scales for blocks of rows and columns.
    Fp8Blocks {
        rows: usize,
        cols: usize,
    },
    /// e4m3 with scales for rows, or one.
    Fp8,
}

impl Storage {
    /// Whether these columns, of a module in numbers, can be read without others.
    fn cuts_at(self, cols: &Range<usize>) -> bool {
        let whole = |unit: usize| cols.start.is_multiple_of(unit) && cols.end.is_multiple_of(unit);
        match self {
            Self::Plain(format) => whole(format.block_elements()),
            Self::Fp8Blocks { cols: run, .. } => {
                cols.start.is_multiple_of(run) || cols.end <= cols.start.next_multiple_of(run)
            }
            Self::Fp8 => true,
            Self::Integers(packing) => cols.start.is_multiple_of(packing.each()),
        }
    }
}

/// The files, and what the configuration says of them.
#[derive(Clone, Copy)]
pub(super) struct Files<'a> {
    pub tensors: &'a Tensors,
    pub quantisation: Quantisation,
}

impl Files<'_> {
    fn has(&self, module: &Module, ending: &str) -> bool {
        self.tensors.get(&module.tensor(ending)).is_some()
    }

    /// How `module` is stored, by the tensors that there are.
    ///
    /// # Errors
    /// `Checkpoint` where tensors and configuration disagree; `Unsupported` names a format that no
    /// kernel takes.
    pub fn storage(&self, module: &Module) -> Result<Storage, ModelError> {
        let disagree = |tensor: &str, wanted: &str| {
            let tensor = module.tensor(tensor);
            ModelError::Checkpoint(format!(
                "tensor {tensor} is there, but quantization_config does not say {wanted}"
            ))
        };
        if self.has(module, "qweight") {
            let packing = quantised::Packing::of(self.quantisation);
            return Ok(Storage::Integers(
                packing.ok_or_else(|| disagree("qweight", "gptq or awq"))?,
            ));
        }
        if self.has(module, "weight_scale_inv") {
            return match self.quantisation {
                Quantisation::Fp8Blocks { rows, cols } => Ok(Storage::Fp8Blocks { rows, cols }),
                _ => Err(disagree("weight_scale_inv", "fp8 with a weight_block_size")),
            };
        }
        if self.has(module, "weight_scale") {
            return match self.quantisation {
                Quantisation::Fp8 => Ok(Storage::Fp8),
                // compressed-tensors' name of block scales.
                Quantisation::Fp8Blocks { rows, cols } => Ok(Storage::Fp8Blocks { rows, cols }),
                _ => Err(disagree("weight_scale", "fp8 or float-quantized")),
            };
        }
        let name = module.tensor("weight");
        let weight = self.tensors.get(&name).ok_or_else(|| {
            let shape = [module.rows, module.cols];
            ModelError::Checkpoint(format!("tensor {name} {shape:?} is missing"))
        })?;
        slice::format(weight.dtype).map(Storage::Plain).ok_or_else(|| no_kernel(weight))
    }

    /// Bytes of the numbers that [`Self::read`] would read.
    pub fn bytes(&self, module: &Module, cut: &Cut) -> Result<u64, ModelError> {
        let (rows, cols) = (cut.rows().len(), cut.cols(module).len());
        let bytes = match self.storage(module)? {
            Storage::Plain(format) => rows * format.row_bytes(cols),
            Storage::Integers(packing) => rows * cols * packing.bits() / 8,
            Storage::Fp8Blocks { .. } | Storage::Fp8 => rows * cols,
        };
        Ok(bytes as u64)
    }

    /// The shape of what [`Self::read`] would read.
    pub fn shape(&self, module: &Module, cut: &Cut) -> Result<PartShape, ModelError> {
        let integers = match self.storage(module)? {
            Storage::Integers(packing) => {
                let shape = quantised::integer_shape(self.tensors, module, packing)?;
                Some(shape.columns(&cut.cols(module)))
            }
            Storage::Plain(_) | Storage::Fp8Blocks { .. } | Storage::Fp8 => None,
        };
        Ok(PartShape { rows: cut.rows().len(), cols: cut.cols(module).len(), integers })
    }

    /// Reads some rows of a module, and no other numbers of the files.
    ///
    /// # Errors
    /// The files cannot be read, the rows are not the module's, or its numbers are none.
    pub fn read(&self, module: &Module, cut: &Cut) -> Result<WeightPart<'static>, ModelError> {
        if cut.rows().end > module.rows || cut.cols(module).end > module.cols {
            return Err(ModelError::Checkpoint(format!("{cut:?} is no part of {module:?}")));
        }
        let storage = self.storage(module)?;
        let all = Cut::Rows(cut.rows().clone());
        // What is scaled together with other ranks' columns is read with them, and cut then.
        let read = match cut {
            Cut::Columns { cols, .. } if !storage.cuts_at(cols) => &all,
            _ => cut,
        };
        let part = match storage {
            Storage::Plain(format) => slice::plain(self.tensors, module, format, read),
            Storage::Integers(packing) => quantised::integers(self.tensors, module, packing, read),
            Storage::Fp8Blocks { rows, cols } => {
                quantised::fp8(self.tensors, module, (rows, cols), read)
            }
            Storage::Fp8 => quantised::fp8(self.tensors, module, (1, module.cols), read),
        }?;
        Ok(match cut {
            Cut::Columns { cols, .. } if part.cols != cols.len() => part.columns(cols),
            _ => part,
        })
    }

    /// Files of some formats have matrices of one row without that dimension.
    fn plain_shape(&self, module: &Module) -> Vec<usize> {
        let stored = self.tensors.get(&module.tensor("weight")).map(|info| info.shape.len());
        match (module.place, module.rows, stored) {
            (Some(place), ..) => vec![place.count, module.rows, module.cols],
            (None, 1, Some(1)) => vec![module.cols],
            _ => vec![module.rows, module.cols],
        }
    }

    /// Refuses a module whose numbers would be scaled by what is no scale.
    ///
    /// # Errors
    /// `Checkpoint` names the tensor; the files cannot be read.
    pub fn check_scales(&self, module: &Module) -> Result<(), ModelError> {
        match self.storage(module)? {
            Storage::Plain(_) => Ok(()),
            Storage::Integers(packing) => quantised::check_integers(self.tensors, module, packing),
            Storage::Fp8Blocks { .. } | Storage::Fp8 => quantised::check_fp8(self.tensors, module),
        }
    }

    /// The tensors that the module consists of, with their shapes; those that may be missing are
    /// only there where they are.
    ///
    /// # Errors
    /// As [`Self::storage`].
    pub fn tensors_of(&self, module: &Module) -> Result<Vec<(String, Vec<usize>)>, ModelError> {
        let Module { rows, cols, .. } = *module;
        Ok(match self.storage(module)? {
            Storage::Plain(_) => vec![(module.tensor("weight"), self.plain_shape(module))],
            Storage::Integers(packing) => quantised::integer_tensors(self.tensors, module, packing),
            Storage::Fp8Blocks { rows: block_rows, cols: block_cols } => {
                let scales = vec![rows.div_ceil(block_rows), cols.div_ceil(block_cols)];
                quantised::fp8_tensors(self.tensors, module, Some(scales))
            }
            Storage::Fp8 => quantised::fp8_tensors(self.tensors, module, None),
        })
    }
}

impl Module {
    pub fn new(stem: String, (rows, cols): (usize, usize)) -> Self {
        Self { stem, rows, cols, place: None }
    }

    /// The name of one of its tensors.
    pub fn tensor(&self, ending: &str) -> String {
        format!("{}.{ending}", self.stem)
    }
}

/// The refusal of a number format.
pub(super) fn no_kernel(info: &TensorInfo) -> ModelError {
    ModelError::Unsupported(format!(
        "tensor {} is stored as {}; use a file in BF16, F16, Q8_0, Q6_K, Q5_K_M or Q4_K_M",
        info.name, info.dtype.name
    ))
}
