//! The vocabulary inside a GGUF file's metadata.

use formats::gguf::Metadata;
use tokenizers::AddedToken;

use super::byte_level::{self, Loaded, Recipe, Split};
use super::folder;
use crate::error::TextError;

/// Kinds of token, by GGUF's numbers.
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
const UNUSED: u64 = 5;

/// `None` if the file has no vocabulary.
pub fn load(metadata: &[u8]) -> Result<Option<Loaded>, TextError> {
    let metadata = parse(metadata)?;
    let Some(model) = metadata.string("tokenizer.ggml.model").map_err(byte_level::error)? else {
        return Ok(None);
    };
    if model == "none" || model == "no_vocab" {
        return Ok(None);
    }
    if model != "gpt2" {
        return Err(byte_level::error(format!(
            "tokenizer.ggml.model {model:?} is not supported; gpt2 (byte-level BPE) is"
        )));
    }
    let split = split(metadata.string("tokenizer.ggml.pre").map_err(byte_level::error)?)?;
    let (vocab, added) = vocabulary(&metadata)?;
    let merges = strings(&metadata, "tokenizer.ggml.merges")?;
    let merges = merges.iter().map(|line| {
        folder::merge(line)
            .ok_or_else(|| byte_level::error(format!("merge {line:?} is not two tokens")))
    });
    let merges = merges.collect::<Result<_, _>>()?;
    let wants_bos = metadata.flag("tokenizer.ggml.add_bos_token").map_err(byte_level::error)?;
    let bos = match wants_bos.unwrap_or(split == Split::Llama3) {
        true => id(&metadata, "tokenizer.ggml.bos_token_id")?,
        false => None,
    };
    let whole_words = split == Split::Llama3;
    Recipe { vocab, merges, added, split, whole_words, bos }.build().map(Some)
}

/// The metadata at the beginning of a GGUF file.
pub fn parse(prefix: &[u8]) -> Result<Metadata, TextError> {
    formats::gguf::parse_metadata(prefix).map_err(|error| TextError::file("metadata.gguf", error))
}

/// A token id among the metadata.
pub fn id(metadata: &Metadata, key: &str) -> Result<Option<u32>, TextError> {
    let value = metadata.unsigned(key).map_err(byte_level::error)?;
    let narrow = |value| {
        u32::try_from(value)
            .map_err(|_| byte_level::error(format!("{key}: {value} is no token id")))
    };
    value.map(narrow).transpose()
}

fn strings<'a>(metadata: &'a Metadata, key: &str) -> Result<&'a [String], TextError> {
    let list = metadata.strings(key).map_err(byte_level::error)?;
    list.ok_or_else(|| byte_level::error(format!("{key} is missing")))
}

type Tokens = (Vec<(String, u32)>, Vec<AddedToken>);

fn vocabulary(metadata: &Metadata) -> Result<Tokens, TextError> {
    let tokens = strings(metadata, "tokenizer.ggml.tokens")?;
    let kinds = metadata.array("tokenizer.ggml.token_type").map_err(byte_level::error)?;
    let kinds = kinds.map(|list| {
        list.to_unsigned().ok_or_else(|| byte_level::error("a token type is no whole number"))
    });
    let kinds = kinds.transpose()?.unwrap_or_default();
    if !kinds.is_empty() && kinds.len() != tokens.len() {
        return Err(byte_level::error(format!(
            "{} token types for {} tokens",
            kinds.len(),
            tokens.len()
        )));
    }
    let mut vocab = Vec::with_capacity(tokens.len());
    let mut added = Vec::new();
    for (at, (token, id)) in tokens.iter().zip(0u32..).enumerate() {
        let kind = kinds.get(at).copied().unwrap_or_default();
        if kind == UNUSED {
            continue;
        }
        if kind == CONTROL || kind == USER_DEFINED {
            added.push(AddedToken::from(token.clone(), kind == CONTROL).normalized(false));
        }
        vocab.push((token.clone(), id));
    }
    Ok((vocab, added))
}

fn split(pre: Option<&str>) -> Result<Split, TextError> {
    match pre.unwrap_or("default") {
        "qwen2" | "qwen" | "deepseek-r1-qwen" => Ok(Split::Qwen),
        "llama-bpe" | "llama3" | "llama-v3" => Ok(Split::Llama3),
        "smollm" => Ok(Split::SmolLm),
        "gpt-2" | "default" => Ok(Split::Gpt2),
        other => Err(byte_level::error(format!(
            "tokenizer.ggml.pre {other:?} is not supported; qwen2, llama-bpe, smollm and gpt-2 are"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_pre_tokenizers_are_refused_by_name() {
        assert!(split(Some("tekken")).unwrap_err().to_string().contains("tekken"));
        assert_eq!(split(None).unwrap(), Split::Gpt2);
    }
}
