//! The JSON header, with names that appear twice refused.

use std::{collections::BTreeSet, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{Error, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

use super::unique;
use crate::FormatError;

/// Dimensions beyond this are refused.
const DIMENSIONS_MAX: usize = 8;

/// One tensor as the header describes it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Entry {
    pub dtype: String,
    #[serde(deserialize_with = "shape")]
    pub shape: Vec<u64>,
    /// First byte, and first byte after; from the end of the header.
    pub data_offsets: [u64; 2],
}

/// The tensors in the header's order.
pub(super) fn parse(header: &[u8]) -> Result<Vec<(String, Entry)>, FormatError> {
    if header.first() != Some(&b'{') {
        return Err(FormatError::Malformed("the header does not begin with {".into()));
    }
    serde_json::from_slice::<Header>(header)
        .map(|header| header.0)
        .map_err(|e| FormatError::Malformed(format!("header: {e}")))
}

struct Header(Vec<(String, Entry)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_map(Entries)
    }
}

struct Entries;

impl<'de> Visitor<'de> for Entries {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut seen = BTreeSet::new();
        let mut entries = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            unique(&mut seen, &name).map_err(A::Error::custom)?;
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
            } else {
                entries.push((name, map.next_value()?));
            }
        }
        Ok(Header(entries))
    }
}

fn shape<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u64>, D::Error> {
    from.deserialize_seq(Shape)
}

struct Shape;

impl<'de> Visitor<'de> for Shape {
    type Value = Vec<u64>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {DIMENSIONS_MAX} dimensions")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<u64>, A::Error> {
        let mut shape = Vec::new();
        while let Some(dimension) = list.next_element()? {
            if shape.len() == DIMENSIONS_MAX {
                return Err(A::Error::invalid_length(shape.len() + 1, &self));
            }
            shape.push(dimension);
        }
        Ok(shape)
    }
}
