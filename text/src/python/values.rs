//! `str` and `repr` of Python for the values of a template.

use std::fmt::Write;

use minijinja::Value;
use minijinja::value::ValueKind;

use super::float_text;
use crate::template::Arguments;

/// Deeper values end in dots instead of ending the stack.
const DEPTH_MAX: usize = 200;

/// `str(value)`.
pub fn text(value: &Value) -> String {
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::String => value.as_str().unwrap_or_default().to_owned(),
        _ => {
            let mut out = String::new();
            repr(&mut out, value, 0);
            out
        }
    }
}

fn repr(out: &mut String, value: &Value, depth: usize) {
    if depth > DEPTH_MAX {
        out.push_str("...");
        return;
    }
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => match f64::try_from(value.clone()) {
            Ok(float) if !value.is_integer() => out.push_str(&float_text(float)),
            _ => out.push_str(&value.to_string()),
        },
        ValueKind::String => quote(out, value.as_str().unwrap_or_default()),
        ValueKind::Map if value.downcast_object_ref::<Arguments>().is_none() => {
            map(out, value, depth);
        }
        ValueKind::Seq | ValueKind::Iterable => sequence(out, value, depth),
        _ => out.push_str(&value.to_string()),
    }
}

fn sequence(out: &mut String, value: &Value, depth: usize) {
    let (open, close) = if value.is_tuple() { ('(', ')') } else { ('[', ']') };
    out.push(open);
    let mut count = 0;
    for item in value.try_iter().into_iter().flatten() {
        if count > 0 {
            out.push_str(", ");
        }
        repr(out, &item, depth + 1);
        count += 1;
    }
    if count == 1 && value.is_tuple() {
        out.push(',');
    }
    out.push(close);
}

fn map(out: &mut String, value: &Value, depth: usize) {
    out.push('{');
    for (at, key) in value.try_iter().into_iter().flatten().enumerate() {
        if at > 0 {
            out.push_str(", ");
        }
        repr(out, &key, depth + 1);
        out.push_str(": ");
        repr(out, &value.get_item(&key).unwrap_or_default(), depth + 1);
    }
    out.push('}');
}

/// `repr` of a string: single quotes unless only those are in it.
fn quote(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        // Writing to a string cannot fail.
        let _ = match c {
            '\\' => out.write_str("\\\\"),
            '\n' => out.write_str("\\n"),
            '\r' => out.write_str("\\r"),
            '\t' => out.write_str("\\t"),
            c if c == quote => write!(out, "\\{c}"),
            c if c < ' ' || ('\u{7f}'..='\u{a0}').contains(&c) || c == '\u{ad}' => {
                write!(out, "\\x{:02x}", c as u32)
            }
            c if c > '\u{ff}' && !is_printable(c) => match c as u32 {
                code @ ..0x1_0000 => write!(out, "\\u{code:04x}"),
                code => write!(out, "\\U{code:08x}"),
            },
            c => out.write_char(c),
        };
    }
    out.push(quote);
}

/// What `str.isprintable` says of a character above U+00FF, as far as text has them: separators,
/// format characters and private use are not.
fn is_printable(c: char) -> bool {
    !(c.is_whitespace()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}')
        || matches!(c, '\u{e000}'..='\u{f8ff}' | '\u{feff}' | '\u{f_0000}'..))
}

#[cfg(test)]
mod tests {
    use super::*;
    use minijinja::value::{Serde, Tuple};

    #[test]
    fn values_read_as_python_prints_them() {
        let json = serde_json::json!({"a": [true, null, 1, 2.5, 1e16, "x'y", "\n\u{7}é\u{200b}"]});
        assert_eq!(
            text(&Value::from(Serde(json))),
            "{'a': [True, None, 1, 2.5, 1e+16, \"x'y\", '\\n\\x07é\\u200b']}"
        );
        assert_eq!(text(&Value::from(Tuple::from([Value::from(1)]))), "(1,)");
        assert_eq!(text(&Value::from("as 'it' is")), "as 'it' is");
        assert_eq!(text(&Value::UNDEFINED), "");
        let mut deep = Value::from(0);
        for _ in 0..2000 {
            deep = Value::from(vec![deep]);
        }
        assert!(text(&deep).contains("..."));
        // Dropping a chain this long recurses inside the library.
        std::mem::forget(deep);
    }
}
