//! A short name for everything that answers depend on: weights, tokenizer, template.

use std::collections::BTreeMap;

use formats::Tensors;
use sha2::{Digest, Sha256};

use super::{Checkpoint, Source};
use crate::ModelError;

/// Of a tensor, so many bytes from its middle are looked at.
const SAMPLE_BYTES: u64 = 4096;
/// Tensors that are looked at, at most: experts have many.
const SAMPLES_MAX: usize = 2048;
/// Bytes of the name: enough that no two of one operator's models ever share it.
const NAME_BYTES: usize = 16;

impl Checkpoint {
    /// Names the model by its files: those of its text, each tensor's name, type and shape, and a
    /// piece of its numbers. Checkpoints of one architecture that were trained differently differ
    /// in every matrix that was trained, so that a piece of each tells them apart; to read them
    /// whole would take as long as to load them. 32 hexadecimal digits, the same on every machine.
    ///
    /// # Errors
    /// `Checkpoint` and `Io` where the tensors cannot be read.
    pub fn fingerprint(&self, text: &BTreeMap<String, Vec<u8>>) -> Result<String, ModelError> {
        let mut hasher = Sha256::new();
        for (name, file) in text {
            put(&mut hasher, name.as_bytes());
            put(&mut hasher, file);
        }
        match &self.source {
            Source::Files { tensors, .. } => sample(&mut hasher, tensors)?,
            Source::Outline(numbers) => put(&mut hasher, format!("{numbers:?}").as_bytes()),
            Source::Seeded(seeded) => put(&mut hasher, format!("{seeded:?}").as_bytes()),
        }
        let digest = hasher.finalize();
        Ok(digest[..NAME_BYTES].iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

fn sample(hasher: &mut Sha256, tensors: &Tensors) -> Result<(), ModelError> {
    let names: Vec<&str> = tensors.names().collect();
    let step = names.len().div_ceil(SAMPLES_MAX).max(1);
    let mut piece = Vec::new();
    for (at, name) in names.into_iter().enumerate() {
        let Some(tensor) = tensors.get(name) else { continue };
        put(hasher, name.as_bytes());
        put(hasher, format!("{} {:?}", tensor.dtype.name, tensor.shape).as_bytes());
        if at % step == 0 {
            let len = tensor.bytes.min(SAMPLE_BYTES);
            piece.resize(len as usize, 0);
            tensors.read_at(name, (tensor.bytes - len) / 2, &mut piece)?;
            put(hasher, &piece);
        }
    }
    Ok(())
}

/// With its length in front, so that no two lists of parts look alike.
fn put(hasher: &mut Sha256, part: &[u8]) {
    hasher.update((part.len() as u64).to_le_bytes());
    hasher.update(part);
}
