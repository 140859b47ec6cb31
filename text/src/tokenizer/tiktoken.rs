//! The original Qwen's vocabulary: one file of byte sequences and their ranks.
//!
//! A merge of rank order is derived for every token: what merging by lower ranks leaves of its
//! bytes are the two parts that make it. Merging by these gives what merging by ranks gives.

use std::collections::HashMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use tokenizers::AddedToken;

use super::byte_level::{Loaded, Recipe, Split};
use crate::error::TextError;
use crate::language::{Files, json};
use crate::pieces::spell;

/// Deriving a merge is quadratic in the token's length.
const TOKEN_BYTES_MAX: usize = 512;
/// `<|extra_0|>` and on, after the three of ChatML.
const EXTRAS: usize = 205;

/// The rank file among a model's files.
pub fn find(files: &Files) -> Option<(&str, &[u8])> {
    let (name, data) = files.iter().find(|(name, _)| name.ends_with(".tiktoken"))?;
    Some((name, data))
}

#[derive(Deserialize)]
struct Config {
    vocab_size: Option<usize>,
}

/// Special tokens follow the ranks; those beyond the model's own vocabulary are left out.
pub fn load(name: &str, data: &[u8], files: &Files) -> Result<Loaded, TextError> {
    let tokens = parse(name, data)?;
    let config: Option<Config> = json(files, "config.json")?;
    let limit = config.and_then(|config| config.vocab_size).unwrap_or(usize::MAX);
    let merges = derive_merges(&tokens);
    let mut vocab: Vec<(String, u32)> = Vec::with_capacity(tokens.len());
    vocab.extend(tokens.iter().zip(0..).map(|(token, id)| (spell(token), id)));
    let names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(str::to_owned);
    let names = names.into_iter().chain((0..EXTRAS).map(|i| format!("<|extra_{i}|>")));
    let names: Vec<String> = names.take(limit.saturating_sub(tokens.len())).collect();
    vocab.extend(names.iter().cloned().zip(tokens.len() as u32..));
    let added = names.into_iter().map(|name| AddedToken::from(name, true)).collect();
    Recipe { vocab, merges, added, split: Split::Qwen, whole_words: true, bos: None }.build()
}

/// Token bytes by rank.
fn parse(name: &str, data: &[u8]) -> Result<Vec<Vec<u8>>, TextError> {
    let mut tokens = Vec::new();
    for (at, line) in data.split(|&b| b == b'\n').enumerate() {
        let line = line.trim_ascii();
        if line.is_empty() {
            continue;
        }
        let broken = |reason: &str| TextError::file(name, format!("line {}: {reason}", at + 1));
        let text = std::str::from_utf8(line).map_err(|_| broken("not text"))?;
        let (token, rank) = text.split_once(' ').ok_or_else(|| broken("no rank"))?;
        let token = STANDARD.decode(token).map_err(|_| broken("not base64"))?;
        if token.is_empty() || token.len() > TOKEN_BYTES_MAX {
            return Err(broken(&format!("a token has 1 to {TOKEN_BYTES_MAX} bytes")));
        }
        if rank.parse() != Ok(tokens.len()) {
            return Err(broken("ranks must count up from 0"));
        }
        tokens.push(token);
    }
    Ok(tokens)
}

/// Best first.
pub fn derive_merges(tokens: &[Vec<u8>]) -> Vec<(String, String)> {
    let ranks: HashMap<&[u8], usize> =
        tokens.iter().enumerate().map(|(rank, token)| (&token[..], rank)).collect();
    let halves = |(rank, token): (usize, &Vec<u8>)| {
        let cut = last_cut(token, rank, &ranks)?;
        Some((spell(&token[..cut]), spell(&token[cut..])))
    };
    tokens.iter().enumerate().filter_map(halves).collect()
}

/// Where the last two parts of a token meet once everything of lower rank is merged; `None` if
/// there are not two.
fn last_cut(token: &[u8], rank: usize, ranks: &HashMap<&[u8], usize>) -> Option<usize> {
    let mut cuts: Vec<usize> = (0..=token.len()).collect();
    while cuts.len() > 3 {
        let pairs = cuts.windows(3).enumerate();
        let ranked = pairs.filter_map(|(at, w)| Some((*ranks.get(&token[w[0]..w[2]])?, at)));
        let (_, at) = ranked.filter(|(found, _)| *found < rank).min()?;
        cuts.remove(at + 1);
    }
    (cuts.len() == 3).then(|| cuts[1])
}
