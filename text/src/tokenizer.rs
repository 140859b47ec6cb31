//! One model's vocabulary: text to ids, and what each id stands for.
//!
//! Byte-level BPE only, which is what the Qwen family and its relatives use: every byte sequence
//! has tokens, and every token has bytes. Other kinds are refused by name.

mod byte_level;
mod folder;
pub mod gguf;
pub mod tiktoken;

use std::sync::Arc;

use tokenizers::Tokenizer;

use crate::error::TextError;
use crate::language::Files;
use crate::marker::{Segment, Specials};
use crate::pieces::Pieces;

/// Whitespace characters in a row: beyond this the splitting pattern gives up midway.
const WHITESPACE_RUN_MAX: usize = 250_000;

/// A tokenizer with its special tokens told apart.
#[derive(Debug)]
pub struct Vocabulary {
    tokenizer: Tokenizer,
    pub specials: Specials,
    pub pieces: Arc<Pieces>,
}

impl Vocabulary {
    /// The tokenizer among a model's files; `None` if there is none.
    pub fn load(files: &Files) -> Result<Option<Self>, TextError> {
        let tokenizer = if let Some(json) = files.get("tokenizer.json") {
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
        };
        tokenizer.map(Self::new).transpose()
    }

    fn new(mut tokenizer: Tokenizer) -> Result<Self, TextError> {
        byte_level::check(&tokenizer)?;
        // Text is never cut or padded behind the caller's back.
        tokenizer.with_truncation(None).map_err(byte_level::error)?.with_padding(None);
        // From here on the text of a special token is only text.
        tokenizer.set_encode_special_tokens(true);
        let added = tokenizer.get_added_tokens_decoder();
        let specials = added.into_iter().filter(|(_, token)| token.special).collect();
        let pieces = Arc::new(Pieces::read(&tokenizer)?);
        Ok(Self { specials: Specials::new(specials)?, pieces, tokenizer })
    }

    /// Ids of ordinary text; with `affixes`, what the model wants around a text (BOS) as well.
    pub fn encode(&self, text: &str, affixes: bool) -> Result<Vec<u32>, TextError> {
        check_whitespace(text)?;
        let encoding = self.tokenizer.encode_fast(text, affixes);
        Ok(encoding.map_err(|error| TextError::Input(error.to_string()))?.get_ids().to_vec())
    }

    /// Ids of rendered text, whose unmarked special names are special tokens.
    pub fn encode_rendered(&self, rendered: &str, marker: char) -> Result<Vec<u32>, TextError> {
        let mut ids = Vec::new();
        for segment in self.specials.segments(rendered, marker) {
            match segment {
                Segment::Text(text) => ids.extend(self.encode(&text, false)?),
                Segment::Special(id) => ids.push(id),
            }
        }
        Ok(ids)
    }
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
