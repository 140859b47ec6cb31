//! What the splitting patterns tell characters apart by.
//!
//! The classes are asked of the crate that compiles the reference's patterns, so that both know the
//! same version of Unicode.

use std::collections::HashMap;
use std::sync::LazyLock;

use regex_syntax::hir::{Class as Set, HirKind};

/// Every character is in one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// `\p{L}`
    Letter,
    /// `\p{N}`
    Number,
    /// `\s` but for the two below
    Space,
    /// `[\r\n]`
    Newline,
    Other,
}

/// Characters of a block, of which the table holds each kind once.
const BLOCK: usize = 128;

/// Classes of all characters.
#[derive(Debug)]
pub struct Classes {
    ascii: [Class; BLOCK],
    /// By block of characters: which of `blocks` it is.
    index: Vec<u16>,
    blocks: Vec<[Class; BLOCK]>,
}

pub static CLASSES: LazyLock<Classes> = LazyLock::new(Classes::new);

impl Classes {
    fn new() -> Self {
        let mut all = vec![Class::Other; char::MAX as usize + 1];
        for (pattern, class) in
            [(r"\p{L}", Class::Letter), (r"\p{N}", Class::Number), (r"\s", Class::Space)]
        {
            for (first, last) in ranges(pattern) {
                all[first as usize..=last as usize].fill(class);
            }
        }
        for newline in ['\r', '\n'] {
            all[newline as usize] = Class::Newline;
        }
        let (mut blocks, mut known) = (Vec::new(), HashMap::new());
        let (parts, _) = all.as_chunks::<BLOCK>();
        let index = parts.iter().map(|block| {
            *known.entry(*block).or_insert_with(|| {
                blocks.push(*block);
                (blocks.len() - 1) as u16
            })
        });
        let index = index.collect();
        Self { ascii: parts[0], index, blocks }
    }

    /// Of the character at `at`, and its bytes; `None` at the end.
    #[inline]
    pub fn at(&self, text: &str, at: usize) -> Option<(Class, usize)> {
        let byte = *text.as_bytes().get(at)?;
        match self.ascii.get(byte as usize) {
            Some(class) => Some((*class, 1)),
            None => {
                let c = text[at..].chars().next()?;
                Some((self.of(c), c.len_utf8()))
            }
        }
    }

    fn of(&self, c: char) -> Class {
        self.blocks[self.index[c as usize / BLOCK] as usize][c as usize % BLOCK]
    }

    /// Where the characters of a class that begin at `from` end.
    #[inline]
    pub fn run(&self, class: Class, text: &str, mut from: usize) -> usize {
        while let Some((found, len)) = self.at(text, from) {
            if found != class {
                break;
            }
            from += len;
        }
        from
    }
}

/// The characters that a pattern of one class matches. Empty for other patterns, which a test
/// would see.
fn ranges(pattern: &str) -> Vec<(char, char)> {
    let hir = regex_syntax::parse(pattern).map(|hir| hir.into_kind());
    match hir {
        Ok(HirKind::Class(Set::Unicode(set))) => {
            set.ranges().iter().map(|range| (range.start(), range.end())).collect()
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_those_of_unicode() {
        let letters = ['a', 'Z', 'é', 'ß', '漢', 'ا', 'ก', '\u{1e900}', 'ª', 'ʰ'];
        assert!(letters.iter().all(|c| CLASSES.of(*c) == Class::Letter));
        assert!(['0', '9', '½', 'Ⅷ', '٣', '³'].iter().all(|c| CLASSES.of(*c) == Class::Number));
        assert!([' ', '\t', '\u{85}', '\u{3000}'].iter().all(|c| CLASSES.of(*c) == Class::Space));
        let other = ['!', '\u{301}', '🙂', '\u{200d}', '\u{378}', '\u{e000}', '\u{10ffff}'];
        assert!(other.iter().all(|c| CLASSES.of(*c) == Class::Other));
        for c in ('\0'..=char::MAX).filter(|c| c.is_whitespace()) {
            let expected = if "\r\n".contains(c) { Class::Newline } else { Class::Space };
            assert_eq!(CLASSES.of(c), expected, "{c:?}");
        }
    }
}
