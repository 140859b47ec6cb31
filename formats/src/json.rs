//! JSON of model files, refused with a reason that names what is wrong in the file.

use serde::de::DeserializeOwned;

/// Reads a whole file.
///
/// # Errors
/// The encoding, or where and why the text is no JSON of this kind. The caller knows the file.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    check_encoding(bytes)?;
    serde_json::from_slice(bytes).map_err(|error| match python_number(bytes, &error) {
        Some(word) => format!(
            "{word} in line {} is not JSON, though Python writes it; give a number or null",
            error.line()
        ),
        None => error.to_string(),
    })
}

/// Refuses text that begins with a byte order mark.
///
/// # Errors
/// The mark, and how to be rid of it.
pub fn check_encoding(bytes: &[u8]) -> Result<(), String> {
    let mark = match bytes {
        [0xef, 0xbb, 0xbf, ..] => "UTF-8",
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => "UTF-16",
        _ => return Ok(()),
    };
    Err(format!("begins with a byte order mark of {mark}; save it as UTF-8 without one"))
}

/// The word that Python writes for a float that JSON lacks, where that is the error.
fn python_number(bytes: &[u8], error: &serde_json::Error) -> Option<&'static str> {
    if !error.is_syntax() {
        return None;
    }
    let line = bytes.split(|&byte| byte == b'\n').nth(error.line().checked_sub(1)?)?;
    // The column is that of the last byte read, at or after the word's first.
    let from = error.column().saturating_sub(2);
    let rest = &line[from.min(line.len())..];
    let words = ["-Infinity", "Infinity", "NaN"];
    words.into_iter().find(|word| {
        rest.starts_with(word.as_bytes()) || {
            rest.get(1..).is_some_and(|rest| rest.starts_with(word.as_bytes()))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn what_is_no_json_is_told_by_what_is_wrong() {
        for (bytes, says) in [
            (&b"\xef\xbb\xbf{}"[..], "byte order mark of UTF-8"),
            (b"\xff\xfe{\0", "byte order mark of UTF-16"),
            (b"{\n \"a\": NaN}", "NaN in line 2"),
            (b"[1,Infinity]", "Infinity in line 1"),
            (b"[-Infinity]", "-Infinity in line 1"),
            (b"NaN", "NaN in line 1"),
            (b"{", "EOF"),
            (b"[nope]", "column"),
        ] {
            let error = parse::<Value>(bytes).unwrap_err();
            assert!(error.contains(says), "{error:?} does not say {says:?}");
        }
        assert_eq!(parse::<Value>(b"{}").unwrap(), serde_json::json!({}));
    }
}
