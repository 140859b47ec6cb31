//! The tensors that a checkpoint of a given configuration must have, and no others.

use std::{collections::BTreeSet, iter};

use formats::TensorInfo;

use super::{
    TensorNames,
    module::{Cut, Files, Module, Storage, no_kernel},
    modules::Modules,
    slice,
};
use crate::{DecoderConfig, ModelError, Shard};

/// What a configuration asks for: in a layer, or beside them.
pub(super) struct Expected {
    /// Matrices, in order of use.
    pub modules: Vec<Module>,
    /// Names and lengths.
    pub vectors: Vec<(String, usize)>,
}

impl Expected {
    /// One after another, so that a configuration which asks for millions of tensors is refused at
    /// the first one that is not there.
    ///
    /// # Errors
    /// A configuration that not even one rank can run.
    pub fn each<'a>(
        config: &'a DecoderConfig,
        names: &'a TensorNames,
    ) -> Result<impl Iterator<Item = Self> + 'a, ModelError> {
        let (all, whole) = (Modules { config, names }, Shard::new(config, 0, 1)?);
        let vectors = vec![(names.final_norm.to_owned(), config.hidden)];
        let tables = Self { modules: once(all.tables(&whole)), vectors };
        let layers = (0..config.layers).map(move |layer| Self::of_layer(all, layer, &whole));
        Ok(iter::once(tables).chain(layers))
    }

    fn of_layer(all: Modules<'_>, layer: usize, whole: &Shard) -> Self {
        let (config, names) = (all.config, all.names);
        let named = |name: &str| names.of_layer(layer, name);
        let norms = [names.input_norm, names.post_norm];
        let mut vectors: Vec<_> = norms.map(|norm| (named(norm), config.hidden)).into();
        if config.qkv_bias {
            let biased = once(all.qkv(layer, whole).into());
            vectors.extend(biased.iter().map(|module| (module.tensor("bias"), module.rows)));
        }
        if config.qk_norm {
            vectors.extend([names.q_norm, names.k_norm].map(|norm| (named(norm), config.head_dim)));
        }
        let cuts = all.layer(layer, whole).into_iter().flat_map(|(_, cuts)| cuts);
        Self { modules: once(cuts.collect()), vectors }
    }
}

/// Parts of one packed matrix, which follow each other, count once.
fn once(cuts: Vec<(Module, Cut)>) -> Vec<Module> {
    let mut modules: Vec<Module> = cuts.into_iter().map(|(module, _)| module).collect();
    modules.dedup();
    modules
}

/// Refuses missing, superfluous and misshapen tensors, and formats that nothing here multiplies.
pub(super) fn check(
    files: Files<'_>,
    config: &DecoderConfig,
    names: &TensorNames,
) -> Result<(), ModelError> {
    let (mut expected, mut quantised) = (BTreeSet::new(), BTreeSet::new());
    for Expected { modules, vectors } in Expected::each(config, names)? {
        for module in modules {
            let storage = files.storage(&module)?;
            for (name, shape) in files.tensors_of(&module)? {
                let info = shaped(files, &name, &shape)?;
                check_dtype(storage, info)?;
                expected.insert(name);
            }
            if !matches!(storage, Storage::Plain(_)) {
                quantised.insert(module.stem);
            }
        }
        for (name, len) in vectors {
            check_vector(shaped(files, &name, &[len])?)?;
            expected.insert(name);
        }
    }
    let head = format!("{}.", names.lm_head);
    for name in files.tensors.names().filter(|name| !expected.contains(*name)) {
        let ignored = (config.tied && name.starts_with(&head))
            || names.ignored.iter().any(|end| name.ends_with(end));
        let stem = name.strip_suffix(".bias");
        // Files of old GPTQ tools have a bias of zeros beside every quantised matrix.
        let idle_bias = stem.is_some_and(|stem| quantised.contains(stem))
            && slice::is_zero(files.tensors, name)?;
        if !ignored && !idle_bias {
            return Err(ModelError::Checkpoint(format!(
                "tensor {} has no place in a {} model of {} layers as the configuration describes \
                 it",
                name.escape_debug(),
                config.family.name,
                config.layers
            )));
        }
    }
    Ok(())
}

fn shaped<'a>(files: Files<'a>, name: &str, shape: &[usize]) -> Result<&'a TensorInfo, ModelError> {
    let info = files
        .tensors
        .get(name)
        .ok_or_else(|| ModelError::Checkpoint(format!("tensor {name} {shape:?} is missing")))?;
    if !info.shape.iter().copied().eq(shape.iter().map(|n| *n as u64)) {
        return Err(ModelError::Checkpoint(format!(
            "tensor {} has shape {:?}, expected is {shape:?}",
            info.name, info.shape
        )));
    }
    Ok(info)
}

fn check_vector(info: &TensorInfo) -> Result<(), ModelError> {
    match slice::format(info.dtype) {
        Some(format) if format.block_elements() == 1 => Ok(()),
        _ => Err(ModelError::Unsupported(format!(
            "vector {} is stored as {}, not F32, F16 or BF16",
            info.name, info.dtype.name
        ))),
    }
}

/// Tensors of a quantised matrix have the number formats of its method.
fn check_dtype(storage: Storage, info: &TensorInfo) -> Result<(), ModelError> {
    let ending = info.name.rsplit('.').next().unwrap_or_default();
    let wanted: &[&str] = match (storage, ending) {
        (Storage::Plain(_), _) => {
            return slice::format(info.dtype).map(|_| ()).ok_or_else(|| no_kernel(info));
        }
        (Storage::Integers(_), "scales") => &["F16", "BF16", "F32"],
        (Storage::Integers(_), _) => &["I32"],
        (_, "weight") => &["F8_E4M3"],
        _ => &["F32", "F16", "BF16"],
    };
    if wanted.contains(&info.dtype.name) {
        return Ok(());
    }
    Err(ModelError::Unsupported(format!(
        "tensor {} is stored as {}, not {}",
        info.name,
        info.dtype.name,
        wanted.join(" or ")
    )))
}
