//! Where words end: the splitting patterns of known tokenizers, written out.
//!
//! A pattern's alternatives are tried in their order, and each is greedy, as a backtracking engine
//! does it. Every character begins a match of one of them, so words cover the text.

use serde_json::Value;
use tokenizers::Tokenizer;

use super::class::{CLASSES, Class, Classes};
use crate::error::TextError;
use crate::tokenizer::byte_level::{self, Split};

/// Cuts text into words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Splitter(Split);

/// The kinds that are known.
const KNOWN: [Split; 4] = [Split::Qwen, Split::Llama3, Split::SmolLm, Split::Gpt2];

impl Splitter {
    /// `None` if the tokenizer cuts in another way.
    pub fn of(tokenizer: &Tokenizer) -> Result<Option<Self>, TextError> {
        let steps = tokenizer.get_pre_tokenizer();
        let steps = steps.map(serde_json::to_value).transpose().map_err(byte_level::error)?;
        let Some(steps) = steps.map(steps_of) else { return Ok(None) };
        let is_same = |split: &Split| steps_of(split.pre_tokenizer()) == steps;
        Ok(KNOWN.into_iter().find(is_same).map(Self))
    }

    /// The words of a text in their order.
    pub fn words<'a>(self, text: &'a str, mut word: impl FnMut(&'a str)) {
        let classes: &Classes = &CLASSES;
        if self.0 != Split::SmolLm {
            return self.pieces(classes, text, &mut word);
        }
        // Digits are words of their own before anything else is cut.
        let mut rest = text;
        while let Some(at) = rest.find(char::is_numeric) {
            let len = rest[at..].chars().next().map_or(0, char::len_utf8);
            self.pieces(classes, &rest[..at], &mut word);
            word(&rest[at..at + len]);
            rest = &rest[at + len..];
        }
        self.pieces(classes, rest, &mut word);
    }

    fn pieces<'a>(self, classes: &Classes, text: &'a str, word: &mut impl FnMut(&'a str)) {
        let mut from = 0;
        while let Some(first) = classes.at(text, from) {
            let end = match self.0 {
                Split::Qwen => qwen(classes, text, from, first, 1),
                Split::Llama3 => qwen(classes, text, from, first, 3),
                Split::SmolLm | Split::Gpt2 => gpt2(classes, text, from, first),
            };
            word(&text[from..end]);
            from = end;
        }
    }
}

/// What a pre-tokenizer does, without what only positions depend on.
fn steps_of(pre_tokenizer: Value) -> Vec<Value> {
    let mut steps = match pre_tokenizer {
        Value::Object(mut fields) if fields.get("type") == Some(&"Sequence".into()) => {
            match fields.remove("pretokenizers") {
                Some(Value::Array(steps)) => steps,
                other => other.into_iter().collect(),
            }
        }
        step => vec![step],
    };
    steps.iter_mut().filter_map(Value::as_object_mut).for_each(|step| {
        step.remove("trim_offsets");
    });
    steps
}

/// The end of the word at `from`, whose `first` character has that class and length:
/// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,digits}|
/// ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`
#[inline]
fn qwen(
    classes: &Classes,
    text: &str,
    from: usize,
    (class, len): (Class, usize),
    digits: usize,
) -> usize {
    let next = from + len;
    match class {
        Class::Letter => classes.run(Class::Letter, text, next),
        Class::Number => {
            let mut end = next;
            for _ in 1..digits {
                match classes.at(text, end) {
                    Some((Class::Number, len)) => end += len,
                    _ => break,
                }
            }
            end
        }
        Class::Newline => whitespace_with_newlines(classes, text, from),
        Class::Space | Class::Other => {
            if let Some(end) = contraction(text, from, true) {
                return end;
            }
            match classes.at(text, next) {
                Some((Class::Letter, len)) => classes.run(Class::Letter, text, next + len),
                Some((Class::Other, len)) if text.as_bytes()[from] == b' ' => {
                    punctuation(classes, text, next + len)
                }
                _ if class == Class::Other => punctuation(classes, text, next),
                _ => whitespace_with_newlines(classes, text, from),
            }
        }
    }
}

/// `[^\s\p{L}\p{N}]*[\r\n]*`
fn punctuation(classes: &Classes, text: &str, from: usize) -> usize {
    classes.run(Class::Newline, text, classes.run(Class::Other, text, from))
}

/// `\s*[\r\n]+|\s+(?!\S)|\s+` where whitespace begins.
fn whitespace_with_newlines(classes: &Classes, text: &str, from: usize) -> usize {
    let (end, last, newline) = whitespace(classes, text, from);
    newline.unwrap_or_else(|| before_a_word(text, from, end, last))
}

/// The end of the word at `from`, whose `first` character has that class and length:
/// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
#[inline]
fn gpt2(classes: &Classes, text: &str, from: usize, (class, len): (Class, usize)) -> usize {
    if class == Class::Other
        && let Some(end) = contraction(text, from, false)
    {
        return end;
    }
    let next = from + len;
    let is_word = |class| matches!(class, Class::Letter | Class::Number | Class::Other);
    if is_word(class) {
        return classes.run(class, text, next);
    }
    match classes.at(text, next) {
        Some((class, len)) if text.as_bytes()[from] == b' ' && is_word(class) => {
            classes.run(class, text, next + len)
        }
        _ => {
            let (end, last, _) = whitespace(classes, text, from);
            before_a_word(text, from, end, last)
        }
    }
}

/// The whitespace at `from`: where it ends, where its last character begins, and the end of its
/// last newline.
fn whitespace(classes: &Classes, text: &str, from: usize) -> (usize, usize, Option<usize>) {
    let (mut end, mut last, mut newline) = (from, from, None);
    while let Some((class @ (Class::Space | Class::Newline), len)) = classes.at(text, end) {
        last = end;
        end += len;
        if class == Class::Newline {
            newline = Some(end);
        }
    }
    (end, last, newline)
}

/// `\s+(?!\S)|\s+`: the last whitespace character is left to the word that follows, unless it is
/// the only one.
fn before_a_word(text: &str, from: usize, end: usize, last: usize) -> usize {
    if end == text.len() || last == from { end } else { last }
}

/// The end of an English contraction.
fn contraction(text: &str, from: usize, any_case: bool) -> Option<usize> {
    let rest = text.as_bytes()[from..].strip_prefix(b"'")?;
    let starts = |ending: &&str| match (any_case, rest.get(..ending.len())) {
        (true, Some(bytes)) => bytes.eq_ignore_ascii_case(ending.as_bytes()),
        (false, Some(bytes)) => bytes == ending.as_bytes(),
        (_, None) => false,
    };
    // The last one is the long s, which is an s in any case.
    let endings = ["s", "t", "re", "ve", "m", "ll", "d"].into_iter();
    let mut endings = endings.chain(any_case.then_some("\u{17f}"));
    endings.find(starts).map(|ending| from + 1 + ending.len())
}
