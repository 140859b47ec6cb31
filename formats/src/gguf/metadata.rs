//! The typed key-value pairs of a GGUF file.

use std::{collections::BTreeMap, io::Read};

use crate::{FormatError, cursor::Cursor, error::shown};

/// Arrays may hold arrays this deep; nothing in use goes beyond one level.
const NESTING_MAX: usize = 4;

const ARRAY: u32 = 9;

/// One value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    String(String),
    Array(Array),
}

/// Values of one type, kept as small as they are in the file.
#[derive(Clone, Debug, PartialEq)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bool(Vec<bool>),
    String(Vec<String>),
    Array(Vec<Array>),
}

/// The metadata of one file, by key.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata(BTreeMap<String, Value>);

impl Metadata {
    pub(super) fn read<R: Read>(
        cursor: &mut Cursor<R>,
        entries: usize,
    ) -> Result<Self, FormatError> {
        let mut values = BTreeMap::new();
        for _ in 0..entries {
            let key = cursor.string("a metadata key")?;
            let kind = cursor.u32("a metadata type")?;
            let value = value(cursor, kind, &key)?;
            if values.contains_key(&key) {
                let text = format!("metadata key {} appears twice", shown(&key));
                return Err(FormatError::Malformed(text));
            }
            values.insert(key, value);
        }
        Ok(Self(values))
    }

    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }

    /// In order of key.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, FormatError> {
        self.0
            .get(key)
            .map(|value| {
                read(value).ok_or_else(|| {
                    FormatError::Malformed(format!("metadata {} is no {wanted}", shown(key)))
                })
            })
            .transpose()
    }

    /// `None` where the key is missing.
    ///
    /// # Errors
    /// The value is of another type.
    pub fn string(&self, key: &str) -> Result<Option<&str>, FormatError> {
        self.typed(key, "string", |value| match value {
            Value::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// Integers of any width and sign, if not negative.
    ///
    /// # Errors
    /// As [`Self::string`].
    pub fn unsigned(&self, key: &str) -> Result<Option<u64>, FormatError> {
        self.typed(key, "whole number", |value| match value {
            Value::Unsigned(n) => Some(*n),
            Value::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        })
    }

    /// Floats and integers.
    ///
    /// # Errors
    /// As [`Self::string`].
    pub fn number(&self, key: &str) -> Result<Option<f64>, FormatError> {
        self.typed(key, "number", |value| match value {
            Value::Float(x) => Some(*x),
            Value::Unsigned(n) => Some(*n as f64),
            Value::Signed(n) => Some(*n as f64),
            _ => None,
        })
    }

    /// # Errors
    /// As [`Self::string`].
    pub fn flag(&self, key: &str) -> Result<Option<bool>, FormatError> {
        self.typed(key, "boolean", |value| match value {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    /// # Errors
    /// As [`Self::string`].
    pub fn array(&self, key: &str) -> Result<Option<&Array>, FormatError> {
        self.typed(key, "array", |value| match value {
            Value::Array(array) => Some(array),
            _ => None,
        })
    }

    /// # Errors
    /// As [`Self::string`].
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>, FormatError> {
        self.typed(key, "array of strings", |value| match value {
            Value::Array(Array::String(list)) => Some(list.as_slice()),
            _ => None,
        })
    }
}

impl Array {
    pub fn len(&self) -> usize {
        match self {
            Self::U8(list) => list.len(),
            Self::I8(list) => list.len(),
            Self::U16(list) => list.len(),
            Self::I16(list) => list.len(),
            Self::U32(list) => list.len(),
            Self::I32(list) => list.len(),
            Self::U64(list) => list.len(),
            Self::I64(list) => list.len(),
            Self::F32(list) => list.len(),
            Self::F64(list) => list.len(),
            Self::Bool(list) => list.len(),
            Self::String(list) => list.len(),
            Self::Array(list) => list.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Integers of any width and sign; `None` where there is anything else or a negative one.
    pub fn to_unsigned(&self) -> Option<Vec<u64>> {
        fn all<T: Copy + TryInto<u64>>(list: &[T]) -> Option<Vec<u64>> {
            list.iter().map(|n| (*n).try_into().ok()).collect()
        }
        match self {
            Self::U8(list) => all(list),
            Self::I8(list) => all(list),
            Self::U16(list) => all(list),
            Self::I16(list) => all(list),
            Self::U32(list) => all(list),
            Self::I32(list) => all(list),
            Self::U64(list) => all(list),
            Self::I64(list) => all(list),
            _ => None,
        }
    }
}

fn value<R: Read>(cursor: &mut Cursor<R>, kind: u32, key: &str) -> Result<Value, FormatError> {
    let what = "a metadata value";
    Ok(match kind {
        0 => Value::Unsigned(u64::from(u8::from_le_bytes(cursor.array(what)?))),
        1 => Value::Signed(i64::from(i8::from_le_bytes(cursor.array(what)?))),
        2 => Value::Unsigned(u64::from(u16::from_le_bytes(cursor.array(what)?))),
        3 => Value::Signed(i64::from(i16::from_le_bytes(cursor.array(what)?))),
        4 => Value::Unsigned(u64::from(u32::from_le_bytes(cursor.array(what)?))),
        5 => Value::Signed(i64::from(i32::from_le_bytes(cursor.array(what)?))),
        6 => Value::Float(f64::from(f32::from_le_bytes(cursor.array(what)?))),
        7 => Value::Bool(boolean(cursor.array(what)?)?),
        8 => Value::String(cursor.string(what)?),
        ARRAY => Value::Array(array(cursor, key, 1)?),
        10 => Value::Unsigned(u64::from_le_bytes(cursor.array(what)?)),
        11 => Value::Signed(i64::from_le_bytes(cursor.array(what)?)),
        12 => Value::Float(f64::from_le_bytes(cursor.array(what)?)),
        other => return Err(unknown(other, key)),
    })
}

fn array<R: Read>(cursor: &mut Cursor<R>, key: &str, depth: usize) -> Result<Array, FormatError> {
    if depth > NESTING_MAX {
        let text = format!("metadata {} nests arrays beyond {NESTING_MAX}", shown(key));
        return Err(FormatError::Malformed(text));
    }
    let kind = cursor.u32("an array's type")?;
    let count = cursor.u64("an array's length")?;
    Ok(match kind {
        0 => Array::U8(list(cursor, count, u8::from_le_bytes)?),
        1 => Array::I8(list(cursor, count, i8::from_le_bytes)?),
        2 => Array::U16(list(cursor, count, u16::from_le_bytes)?),
        3 => Array::I16(list(cursor, count, i16::from_le_bytes)?),
        4 => Array::U32(list(cursor, count, u32::from_le_bytes)?),
        5 => Array::I32(list(cursor, count, i32::from_le_bytes)?),
        6 => Array::F32(list(cursor, count, f32::from_le_bytes)?),
        7 => {
            let bytes: Vec<[u8; 1]> = list(cursor, count, |byte| byte)?;
            Array::Bool(bytes.into_iter().map(boolean).collect::<Result<_, _>>()?)
        }
        8 => {
            let count = cursor.fitting("an array's length", count, 8)?;
            let mut strings = Vec::with_capacity(count);
            for _ in 0..count {
                strings.push(cursor.string("a string in an array")?);
            }
            Array::String(strings)
        }
        ARRAY => {
            let count = cursor.fitting("an array's length", count, 12)?;
            let mut arrays = Vec::with_capacity(count);
            for _ in 0..count {
                arrays.push(array(cursor, key, depth + 1)?);
            }
            Array::Array(arrays)
        }
        10 => Array::U64(list(cursor, count, u64::from_le_bytes)?),
        11 => Array::I64(list(cursor, count, i64::from_le_bytes)?),
        12 => Array::F64(list(cursor, count, f64::from_le_bytes)?),
        other => return Err(unknown(other, key)),
    })
}

fn list<R: Read, T, const N: usize>(
    cursor: &mut Cursor<R>,
    count: u64,
    read: impl Fn([u8; N]) -> T,
) -> Result<Vec<T>, FormatError> {
    let count = cursor.fitting("an array's length", count, N as u64)?;
    let mut values = Vec::with_capacity(count);
    for _ in 0..count {
        values.push(read(cursor.array("a value in an array")?));
    }
    Ok(values)
}

fn boolean(byte: [u8; 1]) -> Result<bool, FormatError> {
    match byte[0] {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(FormatError::Malformed(format!("a boolean of {other}"))),
    }
}

fn unknown(kind: u32, key: &str) -> FormatError {
    FormatError::Unsupported(format!("metadata {} of type number {kind}", shown(key)))
}
