//! What tells one checkpoint from another, without reading it whole.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
};

use super::{Checkpoint, Source};
use crate::ModelError;

impl Checkpoint {
    /// What there is and what it is like: a hash of the configuration, each tensor's type and
    /// shape, and a name for a piece of each tensor's numbers, which differ between models of one
    /// shape. Equal for copies, wherever they are, as this program sees them.
    ///
    /// # Errors
    /// `Io` and `Checkpoint` where the numbers cannot be read.
    pub fn facts(&self) -> Result<BTreeMap<String, String>, ModelError> {
        let mut facts = BTreeMap::from([
            ("the configuration".to_owned(), hashed(&format!("{:?}", self.config))),
            ("the numbers' content".to_owned(), self.fingerprint(&BTreeMap::new())?),
        ]);
        if let Source::Files { tensors, .. } = &self.source {
            let named = tensors.names().filter_map(|name| tensors.get(name));
            facts.extend(named.map(|tensor| {
                let told = format!("{} {:?}", tensor.dtype.name, tensor.shape);
                (format!("tensor {}", tensor.name), told)
            }));
        }
        Ok(facts)
    }
}

fn hashed(text: &str) -> String {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}
