//! One model's vocabulary: text to ids, and what each id stands for.
//!
//! Byte-level BPE only, which is what the Qwen family and its relatives use: every byte sequence
//! has tokens, and every token has bytes. Other kinds are refused by name.

pub mod byte_level;
mod encoder;
mod folder;
pub mod gguf;
pub mod tiktoken;

use std::collections::HashMap;
use std::sync::Arc;

use tokenizers::{
    Model, NormalizedString, Normalizer, OffsetType, PreTokenizedString, PreTokenizer, Tokenizer,
};

use self::byte_level::Loaded;
use self::encoder::Encoder;
use crate::error::TextError;
use crate::language::Files;
use crate::marker::{Segment, Specials};
use crate::pieces::Pieces;

/// Whitespace characters in a row: beyond this the reference's splitting pattern gives up midway.
const WHITESPACE_RUN_MAX: usize = 250_000;

/// Ids around a text, BOS in most models that have any.
#[derive(Debug, Default)]
struct Affixes {
    prefix: Vec<u32>,
    suffix: Vec<u32>,
}

/// What turns text into ids.
#[derive(Debug)]
enum Engine {
    /// For tokenizers whose every step is known.
    Own(Box<Encoder>),
    /// The `tokenizers` crate, for all others.
    Reference(Box<Tokenizer>),
}

/// Which code finds the ids of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EncoderKind {
    /// This crate's own: about 10 ns a byte.
    Own,
    /// The `tokenizers` crate, for tokenizers with steps that are only known there: 400 ns a byte.
    Reference,
}

impl EncoderKind {
    /// In a word, for logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Own => "own",
            Self::Reference => "tokenizers",
        }
    }
}

/// A tokenizer with its special tokens told apart.
#[derive(Debug)]
pub struct Vocabulary {
    engine: Engine,
    pub specials: Specials,
    /// Tokens that are found whole in text, special or not.
    added: HashMap<String, u32>,
    /// Put before and after a text that stands alone.
    affixes: Affixes,
    pub pieces: Arc<Pieces>,
}

impl Vocabulary {
    /// The tokenizer among a model's files; `None` if there is none.
    pub fn load(files: &Files) -> Result<Option<Self>, TextError> {
        Self::read(files)?.map(Self::new).transpose()
    }

    pub fn read(files: &Files) -> Result<Option<Loaded>, TextError> {
        Ok(if let Some(json) = files.get("tokenizer.json") {
            Some(folder::from_json(json)?)
        } else if let Some((name, ranks)) = tiktoken::find(files) {
            Some(tiktoken::load(name, ranks, files)?)
        } else if let (Some(vocab), Some(merges)) =
            (files.get("vocab.json"), files.get("merges.txt"))
        {
            Some(folder::from_vocab_and_merges(vocab, merges, files)?)
        } else if let Some(metadata) = files.get("metadata.gguf") {
            gguf::load(metadata)?
        } else {
            None
        })
    }

    /// Without merges the reference encodes.
    pub fn new(loaded: Loaded) -> Result<Self, TextError> {
        let Loaded { mut tokenizer, merges } = loaded;
        byte_level::check(&tokenizer)?;
        // Text is never cut or padded behind the caller's back.
        tokenizer.with_truncation(None).map_err(byte_level::error)?.with_padding(None);
        // From here on the text of a special token is only text; `specials` finds those that count.
        tokenizer.set_encode_special_tokens(true);
        let specials = tokenizer.get_added_tokens_decoder();
        let specials = specials.into_iter().filter(|(_, token)| token.special).collect();
        let specials = Specials::new(specials)?;
        let pieces = Arc::new(Pieces::read(&tokenizer)?);
        let affixes = Affixes::of(&tokenizer)?;
        let added = tokenizer.get_added_vocabulary().get_vocab();
        let added = added.iter().map(|(token, id)| (token.clone(), *id)).collect();
        let engine = match merges {
            Some(merges) => Encoder::of(&tokenizer, &merges)?.map(|own| Engine::Own(Box::new(own))),
            None => None,
        };
        let engine = engine.unwrap_or_else(|| Engine::Reference(Box::new(tokenizer)));
        Ok(Self { engine, specials, added, affixes, pieces })
    }

    pub fn encoder(&self) -> EncoderKind {
        match self.engine {
            Engine::Own(_) => EncoderKind::Own,
            Engine::Reference(_) => EncoderKind::Reference,
        }
    }

    /// The id of the added token with exactly this text.
    pub fn added_token(&self, text: &str) -> Option<u32> {
        self.added.get(text).copied()
    }

