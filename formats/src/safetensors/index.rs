//! `model.safetensors.index.json`: which file of a checkpoint holds which tensor.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, Visitor},
};

use super::unique;
use crate::{FormatError, error::shown};

/// The index of a checkpoint in several files.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Index {
    /// File name by tensor name.
    #[serde(deserialize_with = "weight_map")]
    pub weight_map: BTreeMap<String, String>,
}

impl Index {
    /// # Errors
    /// Anything but an object with a `weight_map` of plain file names.
    pub fn parse(text: &[u8]) -> Result<Self, FormatError> {
        let index: Self = serde_json::from_slice(text)
            .map_err(|e| FormatError::Malformed(format!("index: {e}")))?;
        // A name with a path in it would make the index read files elsewhere.
        let plain = |f: &str| f.ends_with(".safetensors") && !f.contains(['/', '\\', '\0']);
        match index.weight_map.values().find(|file| !plain(file)) {
            Some(file) => Err(FormatError::Malformed(format!(
                "the index names {}, which is no plain .safetensors file name",
                shown(file)
            ))),
            None if index.weight_map.is_empty() => {
                Err(FormatError::Malformed("the index names no tensors".into()))
            }
            None => Ok(index),
        }
    }

    /// Each file once, in order of name.
    pub fn files(&self) -> BTreeSet<&str> {
        self.weight_map.values().map(String::as_str).collect()
    }
}

fn weight_map<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, String>, D::Error> {
    from.deserialize_map(WeightMap)
}

struct WeightMap;

impl<'de> Visitor<'de> for WeightMap {
    type Value = BTreeMap<String, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of file names by tensor name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut seen = BTreeSet::new();
        let mut files = BTreeMap::new();
        while let Some((name, file)) = map.next_entry::<String, String>()? {
            unique(&mut seen, &name).map_err(A::Error::custom)?;
            files.insert(name, file);
        }
        Ok(files)
    }
}
