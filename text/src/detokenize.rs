//! Token ids back to text, one at a time.
//!
//! A token may end inside a character: its bytes are held back until the character is complete, or
//! can never be. What comes out in total equals decoding all bytes at once.

use std::sync::Arc;

use crate::pieces::Pieces;

/// Decodes one stream of token ids. Special tokens leave no text.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    pieces: Arc<Pieces>,
    /// At most three bytes: the beginning of a character.
    held: Vec<u8>,
}

impl Detokenizer {
    pub(crate) fn new(pieces: Arc<Pieces>) -> Self {
        Self { pieces, held: Vec::new() }
    }

    /// The text that is certain once this token is known.
    pub fn push(&mut self, id: u32) -> String {
        if self.pieces.is_special(id) {
            return String::new();
        }
        self.held.extend_from_slice(self.pieces.get(id));
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.held) {
                Ok(valid) => {
                    text.push_str(valid);
                    self.held.clear();
                    return text;
                }
                Err(error) => {
                    let valid = error.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.held[..valid]));
                    let Some(invalid) = error.error_len() else {
                        self.held.drain(..valid);
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.held.drain(..valid + invalid);
                }
            }
        }
    }

    /// Whether half a character waits for its other half.
    pub fn holds(&self) -> bool {
        !self.held.is_empty()
    }

    /// The stream ended: half a character becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.held).into_owned();
        self.held.clear();
        text
    }
}
