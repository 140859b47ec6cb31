//! A JSON object read field by field: every value is checked, and what nobody knows is refused by
//! name instead of being ignored, so that a typing error is told. `null` counts as absent, as
//! OpenAI's clients mean it.

use crate::RouterError;
use serde_json::{Map, Value};

/// The fields of an object that are not yet read.
#[derive(Debug)]
pub(crate) struct Fields {
    /// Where the object stands in the body, e.g. `messages[0].`; empty for the body itself.
    at: String,
    map: Map<String, Value>,
    /// Names of fields that were given and have no effect.
    ignored: Vec<String>,
}

impl Fields {
    /// The whole body.
    pub fn parse(body: &[u8]) -> Result<Self, RouterError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Self { at: String::new(), map, ignored: Vec::new() }),
            Ok(_) => Err(malformed("the body is not a JSON object")),
            Err(error) => Err(malformed(&format!("the body is not valid JSON: {error}"))),
        }
    }

    /// A nested object called `name`.
    pub fn nested(name: &str, value: Value) -> Result<Self, RouterError> {
        match value {
            Value::Object(map) => Ok(Self { at: format!("{name}."), map, ignored: Vec::new() }),
            other => Err(wrong(name, "an object", &other)),
        }
    }

    /// The full name of a field.
    pub fn name(&self, field: &str) -> String {
        format!("{}{field}", self.at)
    }

    pub fn take(&mut self, field: &str) -> Option<Value> {
        self.map.remove(field).filter(|value| !value.is_null())
    }

    pub fn has(&self, field: &str) -> bool {
        self.map.contains_key(field)
    }

    /// Whether the field is there and null.
    pub fn is_null(&self, field: &str) -> bool {
        self.map.get(field).is_some_and(Value::is_null)
    }

    pub fn string(&mut self, field: &str) -> Result<Option<String>, RouterError> {
        match self.take(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(&self.name(field), "a string", &other)),
        }
    }

    pub fn boolean(&mut self, field: &str) -> Result<Option<bool>, RouterError> {
        match self.take(field) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(wrong(&self.name(field), "true or false", &other)),
        }
    }

    pub fn float(&mut self, field: &str) -> Result<Option<f32>, RouterError> {
        let Some(value) = self.take(field) else { return Ok(None) };
        match value.as_f64() {
            Some(number) => Ok(Some(number as f32)),
            None => Err(wrong(&self.name(field), "a number", &value)),
        }
    }

    /// A whole number that is not negative.
    pub fn uint(&mut self, field: &str) -> Result<Option<u32>, RouterError> {
        let Some(value) = self.take(field) else { return Ok(None) };
        as_uint(&self.name(field), &value).map(Some)
    }

    /// A whole number.
    pub fn int(&mut self, field: &str) -> Result<Option<i32>, RouterError> {
        let Some(value) = self.take(field) else { return Ok(None) };
        match value.as_i64().and_then(|number| i32::try_from(number).ok()) {
            Some(number) => Ok(Some(number)),
            None => Err(wrong(&self.name(field), "a whole number of 32 bits", &value)),
        }
    }

    pub fn array(&mut self, field: &str) -> Result<Option<Vec<Value>>, RouterError> {
        match self.take(field) {
            None => Ok(None),
            Some(Value::Array(values)) => Ok(Some(values)),
            Some(other) => Err(wrong(&self.name(field), "an array", &other)),
        }
    }

    /// Whole numbers that are not negative; none where there is no such field.
    pub fn uints(&mut self, field: &str) -> Result<Vec<u32>, RouterError> {
        let values = self.array(field)?.unwrap_or_default();
        let name = self.name(field);
        values.iter().map(|value| as_uint(&name, value)).collect()
    }

    pub fn object(&mut self, field: &str) -> Result<Option<Map<String, Value>>, RouterError> {
        match self.take(field) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(wrong(&self.name(field), "an object", &other)),
        }
    }

    /// A field that changes no answer, whatever its value.
    pub fn ignore(&mut self, field: &str) {
        if self.take(field).is_some() {
            self.ignored.push(self.name(field));
        }
    }

    /// A field that changes nothing as long as it has one of the values it would have anyway.
    pub fn only(&mut self, field: &str, allowed: &[Value]) -> Result<(), RouterError> {
        let Some(value) = self.take(field) else { return Ok(()) };
        if allowed.iter().any(|allowed| same(allowed, &value)) {
            return Ok(());
        }
        let allowed: Vec<String> = allowed.iter().map(Value::to_string).collect();
        let (name, allowed) = (self.name(field), allowed.join(" or "));
        let message = format!("{name} is supported only as {allowed}; leave it out");
        Err(RouterError::invalid(name, message))
    }

    /// A field that other servers know; what asks for nothing is accepted.
    pub fn unsupported(&mut self, field: &str) -> Result<(), RouterError> {
        let asks = |value: &Value| match value {
            Value::Null | Value::Bool(false) => false,
            Value::String(text) => !text.is_empty(),
            Value::Array(items) => !items.is_empty(),
            Value::Object(map) => !map.is_empty(),
            Value::Bool(true) | Value::Number(_) => true,
        };
        match self.take(field) {
            Some(value) if asks(&value) => {
                let name = self.name(field);
                let message = format!("{name} is not supported; leave it out");
                Err(RouterError::invalid(name, message))
            }
            _ => Ok(()),
        }
    }

    /// What was not read.
    pub fn rest(self) -> Map<String, Value> {
        self.map
    }

    /// Everything was read, and a field that is left is unknown. The names of ignored ones.
    pub fn finish(mut self) -> Result<Vec<String>, RouterError> {
        self.map.retain(|_, value| !value.is_null());
        match self.map.keys().next() {
            None => Ok(self.ignored),
            Some(field) => {
                let name = self.name(field);
                let message = format!("unknown parameter {name}; leave it out");
                Err(RouterError::invalid(name, message))
            }
        }
    }
}

/// Equal as JSON means it: 1 is 1.0.
fn same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

/// A whole number that is not negative and fits 32 bits; 16.0 is one.
pub(crate) fn as_uint(name: &str, value: &Value) -> Result<u32, RouterError> {
    let whole = |float: f64| {
        let fits = float.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(&float);
        fits.then_some(float as u32)
    };
    let number = match value.as_u64() {
        Some(number) => u32::try_from(number).ok(),
        None => value.as_f64().and_then(whole),
    };
    number.ok_or_else(|| wrong(name, "a whole number of 0 or more", value))
}

/// A value of the wrong type or range; long values are not repeated whole.
pub(crate) fn wrong(name: &str, expected: &str, value: &Value) -> RouterError {
    let mut shown = value.to_string();
    if let Some((end, _)) = shown.char_indices().nth(60) {
        shown.truncate(end);
        shown.push('…');
    }
    RouterError::invalid(name, format!("{name} must be {expected}, not {shown}"))
}

fn malformed(message: &str) -> RouterError {
    RouterError::Invalid { param: None, message: message.to_owned() }
}
