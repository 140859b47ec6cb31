//! A model of which there is the configuration alone: what its matrices would be stored as.

use kernels::{Groups, IntegerShape, PartShape};
use serde::{Deserialize, Serialize};

use super::{
    TensorNames,
    module::{Cut, Module},
};
use crate::{ModelError, config::Quantisation};

/// How the matrices of layers are stored. Tables and what chooses experts are bf16 always.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Numbers {
    Bf16,
    /// e4m3 with scales.
    Fp8,
    /// Integers of 4 or 8 bits that share a scale by runs of columns; one for all where `None`.
    Integers {
        bits: usize,
        group: Option<usize>,
    },
}

impl Numbers {
    /// As published checkpoints of 4 bits are.
    pub const INT4: Self = Self::Integers { bits: 4, group: Some(128) };

    pub(super) fn of(quantisation: Quantisation) -> Self {
        match quantisation {
            Quantisation::None => Self::Bf16,
            Quantisation::Fp8Blocks { .. } | Quantisation::Fp8 => Self::Fp8,
            Quantisation::Gptq { bits, group, .. } => Self::Integers { bits, group },
            Quantisation::Awq { group } => Self::Integers { bits: 4, group },
        }
    }

    /// How `module` is stored.
    fn of_module(self, module: &Module, names: &TensorNames) -> Self {
        let chooses = [names.experts.router, names.experts.shared_gate];
        let ends =
            |name: &&str| module.stem.strip_suffix(*name).is_some_and(|layer| layer.ends_with('.'));
        let is_chooser = chooses.iter().any(ends);
        let is_table = [names.embed, names.lm_head].contains(&&*module.stem);
        if is_table || is_chooser { Self::Bf16 } else { self }
    }

    /// Bytes of the numbers of a part, without what scales them.
    pub(super) fn bytes(self, module: &Module, cut: &Cut, names: &TensorNames) -> u64 {
        let elements = cut.rows().len() * cut.cols(module).len();
        (match self.of_module(module, names) {
            Self::Bf16 => elements * 2,
            Self::Fp8 => elements,
            Self::Integers { bits, .. } => elements * bits / 8,
        }) as u64
    }

    pub(super) fn shape(self, module: &Module, cut: &Cut, names: &TensorNames) -> PartShape {
        let cols = cut.cols(module);
        let integers = match self.of_module(module, names) {
            Self::Bf16 | Self::Fp8 => None,
            Self::Integers { bits, group } => {
                let size = group.unwrap_or(module.cols);
                let groups = Groups::Runs { size, first: 0 };
                let shape = IntegerShape { bits, groups, count: module.cols.div_ceil(size) };
                Some(shape.columns(&cols))
            }
        };
        PartShape { rows: cut.rows().len(), cols: cols.len(), integers }
    }
}

/// The refusal to read what is not there.
pub(super) fn no_numbers(name: &str) -> ModelError {
    ModelError::Checkpoint(format!(
        "{name} has a configuration and no weights: it can be planned, not loaded"
    ))
}
