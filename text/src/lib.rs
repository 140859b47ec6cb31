#![forbid(unsafe_code)]
//! Text to token ids and back: tokenizers, chat templates, incremental decoding, stop strings.
//!
//! [`Language`] is everything that a router needs to speak one model's language. In conversations
//! a user's text never becomes a special token: only the model's own template can put those. A raw
//! prompt is a template of the caller's own, so every added token in it is parsed.

mod chat;
mod chat_format;
mod continuation;
mod defaults;
mod detokenize;
mod error;
mod language;
mod marker;
mod pieces;
mod python;
mod qwen1;
mod reader;
mod stop;
mod template;
mod tokenizer;

#[cfg(test)]
mod tests;

pub use chat::{Chat, Content, Message};
pub use defaults::GenerationDefaults;
pub use detokenize::Detokenizer;
pub use error::TextError;
pub use language::{Files, Language};
pub use reader::{FinishReason, Piece, Reader, Stops, Token};
pub use tokenizer::EncoderKind;