    /// Ids of a text in which every added token is parsed; with `affixes`, what the model wants
    /// around a text as well.
    pub fn encode(&self, text: &str, affixes: bool) -> Result<Vec<u32>, TextError> {
        let ids = self.encode_segments(self.specials.segments(text, None))?;
        Ok(if affixes { self.affixes.around(ids) } else { ids })
    }

    /// Ids of a text in which added tokens are only text.
    pub fn encode_literal(&self, text: &str, affixes: bool) -> Result<Vec<u32>, TextError> {
        let mut ids = Vec::new();
        match &self.engine {
            Engine::Own(encoder) => encoder.encode(text, false, &mut ids),
            Engine::Reference(tokenizer) => {
                check_whitespace(text)?;
                ids = literal(tokenizer, text).map_err(|e| TextError::Input(e.to_string()))?;
            }
        }
        Ok(if affixes { self.affixes.around(ids) } else { ids })
    }

    /// Ids of rendered text, whose unmarked special names are special tokens.
    pub fn encode_rendered(&self, rendered: &str, marker: char) -> Result<Vec<u32>, TextError> {
        self.encode_segments(self.specials.segments(rendered, Some(marker)))
    }

    fn encode_segments(&self, segments: Vec<Segment<'_>>) -> Result<Vec<u32>, TextError> {
        let mut ids = Vec::new();
        for segment in segments {
            match segment {
                Segment::Text(text) => self.protected(&text, &mut ids)?,
                Segment::Special(id) => ids.push(id),
            }
        }
        Ok(ids)
    }

    /// Ids of a user's text inside a conversation: special tokens are only text, other added
    /// tokens are parsed.
    pub fn encode_protected(&self, text: &str) -> Result<Vec<u32>, TextError> {
        let mut ids = Vec::new();
        self.protected(text, &mut ids)?;
        Ok(ids)
    }

    fn protected(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), TextError> {
        match &self.engine {
            Engine::Own(encoder) => encoder.encode(text, true, ids),
            Engine::Reference(tokenizer) => {
                check_whitespace(text)?;
                let encoding = tokenizer.encode_fast(text, false);
                let encoding = encoding.map_err(|error| TextError::Input(error.to_string()))?;
                ids.extend(encoding.get_ids());
            }
        }
        Ok(())
    }
}

impl Affixes {
    /// What the tokenizer puts around the ids of a text.
    fn of(tokenizer: &Tokenizer) -> Result<Self, TextError> {
        let ids = |affixes| -> Result<Vec<u32>, TextError> {
            let encoding = tokenizer.encode_fast("a", affixes).map_err(byte_level::error)?;
            Ok(encoding.get_ids().to_vec())
        };
        let (plain, whole) = (ids(false)?, ids(true)?);
        let at = match plain.is_empty() {
            true => None,
            false => whole.windows(plain.len()).position(|window| window == plain),
        };
        let Some(at) = at else { return Ok(Self::default()) };
        let suffix = whole[at + plain.len()..].to_vec();
        Ok(Self { prefix: whole[..at].to_vec(), suffix })
    }

    fn around(&self, mut ids: Vec<u32>) -> Vec<u32> {
        ids.splice(0..0, self.prefix.iter().copied());
        ids.extend(&self.suffix);
        ids
    }
}

/// The tokenizer's steps without its search for added tokens.
fn literal(tokenizer: &Tokenizer, text: &str) -> tokenizers::Result<Vec<u32>> {
    let mut normalized = NormalizedString::from(text);
    if let Some(normalizer) = tokenizer.get_normalizer() {
        normalizer.normalize(&mut normalized)?;
    }
    let mut words = PreTokenizedString::from(normalized);
    if let Some(pre_tokenizer) = tokenizer.get_pre_tokenizer() {
        pre_tokenizer.pre_tokenize(&mut words)?;
    }
    words.tokenize(|word| tokenizer.get_model().tokenize(word.get()))?;
    Ok(words.into_encoding(None, 0, OffsetType::None)?.get_ids().to_vec())
}

fn check_whitespace(text: &str) -> Result<(), TextError> {
    let mut run = 0;
    for c in text.chars() {
        run = if c.is_whitespace() { run + 1 } else { 0 };
        if run > WHITESPACE_RUN_MAX {
            let reason = format!("more than {WHITESPACE_RUN_MAX} whitespace characters in a row");
            return Err(TextError::Input(reason));
        }
    }
    Ok(())
}
