//! Tokenizers of Hugging Face folders: tokenizer.json, or vocab.json with merges.txt.

use std::collections::{BTreeMap, HashMap};

use serde::Deserialize;
use serde_json::{Map, Value};
use tokenizers::{AddedToken, Tokenizer};

use super::byte_level::{self, Loaded, Recipe, Split};
use crate::error::TextError;
use crate::language::{Files, json};

const CONFIG: &str = "tokenizer_config.json";
const SPECIALS: &str = "special_tokens_map.json";
const ADDED: &str = "added_tokens.json";

/// The whole tokenizer in one file.
pub fn from_json(json: &[u8]) -> Result<Loaded, TextError> {
    let tokenizer = Tokenizer::from_bytes(json);
    let tokenizer = tokenizer.map_err(|error| TextError::file("tokenizer.json", error))?;
    Ok(Loaded { tokenizer, merges: merges_of(json) })
}

/// The merges of a tokenizer.json, each a pair of tokens, or both in one text in older files;
/// `None` for other models than BPE.
fn merges_of(json: &[u8]) -> Option<Vec<(String, String)>> {
    #[derive(Deserialize)]
    struct File {
        model: Model,
    }
    #[derive(Deserialize)]
    struct Model {
        merges: Vec<Merge>,
    }
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Merge {
        Pair(String, String),
        Line(String),
    }
    let file: File = serde_json::from_slice(json).ok()?;
    let lines = file.model.merges.into_iter();
    let merges = lines.filter(|m| !matches!(m, Merge::Line(line) if line.starts_with("#version")));
    let pair = |merge_of: Merge| match merge_of {
        Merge::Pair(left, right) => Some((left, right)),
        Merge::Line(line) => merge(&line),
    };
    merges.map(pair).collect()
}

/// The older pair of files. Added tokens are in tokenizer_config.json, or before that in
/// added_tokens.json with the special ones named in special_tokens_map.json.
pub fn from_vocab_and_merges(
    vocab: &[u8],
    merges: &[u8],
    files: &Files,
) -> Result<Loaded, TextError> {
    let vocab: HashMap<String, u32> =
        formats::json::parse(vocab).map_err(|reason| TextError::file("vocab.json", reason))?;
    let config: Map<String, Value> = json(files, CONFIG)?.unwrap_or_default();
    let class = config.get("tokenizer_class").and_then(Value::as_str);
    let split = split(class.unwrap_or("Qwen2Tokenizer"))?;
    let added = added_tokens(&vocab, &config, files)?;
    let mut vocab: Vec<(String, u32)> = vocab.into_iter().collect();
    vocab.extend(added.iter().map(|(id, token)| (token.content.clone(), *id)));
    let wants_bos = config.get("add_bos_token") == Some(&Value::Bool(true));
    let bos = config.get("bos_token").and_then(content).filter(|_| wants_bos).map(|content| {
        vocab.iter().find(|(token, _)| *token == content).map(|(_, id)| *id).ok_or_else(|| {
            let reason = format!("bos_token {content:?} is not in the vocabulary");
            TextError::file(CONFIG, reason)
        })
    });
    let bos = bos.transpose()?;
    let merges = parse_merges(merges)?;
    let added = added.into_values().collect();
    Recipe { vocab, merges, added, split, whole_words: false, bos }.build()
}

/// Added tokens by id. A file that is older never changes what a newer one says.
fn added_tokens(
    vocab: &HashMap<String, u32>,
    config: &Map<String, Value>,
    files: &Files,
) -> Result<BTreeMap<u32, AddedToken>, TextError> {
    let mut added = BTreeMap::new();
    let decoder = config.get("added_tokens_decoder").and_then(Value::as_object);
    for (id, fields) in decoder.into_iter().flatten() {
        let broken = |what: &str| TextError::file(CONFIG, format!("added token {id:?} {what}"));
        let number = id.parse().map_err(|_| broken("is no token id"))?;
        let special = fields.get("special").and_then(Value::as_bool).unwrap_or(false);
        let token = added_token(fields, special).ok_or_else(|| broken("has no content"))?;
        added.insert(number, token);
    }
    let named: Map<String, Value> = json(files, SPECIALS)?.unwrap_or_default();
    let specials: Vec<_> = special_tokens(&named).chain(special_tokens(config)).collect();
    let older: BTreeMap<String, u32> = json(files, ADDED)?.unwrap_or_default();
    let is_known = |added: &BTreeMap<u32, AddedToken>, content: &str| {
        added.values().any(|token| token.content == content)
    };
    for (content, id) in older {
        if is_known(&added, &content) {
            continue;
        }
        // Names between bars control the model whether or not a file says so: a user's text must
        // not become one.
        let control = content.starts_with("<|") && content.ends_with("|>");
        let special = specials.iter().find(|token| token.content == content).cloned();
        let token = special.unwrap_or(AddedToken::from(content, control).normalized(false));
        added.entry(id).or_insert(token);
    }
    // Special tokens that are ordinary entries of the vocabulary, and those without an id, which
    // follow all others.
    for token in specials {
        if !is_known(&added, &token.content) {
            let last = vocab.values().chain(added.keys()).max();
            let next = last.map_or(0, |last| last.saturating_add(1));
            added.insert(vocab.get(&token.content).copied().unwrap_or(next), token);
        }
    }
    Ok(added)
}

/// The special tokens that a file names, in the order in which those without an id get one.
fn special_tokens(fields: &Map<String, Value>) -> impl Iterator<Item = AddedToken> {
    let first =
        ["bos", "eos", "unk", "sep", "pad", "cls", "mask"].map(|name| format!("{name}_token"));
    let single = first.into_iter().filter_map(|name| fields.get(&name));
    let more = fields.get("additional_special_tokens").and_then(Value::as_array);
    single.chain(more.into_iter().flatten()).filter_map(|token| added_token(token, true))
}

/// A token as its text, or with its settings around it; none without text.
fn added_token(token: &Value, special: bool) -> Option<AddedToken> {
    let content = content(token)?;
    let flag = |name: &str| token.get(name).and_then(Value::as_bool).unwrap_or(false);
    let token = AddedToken::from(content, special).normalized(false);
    Some(token.lstrip(flag("lstrip")).rstrip(flag("rstrip")).single_word(flag("single_word")))
}

/// A token's text.
fn content(token: &Value) -> Option<String> {
    let text = token.as_str().or_else(|| token.get("content")?.as_str());
    text.filter(|text| !text.is_empty()).map(str::to_owned)
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
