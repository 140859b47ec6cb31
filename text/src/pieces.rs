//! The bytes that each token id stands for, and the alphabet that byte-level vocabularies are
//! written in: printable bytes as themselves, the others as the characters from U+0100 on.

use std::sync::LazyLock;

use tokenizers::Tokenizer;

use crate::TextError;

/// Ids at or above this belong to no vocabulary: a bound for the table.
const IDS_MAX: u32 = 1 << 22;

static BYTE_TO_CHAR: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut table = ['\0'; 256];
    let mut next = 256u32;
    for (byte, slot) in table.iter_mut().enumerate() {
        let printable = matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let code = if printable { byte as u32 } else { next };
        next += u32::from(!printable);
        *slot = char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER);
    }
    table
});

/// Bytes as a byte-level vocabulary spells them.
pub fn spell(bytes: &[u8]) -> String {
    bytes.iter().map(|&byte| BYTE_TO_CHAR[byte as usize]).collect()
}

/// The bytes behind a spelling; `None` where a character is outside the alphabet.
pub fn unspell(token: &str) -> Option<Vec<u8>> {
    let byte = |c: char| match u32::from(c) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => u8::try_from(code).ok(),
        code @ 0x100..=0x143 => {
            let hidden = (0..=0x20u8).chain(0x7f..=0xa0).chain([0xad]);
            hidden.into_iter().nth((code - 0x100) as usize)
        }
        _ => None,
    };
    token.chars().map(byte).collect()
}

/// One run of bytes for every id.
#[derive(Debug, Default)]
pub struct Pieces {
    bytes: Vec<u8>,
    /// [ids + 1] where each piece begins in `bytes`.
    starts: Vec<usize>,
    special: Vec<bool>,
}

impl Pieces {
    /// Reads the whole vocabulary of a byte-level tokenizer.
    pub fn read(tokenizer: &Tokenizer) -> Result<Self, TextError> {
        let added = tokenizer.get_added_tokens_decoder();
        let vocabulary = tokenizer.get_vocab(true);
        let highest = vocabulary.values().chain(added.keys()).copied().max();
        let len = highest.map_or(0, |id| id as usize + 1);
        if len > IDS_MAX as usize {
            let reason = format!("token id {} is above {IDS_MAX}", len - 1);
            return Err(TextError::Tokenizer(reason));
        }
        let mut table = vec![Vec::new(); len];
        for (token, id) in vocabulary {
            table[id as usize] = unspell(&token).unwrap_or_else(|| token.into_bytes());
        }
        let mut special = vec![false; len];
        for (id, token) in added {
            table[id as usize] = token.content.into_bytes();
            special[id as usize] = token.special;
        }
        Ok(Self::of(&table, special))
    }

    /// `special[id]` says so of each of `table`.
    pub fn of(table: &[impl AsRef<[u8]>], special: Vec<bool>) -> Self {
        let mut starts = vec![0];
        let mut bytes = Vec::new();
        for piece in table {
            bytes.extend_from_slice(piece.as_ref());
            starts.push(bytes.len());
        }
        Self { bytes, starts, special }
    }

    /// One more than the highest id.
    pub fn len(&self) -> usize {
        self.special.len()
    }

    /// Nothing for an id that the vocabulary does not have.
    pub fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        match (self.starts.get(id), self.starts.get(id + 1)) {
            (Some(&start), Some(&end)) => &self.bytes[start..end],
            _ => &[],
        }
    }

    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_survives_its_spelling() {
        let all: Vec<u8> = (0..=255).collect();
        let spelled = spell(&all);
        assert_eq!(spelled.chars().count(), 256);
        assert_eq!(unspell(&spelled), Some(all));
        assert_eq!(spell(b" a\n"), "ĠaĊ");
        assert_eq!(unspell("漢"), None);
    }
}
