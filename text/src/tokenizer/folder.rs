//! Tokenizers of Hugging Face folders: tokenizer.json, or vocab.json with merges.txt.

use std::collections::{BTreeMap, HashMap};

use serde::Deserialize;
use tokenizers::{AddedToken, Tokenizer};

use super::byte_level::{self, Recipe, Split};
use crate::error::TextError;
use crate::language::Files;

/// The whole tokenizer in one file.
pub fn from_json(json: &[u8]) -> Result<Tokenizer, TextError> {
    Tokenizer::from_bytes(json).map_err(|error| TextError::file("tokenizer.json", error))
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Config {
    tokenizer_class: Option<String>,
    add_bos_token: Option<bool>,
    bos_token: Option<Name>,
    added_tokens_decoder: BTreeMap<String, Added>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Name {
    Plain(String),
    Token { content: String },
}

#[derive(Deserialize)]
struct Added {
    content: String,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    special: bool,
}

/// The older pair of files; tokenizer_config.json names the class and the added tokens.
pub fn from_vocab_and_merges(
    vocab: &[u8],
    merges: &[u8],
    files: &Files,
) -> Result<Tokenizer, TextError> {
    let vocab: HashMap<String, u32> =
        serde_json::from_slice(vocab).map_err(|error| TextError::file("vocab.json", error))?;
    let mut vocab: Vec<(String, u32)> = vocab.into_iter().collect();
    let config: Config = match files.get("tokenizer_config.json") {
        Some(json) => serde_json::from_slice(json)
            .map_err(|error| TextError::file("tokenizer_config.json", error))?,
        None => Config::default(),
    };
    let split = split(config.tokenizer_class.as_deref().unwrap_or("Qwen2Tokenizer"))?;
    let mut added = Vec::new();
    for (id, token) in config.added_tokens_decoder {
        let id = id.parse().map_err(|_| {
            TextError::file("tokenizer_config.json", format!("{id:?} is no token id"))
        })?;
        vocab.push((token.content.clone(), id));
        added.push(
            AddedToken::from(token.content, token.special)
                .normalized(false)
                .lstrip(token.lstrip)
                .rstrip(token.rstrip)
                .single_word(token.single_word),
        );
    }
    let bos = config.bos_token.filter(|_| config.add_bos_token == Some(true)).map(|name| {
        let (Name::Plain(content) | Name::Token { content }) = name;
        vocab.iter().find(|(token, _)| *token == content).map(|(_, id)| *id).ok_or_else(|| {
            let reason = format!("bos_token {content:?} is not in the vocabulary");
            TextError::file("tokenizer_config.json", reason)
        })
    });
    let bos = bos.transpose()?;
    let merges = parse_merges(merges)?;
    Recipe { vocab, merges, added, split, whole_words: false, bos }.build()
}

fn split(class: &str) -> Result<Split, TextError> {
    match class {
        "Qwen2Tokenizer" | "Qwen2TokenizerFast" => Ok(Split::Qwen),
        "GPT2Tokenizer" | "GPT2TokenizerFast" => Ok(Split::Gpt2),
        other => Err(byte_level::error(format!(
            "class {other} needs a tokenizer.json; vocab.json and merges.txt do for Qwen2 and GPT2"
        ))),
    }
}

fn parse_merges(merges: &[u8]) -> Result<Vec<(String, String)>, TextError> {
    let text = std::str::from_utf8(merges).map_err(|e| TextError::file("merges.txt", e))?;
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with("#version"));
    lines.map(|line| merge(line).ok_or_else(|| broken_merge(line))).collect()
}

/// The two halves of one line.
pub fn merge(line: &str) -> Option<(String, String)> {
    let (left, right) = line.split_once(' ')?;
    Some((left.to_owned(), right.to_owned()))
}

fn broken_merge(line: &str) -> TextError {
    TextError::file("merges.txt", format!("{line:?} is not two tokens"))
}
