//! The full Qwen vocabulary in the forms that models bring it in.

use std::collections::HashMap;
use std::io::Read;
use std::path::PathBuf;
use std::sync::LazyLock;

use base64::Engine;
use serde_json::{Value, json};

use crate::pieces::spell;
use crate::tokenizer::tiktoken::derive_merges;
use crate::{Files, Language};

/// Those of Qwen2.5 with ids from 151643; Qwen3 adds the last four.
const ADDED: [(&str, bool); 26] = [
    ("<|endoftext|>", true),
    ("<|im_start|>", true),
    ("<|im_end|>", true),
    ("<|object_ref_start|>", true),
    ("<|object_ref_end|>", true),
    ("<|box_start|>", true),
    ("<|box_end|>", true),
    ("<|quad_start|>", true),
    ("<|quad_end|>", true),
    ("<|vision_start|>", true),
    ("<|vision_end|>", true),
    ("<|vision_pad|>", true),
    ("<|image_pad|>", true),
    ("<|video_pad|>", true),
    ("<tool_call>", false),
    ("</tool_call>", false),
    ("<|fim_prefix|>", false),
    ("<|fim_middle|>", false),
    ("<|fim_suffix|>", false),
    ("<|fim_pad|>", false),
    ("<|repo_name|>", false),
    ("<|file_sep|>", false),
    ("<tool_response>", false),
    ("</tool_response>", false),
    ("<think>", false),
    ("</think>", false),
];

pub fn golden(name: &str) -> Vec<u8> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens");
    std::fs::read(root.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// A GGUF file of metadata alone.
pub fn gguf(entries: &[(&str, Value)]) -> Vec<u8> {
    let text = |out: &mut Vec<u8>, text: &str| {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    };
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend(0u64.to_le_bytes());
    out.extend((entries.len() as u64).to_le_bytes());
    for (key, value) in entries {
        text(&mut out, key);
        match value {
            Value::String(value) => {
                out.extend(8u32.to_le_bytes());
                text(&mut out, value);
            }
            Value::Bool(value) => {
                out.extend(7u32.to_le_bytes());
                out.push(u8::from(*value));
            }
            Value::Number(value) => {
                out.extend(4u32.to_le_bytes());
                out.extend((value.as_u64().unwrap() as u32).to_le_bytes());
            }
            Value::Array(items) => {
                out.extend(9u32.to_le_bytes());
                out.extend(if items[0].is_string() { 8u32 } else { 5 }.to_le_bytes());
                out.extend((items.len() as u64).to_le_bytes());
                for item in items {
                    match item.as_str() {
                        Some(item) => text(&mut out, item),
                        None => out.extend((item.as_i64().unwrap() as i32).to_le_bytes()),
                    }
                }
            }
            other => panic!("no GGUF type for {other}"),
        }
    }
    out
}

/// Token bytes by rank.
static RANKS: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let packed = golden("tokenizer/qwen_ranks.gz");
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(&packed[..]).read_to_end(&mut bytes).unwrap();
    let mut tokens = Vec::new();
    let mut rest = &bytes[..];
    while let Some((&len, tail)) = rest.split_first() {
        let (token, tail) = tail.split_at(len as usize);
        tokens.push(token.to_vec());
        rest = tail;
    }
    assert_eq!(tokens.len(), 151_643);
    tokens
});

/// The original Qwen: ranks, no template.
pub static QWEN1: LazyLock<Language> = LazyLock::new(|| Language::load(&qwen1()).unwrap());

pub fn qwen1() -> Files {
    let line = |(rank, token): (usize, &Vec<u8>)| {
        format!("{} {rank}\n", base64::engine::general_purpose::STANDARD.encode(token))
    };
    let ranks: String = RANKS.iter().enumerate().map(line).collect();
    let config = json!({"vocab_size": 151_936}).to_string();
    Files::from([
        ("qwen.tiktoken".to_owned(), ranks.into_bytes()),
        ("config.json".to_owned(), config.into_bytes()),
    ])
}

/// As vocab.json and merges.txt, with the first `added` of the added tokens and a template.
pub fn qwen2(added: usize, template: &str) -> Files {
    let vocab: HashMap<String, usize> =
        RANKS.iter().enumerate().map(|(rank, token)| (spell(token), rank)).collect();
    let merges = derive_merges(&RANKS);
    let merges: String = merges.iter().map(|(left, right)| format!("{left} {right}\n")).collect();
    let token = |(at, (content, special)): (usize, &(&str, bool))| {
        let fields = json!({"content": content, "special": special, "normalized": false});
        ((RANKS.len() + at).to_string(), fields)
    };
    let added: serde_json::Map<_, _> = ADDED[..added].iter().enumerate().map(token).collect();
    let config = json!({"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added});
    Files::from([
        ("vocab.json".to_owned(), serde_json::to_vec(&vocab).unwrap()),
        ("merges.txt".to_owned(), format!("#version: 0.2\n{merges}").into_bytes()),
        ("tokenizer_config.json".to_owned(), config.to_string().into_bytes()),
        ("chat_template.jinja".to_owned(), golden(&format!("chat/templates/{template}"))),
    ])
}

pub static QWEN25: LazyLock<Language> =
    LazyLock::new(|| Language::load(&qwen2(22, "qwen2.5-7b-instruct.jinja")).unwrap());
pub static QWEN3: LazyLock<Language> =
    LazyLock::new(|| Language::load(&qwen2(26, "qwen3-0.6b.jinja")).unwrap());

/// The vocabulary with the ids turned round, so that they say nothing of ranks, and without every
/// tenth merge, so that some tokens cannot be reached by merging; words cut as `pre` does it.
pub fn turned_round(pre: &str) -> Files {
    let merges = derive_merges(&RANKS);
    let merges = merges.iter().enumerate().filter(|(at, _)| at % 10 != 0);
    let metadata = gguf(&[
        ("tokenizer.ggml.model", json!("gpt2")),
        ("tokenizer.ggml.pre", json!(pre)),
        ("tokenizer.ggml.tokens", RANKS.iter().rev().map(|token| json!(spell(token))).collect()),
        ("tokenizer.ggml.merges", merges.map(|(_, (l, r))| json!(format!("{l} {r}"))).collect()),
        ("tokenizer.ggml.add_bos_token", json!(false)),
    ]);
    Files::from([("metadata.gguf".to_owned(), metadata)])
}

/// The vocabulary of Qwen2.5 as converters write it: names between bars are control tokens.
pub static QWEN25_GGUF: LazyLock<Language> = LazyLock::new(|| {
    let added = ADDED[..22].iter().map(|(name, _)| (*name).to_owned());
    let kinds = ADDED[..22].iter().map(|(name, _)| if name.starts_with("<|") { 3 } else { 4 });
    let kinds = RANKS.iter().map(|_| 1).chain(kinds).map(|kind: u32| json!(kind));
    let tokens = RANKS.iter().map(|token| spell(token)).chain(added).map(Value::String);
    let merges = derive_merges(&RANKS);
    let merges = merges.iter().map(|(left, right)| json!(format!("{left} {right}")));
    let metadata = gguf(&[
        ("tokenizer.ggml.model", json!("gpt2")),
        ("tokenizer.ggml.pre", json!("qwen2")),
        ("tokenizer.ggml.tokens", tokens.collect()),
        ("tokenizer.ggml.token_type", kinds.collect()),
        ("tokenizer.ggml.merges", merges.collect()),
    ]);
    Language::load(&Files::from([("metadata.gguf".to_owned(), metadata)])).unwrap()
});
