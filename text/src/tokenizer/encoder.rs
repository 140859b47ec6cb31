//! Text to ids for the tokenizers of the Qwen family and its relatives: ids and nothing else.
//!
//! The `tokenizers` crate keeps for every byte where it came from, which costs much more than
//! finding the ids. Here words are slices of the text, and most of them are tokens as they are. The
//! ids are those of the crate, which tests compare; tokenizers of other kinds stay with it.

mod bpe;
mod class;
mod split;

use std::borrow::Cow;

use aho_corasick::{AhoCorasick, MatchKind};
use tokenizers::{AddedToken, ModelWrapper, Tokenizer};
use unicode_normalization_alignments::{IsNormalized, UnicodeNormalization, is_nfc_quick};

use self::bpe::Bpe;
use self::split::Splitter;
use super::byte_level;
use crate::error::TextError;

/// All bytes of a text in which every character is below U+0300 are below this. Such a text is in
/// NFC: no character in it combines with another.
const COMBINING_FROM: u8 = 0xcc;

/// Encodes as the tokenizer that it was made of.
#[derive(Debug)]
pub struct Encoder {
    nfc: bool,
    splitter: Splitter,
    bpe: Bpe,
    added: Option<Added>,
}

/// Added tokens as they are found in a text, before it is normalized.
#[derive(Debug)]
struct Added {
    names: AhoCorasick,
    /// By pattern; `None` for special tokens, which are only text but hide what they overlap.
    ids: Vec<Option<u32>>,
}

impl Encoder {
    /// `None` if the tokenizer has a step that is not known here; `merges` are its own.
    pub fn of(
        tokenizer: &Tokenizer,
        merges: &[(String, String)],
    ) -> Result<Option<Self>, TextError> {
        let ModelWrapper::BPE(model) = tokenizer.get_model() else { return Ok(None) };
        let is_empty = |text: &Option<String>| text.as_ref().is_none_or(String::is_empty);
        let is_plain = model.dropout.is_none()
            && is_empty(&model.continuing_subword_prefix)
            && is_empty(&model.end_of_word_suffix);
        let (nfc, splitter) = (normalizes(tokenizer)?, Splitter::of(tokenizer)?);
        let (true, Some(nfc), Some(splitter)) = (is_plain, nfc, splitter) else { return Ok(None) };
        let tokens = tokenizer.get_added_tokens_decoder();
        // Those that are found by other rules than their text alone.
        let is_simple = |token: &AddedToken| {
            !(token.normalized || token.lstrip || token.rstrip || token.single_word)
        };
        if !tokens.values().all(|token| token.special || is_simple(token)) {
            return Ok(None);
        }
        let added = Added::of(tokens.into_iter().filter(|(_, token)| !token.normalized))?;
        let bpe = Bpe::new(tokenizer.get_vocab(false), merges, model.ignore_merges);
        Ok(bpe.map(|bpe| Self { nfc, splitter, bpe, added }))
    }

    /// The ids of a text, behind those in `ids`; where `parse_added`, added tokens that are not
    /// special are found in it.
    pub fn encode(&self, text: &str, parse_added: bool, ids: &mut Vec<u32>) {
        let Some(added) = self.added.as_ref().filter(|_| parse_added) else {
            return self.words(text, ids);
        };
        let mut from = 0;
        for found in added.names.find_iter(text) {
            let Some(id) = added.ids[found.pattern()] else { continue };
            self.words(&text[from..found.start()], ids);
            ids.push(id);
            from = found.end();
        }
        self.words(&text[from..], ids);
    }

    fn words(&self, text: &str, ids: &mut Vec<u32>) {
        let text = if self.nfc { nfc(text) } else { Cow::Borrowed(text) };
        self.splitter.words(&text, |word| self.bpe.encode(word.as_bytes(), ids));
    }
}

impl Added {
    /// `None` if there are none to be found.
    fn of(tokens: impl Iterator<Item = (u32, AddedToken)>) -> Result<Option<Self>, TextError> {
        let mut tokens: Vec<_> = tokens.filter(|(_, token)| !token.content.is_empty()).collect();
        if tokens.iter().all(|(_, token)| token.special) {
            return Ok(None);
        }
        tokens.sort_by_key(|(id, _)| *id);
        let names = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(tokens.iter().map(|(_, token)| &token.content))
            .map_err(byte_level::error)?;
        let ids = tokens.iter().map(|(id, token)| (!token.special).then_some(*id)).collect();
        Ok(Some(Self { names, ids }))
    }
}

/// Whether text is composed first; `None` for other normalizers.
fn normalizes(tokenizer: &Tokenizer) -> Result<Option<bool>, TextError> {
    let normalizer = serde_json::to_value(tokenizer.get_normalizer()).map_err(byte_level::error)?;
    Ok(match normalizer["type"].as_str() {
        None if normalizer.is_null() => Some(false),
        Some("NFC") => Some(true),
        _ => None,
    })
}

/// The composed form by the tables of the `tokenizers` crate, which are those of Unicode 9.
fn nfc(text: &str) -> Cow<'_, str> {
    if text.bytes().all(|byte| byte < COMBINING_FROM)
        || is_nfc_quick(text.chars()) == IsNormalized::Yes
    {
        return Cow::Borrowed(text);
    }
    Cow::Owned(text.nfc().map(|(c, _)| c).collect())
}
