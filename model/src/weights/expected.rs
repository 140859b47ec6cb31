//! The tensors that a checkpoint of a given configuration must have, and no others.

use std::collections::BTreeSet;

use formats::{Dtype, TensorInfo, Tensors};
use kernels::Format;

use super::{Qkv, TensorNames};
use crate::{DecoderConfig, ModelError};

const FORMATS: [(&str, Format); 11] = [
    ("F32", Format::F32),
    ("F16", Format::F16),
    ("BF16", Format::Bf16),
    ("Q4_0", Format::Q4_0),
    ("Q4_1", Format::Q4_1),
    ("Q5_0", Format::Q5_0),
    ("Q5_1", Format::Q5_1),
    ("Q8_0", Format::Q8_0),
    ("Q4_K", Format::Q4K),
    ("Q5_K", Format::Q5K),
    ("Q6_K", Format::Q6K),
];

/// How the kernels call a file's number format.
pub(super) fn format(dtype: Dtype) -> Option<Format> {
    FORMATS.iter().find(|(name, _)| *name == dtype.name).map(|(_, format)| *format)
}

/// Names and shapes in order of use: matrices [N, K], vectors [N].
pub(super) fn tensors(config: &DecoderConfig, names: &TensorNames) -> Vec<(String, Vec<usize>)> {
    let DecoderConfig { hidden, vocab, intermediate, head_dim, .. } = *config;
    let (q, kv) = (config.q_heads * head_dim, config.kv_heads * head_dim);
    let mut expected = vec![(names.embed.to_owned(), vec![vocab, hidden])];
    for layer in 0..config.layers {
        let mut add = |name: &str, shape: &[usize]| {
            expected.push((names.of_layer(layer, name), shape.to_vec()));
        };
        add(names.input_norm, &[hidden]);
        let projections = match names.qkv {
            Qkv::Separate([q_stem, k, v]) => vec![(q_stem, q), (k, kv), (v, kv)],
            Qkv::Packed(stem) => vec![(stem, q + 2 * kv)],
        };
        for (stem, rows) in projections {
            add(&format!("{stem}.weight"), &[rows, hidden]);
            if config.qkv_bias {
                add(&format!("{stem}.bias"), &[rows]);
            }
        }
        if config.qk_norm {
            add(names.q_norm, &[head_dim]);
            add(names.k_norm, &[head_dim]);
        }
        add(names.attn_out, &[hidden, q]);
        add(names.post_norm, &[hidden]);
        add(names.gate, &[intermediate, hidden]);
        add(names.up, &[intermediate, hidden]);
        add(names.down, &[hidden, intermediate]);
    }
    expected.push((names.final_norm.to_owned(), vec![hidden]));
    if !config.tied {
        expected.push((names.lm_head.to_owned(), vec![vocab, hidden]));
    }
    expected
}

/// Refuses missing, superfluous and misshapen tensors, and formats that nothing here multiplies.
pub(super) fn check(
    found: &Tensors,
    config: &DecoderConfig,
    names: &TensorNames,
) -> Result<(), ModelError> {
    let expected = tensors(config, names);
    for (name, shape) in &expected {
        let info = found
            .get(name)
            .ok_or_else(|| ModelError::Checkpoint(format!("tensor {name} {shape:?} is missing")))?;
        check_one(info, shape)?;
    }
    let expected: BTreeSet<_> = expected.iter().map(|(name, _)| name.as_str()).collect();
    let ignored = |name: &str| {
        (config.tied && name == names.lm_head) || names.ignored.iter().any(|e| name.ends_with(e))
    };
    match found.names().find(|name| !expected.contains(name) && !ignored(name)) {
        None => Ok(()),
        Some(extra) => Err(ModelError::Checkpoint(format!(
            "tensor {} has no place in a {} model of {} layers as the configuration describes it",
            extra.escape_debug(),
            config.family,
            config.layers
        ))),
    }
}

fn check_one(info: &TensorInfo, shape: &[usize]) -> Result<(), ModelError> {
    if !info.shape.iter().copied().eq(shape.iter().map(|n| *n as u64)) {
        return Err(ModelError::Checkpoint(format!(
            "tensor {} has shape {:?}, expected is {shape:?}",
            info.name, info.shape
        )));
    }
    match format(info.dtype) {
        None => Err(ModelError::Unsupported(format!(
            "tensor {} is stored as {}; use a file in BF16, F16, Q8_0, Q6_K, Q5_K_M or Q4_K_M",
            info.name, info.dtype.name
        ))),
        Some(format) if shape.len() == 1 && format.block_elements() > 1 => {
            Err(ModelError::Unsupported(format!(
                "vector {} is stored as {}, not F32, F16 or BF16",
                info.name, info.dtype.name
            )))
        }
        Some(_) => Ok(()),
    }
}
