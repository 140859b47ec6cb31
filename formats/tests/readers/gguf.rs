//! GGUF headers: what is read, and what is refused.

use crate::common::{GgufFile, gguf::string};
use formats::{
    FormatError,
    gguf::{self, Array, Value},
};

fn array(kind: u32, count: u64, bytes: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &count.to_le_bytes(), bytes].concat()
}

fn refused(file: &GgufFile, expected: &str) {
    let error = gguf::parse(&file.bytes()).unwrap_err().to_string();
    assert!(error.contains(expected), "{error:?} does not say {expected:?}");
}

#[test]
fn every_type_of_value_is_read() {
    let mut file = GgufFile::new();
    file.entry("u8", 0, &[200])
        .entry("i8", 1, &(-3i8).to_le_bytes())
        .entry("u16", 2, &60_000u16.to_le_bytes())
        .entry("i16", 3, &(-300i16).to_le_bytes())
        .u32("u32", 7)
        .entry("i32", 5, &(-7i32).to_le_bytes())
        .f32("f32", 0.5)
        .entry("bool", 7, &[1])
        .text("text", "grüße")
        .entry("u64", 10, &u64::MAX.to_le_bytes())
        .entry("i64", 11, &i64::MIN.to_le_bytes())
        .entry("f64", 12, &1e300f64.to_le_bytes())
        .strings("words", &["a", "", "b c"])
        .entry("floats", 9, &array(6, 2, &[0, 0, 128, 63, 0, 0, 0, 64]))
        .entry("flags", 9, &array(7, 2, &[1, 0]))
        .entry("nested", 9, &array(9, 2, &[array(0, 1, &[9]), array(5, 0, &[])].concat()));
    let read = gguf::parse(&file.bytes()).unwrap().metadata;
    let expected = [
        ("u8", Value::Unsigned(200)),
        ("i8", Value::Signed(-3)),
        ("u16", Value::Unsigned(60_000)),
        ("i16", Value::Signed(-300)),
        ("u32", Value::Unsigned(7)),
        ("i32", Value::Signed(-7)),
        ("f32", Value::Float(0.5)),
        ("bool", Value::Bool(true)),
        ("text", Value::String("grüße".into())),
        ("u64", Value::Unsigned(u64::MAX)),
        ("i64", Value::Signed(i64::MIN)),
        ("f64", Value::Float(1e300)),
        ("words", Value::Array(Array::String(vec!["a".into(), String::new(), "b c".into()]))),
        ("floats", Value::Array(Array::F32(vec![1.0, 2.0]))),
        ("flags", Value::Array(Array::Bool(vec![true, false]))),
        ("nested", Value::Array(Array::Array(vec![Array::U8(vec![9]), Array::I32(vec![])]))),
    ];
    for (key, value) in &expected {
        assert_eq!(read.get(key), Some(value), "{key}");
    }
    assert_eq!(read.keys().count(), expected.len());
    assert_eq!(
        read.unsigned("i8").unwrap_err().to_string(),
        "malformed: metadata i8 is no whole number"
    );
    assert_eq!(read.unsigned("missing").unwrap(), None);
    assert_eq!(read.number("u32").unwrap(), Some(7.0));
    assert_eq!(read.strings("words").unwrap().map(<[_]>::len), Some(3));
}

#[test]
fn tensors_lie_where_the_file_says() {
    for (version, alignment) in [(2, 32), (3, 32), (3, 64)] {
        let mut file = GgufFile::new();
        (file.version, file.alignment) = (version, alignment);
        if alignment != 32 {
            file.u32("general.alignment", alignment as u32);
        }
        file.tensor("a", &[2], 0, &[1; 8]).tensor("b", &[32, 3], 2, &[2; 54]);
        let bytes = file.bytes();
        let header = gguf::parse(&bytes).unwrap();
        let [a, b] = &header.tensors[..] else { panic!("{:?}", header.tensors) };
        assert_eq!(
            (a.name.as_str(), a.dtype.name, &a.shape[..], a.bytes),
            ("a", "F32", &[2][..], 8)
        );
        assert_eq!((b.dtype.name, &b.shape[..], b.bytes), ("Q4_0", &[3, 32][..], 54));
        assert_eq!(&bytes[a.offset as usize..][..8], [1; 8]);
        assert_eq!(&bytes[b.offset as usize..][..54], [2; 54]);
        let prefix = &bytes[..header.metadata_end as usize];
        assert_eq!(gguf::parse_metadata(prefix).unwrap(), header.metadata);
        assert!(matches!(gguf::parse(prefix), Err(FormatError::Truncated(_))));
    }
}

