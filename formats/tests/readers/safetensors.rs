//! safetensors headers: what is read, and what is refused.

use crate::common::safetensors as file;
use formats::{
    FormatError,
    safetensors::{Index, parse},
};

const TWO: &str = concat!(
    r#"{"__metadata__":{"format":"pt"},"#,
    r#""b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},"#,
    r#""a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}  "#
);

fn refused(header: &str, data: usize, expected: &str) {
    let error = parse(&file(header, &vec![0; data])).unwrap_err().to_string();
    assert!(error.contains(expected), "{error:?} does not say {expected:?}");
}

#[test]
fn tensors_are_read_in_order_of_place() {
    let tensors = parse(&file(TWO, &[0; 16])).unwrap();
    let [a, b] = &tensors[..] else { panic!("{tensors:?}") };
    let start = 8 + TWO.len() as u64;
    assert_eq!((a.name.as_str(), a.dtype.name, a.offset, a.bytes), ("a", "F32", start, 4));
    assert_eq!(
        (b.dtype.name, &b.shape[..], b.offset, b.bytes),
        ("BF16", &[2, 3][..], start + 4, 12)
    );
    assert!(parse(&file("{}", &[])).unwrap().is_empty());
}

#[test]
fn every_truncation_is_noticed() {
    let bytes = file(TWO, &[0; 16]);
    for len in 0..bytes.len() {
        let error = parse(&bytes[..len]).unwrap_err();
        assert!(matches!(error, FormatError::Truncated(_)), "{len}: {error}");
    }
}

#[test]
fn contradictions_are_refused() {
    let one = |entry: &str| format!(r#"{{"a":{entry}}}"#);
    let entry = r#"{"dtype":"U8","shape":[4],"data_offsets":[0,4]}"#;
    refused(&format!(r#"{{"a":{entry},"a":{entry}}}"#), 4, "a appears twice");
    refused(&format!(r#"{{"a":{entry},"b":{entry}}}"#), 4, "overlap");
    refused(&one(entry), 5, "1 unused bytes after");
    refused(
        &one(r#"{"dtype":"U8","shape":[4],"data_offsets":[2,6]}"#),
        6,
        "2 unused bytes before a",
    );
    refused(
        &one(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,4]}"#),
        4,
        "cannot lie at bytes 0 to 4",
    );
    refused(&one(r#"{"dtype":"U8","shape":[4],"data_offsets":[4,0]}"#), 4, "cannot lie");
    refused(&one(r#"{"dtype":"Q9","shape":[4],"data_offsets":[0,4]}"#), 4, "type Q9");
    refused(&one(r#"{"dtype":"U8","shape":[-4],"data_offsets":[0,4]}"#), 4, "header");
    refused(&one(r#"{"dtype":"U8","shape":[4]}"#), 4, "data_offsets");
    refused(&one(r#"{"dtype":"U8","shape":[4],"data_offsets":[0,4],"x":1}"#), 4, "unknown field");
    refused(
        &one(r#"{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,4],"data_offsets":[0,4]}"#),
        4,
        "at most 8",
    );
    let huge = u64::MAX;
    refused(
        &one(&format!(r#"{{"dtype":"U8","shape":[{huge},{huge}],"data_offsets":[0,4]}}"#)),
        4,
        "cannot lie",
    );
    refused(
        &one(&format!(r#"{{"dtype":"U8","shape":[{huge}],"data_offsets":[0,{huge}]}}"#)),
        4,
        "the file has",
    );
    refused("[]", 0, "does not begin with {");
    refused(&"[".repeat(5000), 0, "does not begin with {");
    refused(&format!(r#"{{"__metadata__":{}"#, "[".repeat(5000)), 0, "EOF while parsing");
    assert!(parse(&u64::MAX.to_le_bytes()).is_err());
}

#[test]
fn an_index_names_plain_files() {
    let index = |file: &str| {
        Index::parse(format!(r#"{{"metadata":{{}},"weight_map":{{"a":"{file}"}}}}"#).as_bytes())
    };
    assert_eq!(index("m-1.safetensors").unwrap().files().len(), 1);
    for bad in ["../m.safetensors", "/etc/m.safetensors", "a\\\\m.safetensors", "m.bin"] {
        assert!(index(bad).unwrap_err().to_string().contains("plain"), "{bad}");
    }
    let twice = br#"{"weight_map":{"a":"1.safetensors","a":"2.safetensors"}}"#;
    assert!(Index::parse(twice).unwrap_err().to_string().contains("twice"));
    assert!(Index::parse(br#"{"weight_map":{}}"#).is_err());
}
