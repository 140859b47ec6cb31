//! The spelling of Python's `json.dumps`.

use std::fmt::Write;

use serde_json::Value;

use super::float_text;

/// What `tojson` can be asked for.
#[derive(Debug)]
pub struct JsonStyle {
    pub ensure_ascii: bool,
    pub indent: Option<usize>,
    pub item_separator: String,
    pub key_separator: String,
    pub sort_keys: bool,
}

impl Default for JsonStyle {
    /// Hugging Face's: one line, characters as they are.
    fn default() -> Self {
        Self {
            ensure_ascii: false,
            indent: None,
            item_separator: ", ".to_owned(),
            key_separator: ": ".to_owned(),
            sort_keys: false,
        }
    }
}

/// `value` as `json.dumps` writes it.
pub fn dumps(value: &Value, style: &JsonStyle) -> String {
    let mut out = String::new();
    write_value(&mut out, value, style, 0);
    out
}

fn write_value(out: &mut String, value: &Value, style: &JsonStyle, depth: usize) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(flag) => out.push_str(if *flag { "true" } else { "false" }),
        Value::Number(number) => out.push_str(&number_text(number)),
        Value::String(text) => write_string(out, text, style.ensure_ascii),
        Value::Array(items) => {
            out.push('[');
            for (at, item) in items.iter().enumerate() {
                separate(out, style, at == 0, depth + 1);
                write_value(out, item, style, depth + 1);
            }
            close(out, style, items.is_empty(), depth);
            out.push(']');
        }
        Value::Object(map) => {
            out.push('{');
            let mut entries: Vec<_> = map.iter().collect();
            if style.sort_keys {
                entries.sort_by(|a, b| a.0.cmp(b.0));
            }
            for (at, (key, item)) in entries.into_iter().enumerate() {
                separate(out, style, at == 0, depth + 1);
                write_string(out, key, style.ensure_ascii);
                out.push_str(&style.key_separator);
                write_value(out, item, style, depth + 1);
            }
            close(out, style, map.is_empty(), depth);
            out.push('}');
        }
    }
}

fn separate(out: &mut String, style: &JsonStyle, first: bool, depth: usize) {
    if !first {
        out.push_str(&style.item_separator);
    }
    new_line(out, style, depth);
}

fn close(out: &mut String, style: &JsonStyle, empty: bool, depth: usize) {
    if !empty {
        new_line(out, style, depth);
    }
}

fn new_line(out: &mut String, style: &JsonStyle, depth: usize) {
    if let Some(width) = style.indent {
        out.push('\n');
        out.extend(std::iter::repeat_n(' ', width * depth));
    }
}

fn write_string(out: &mut String, text: &str, ensure_ascii: bool) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' || (ensure_ascii && !c.is_ascii()) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    // Writing to a string cannot fail.
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

fn number_text(number: &serde_json::Number) -> String {
    match number.as_f64().filter(|_| number.is_f64()) {
        Some(float) => float_text(float),
        None => number.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_reads_as_python_writes_it() {
        let value: Value = serde_json::from_str(
            r#"{"b": [1, 2.0, 1e20, 1.5e-7, -0.0001, 1e15, 0.00001, true, null],
                "a": {}, "é<": "\u0001\n/'漢"}"#,
        )
        .unwrap();
        assert_eq!(
            dumps(&value, &JsonStyle::default()),
            "{\"b\": [1, 2.0, 1e+20, 1.5e-07, -0.0001, 1000000000000000.0, \
             1e-05, true, null], \"a\": {}, \
             \"é<\": \"\\u0001\\n/'漢\"}"
        );
        let style = JsonStyle {
            ensure_ascii: true,
            indent: Some(2),
            item_separator: ",".into(),
            sort_keys: true,
            ..JsonStyle::default()
        };
        let value: Value = serde_json::from_str(r#"{"b": [1, {}], "a": "é😀"}"#).unwrap();
        assert_eq!(
            dumps(&value, &style),
            "{\n  \"a\": \"\\u00e9\\ud83d\\ude00\",\n  \"b\": [\n    1,\n    {}\n  ]\n}"
        );
    }
}