#[test]
fn every_truncation_is_noticed() {
    let mut file = GgufFile::new();
    file.text("general.architecture", "qwen2").strings("tokens", &["a", "b"]);
    file.tensor("a", &[2], 0, &[1; 8]).tensor("b", &[32], 8, &[2; 34]);
    let bytes = file.bytes();
    gguf::parse(&bytes).unwrap();
    for len in 0..bytes.len() {
        let error = gguf::parse(&bytes[..len]).unwrap_err();
        assert!(matches!(error, FormatError::Truncated(_)), "{len}: {error}");
    }
}

#[test]
fn contradictions_are_refused() {
    let data = [0; 8];
    refused(GgufFile::new().tensor("a", &[2], 0, &data).tensor("a", &[2], 0, &data), "named a");
    refused(GgufFile::new().tensor("a", &[2], 0, &data).info("b", &[1], 0, 0), "overlap");
    refused(
        GgufFile::new().tensor("a", &[2], 0, &data).info("b", &[2], 0, 1 << 40),
        "the file has",
    );
    refused(GgufFile::new().info("a", &[2], 0, u64::MAX - 31), "offset");
    refused(GgufFile::new().info("a", &[2], 0, 3), "no multiple of 32");
    refused(GgufFile::new().info("a", &[u64::MAX, 2], 0, 0), "impossible for type F32");
    refused(GgufFile::new().info("a", &[33], 2, 0), "impossible for type Q4_0");
    refused(GgufFile::new().info("a", &[], 0, 0), "0 dimensions");
    refused(GgufFile::new().info("a", &[1, 1, 1, 1, 1], 0, 0), "5 dimensions");
    refused(GgufFile::new().info("a", &[1], 4, 0), "type number 4");
    refused(GgufFile::new().u32("k", 1).u32("k", 1), "k appears twice");
    refused(GgufFile::new().entry("k", 13, &[0; 8]), "type number 13");
    refused(GgufFile::new().entry("k", 7, &[2]), "a boolean of 2");
    refused(GgufFile::new().entry("k", 8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff]), "not UTF-8");
    refused(GgufFile::new().entry("k", 8, &u64::MAX.to_le_bytes()), "more than the");
    refused(GgufFile::new().entry("k", 9, &array(8, 1 << 60, &[])), "more than the");
    refused(GgufFile::new().u32("general.alignment", 24), "an alignment of 24");
    refused(GgufFile::new().u32("general.alignment", 0), "an alignment of 0");
    let mut nested = array(0, 0, &[]);
    for _ in 0..8 {
        nested = array(9, 1, &nested);
    }
    refused(GgufFile::new().entry("k", 9, &nested), "nests arrays beyond 4");
}

#[test]
fn counts_beyond_the_file_are_refused_before_they_are_believed() {
    let mut file = GgufFile::new();
    file.tensor_count = Some(1 << 60);
    refused(&file, "the number of tensors is 1152921504606846976");
    let mut file = GgufFile::new();
    file.entry_count = Some(u64::MAX);
    refused(&file, "the number of metadata entries");
}

#[test]
fn versions_are_told_apart() {
    let mut file = GgufFile::new();
    file.version = 1;
    refused(&file, "GGUF version 1; versions 2 and 3 are read");
    file.version = 3u32.swap_bytes();
    refused(&file, "big-endian");
    assert!(gguf::parse(b"GGML\0\0\0\0").unwrap_err().to_string().contains("magic"));
    assert!(gguf::parse(&string("")).is_err());
}
