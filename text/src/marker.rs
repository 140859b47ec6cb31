//! Keeps what users wrote apart from what a template wrote.
//!
//! A template mixes both into one string. Before it runs, every special token's name in a user's
//! text is broken by a private-use character that occurs nowhere else; afterwards only unbroken
//! names, which the template must have written, become special tokens, and the marks are removed.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashSet};

use aho_corasick::{AhoCorasick, MatchKind};
use serde_json::Value;
use tokenizers::AddedToken;

use crate::chat::Chat;
use crate::error::TextError;

/// Characters that no standard gives a meaning: planes 15 and 16.
const PRIVATE: std::ops::RangeInclusive<char> = '\u{F0000}'..='\u{10FFFD}';
/// The least first byte of theirs.
const PRIVATE_FROM: u8 = 0xf3;

/// A part of a rendered conversation.
#[derive(Debug, PartialEq, Eq)]
pub enum Segment<'a> {
    Text(Cow<'a, str>),
    Special(u32),
}

/// The special tokens of a vocabulary, ready to be found.
#[derive(Debug)]
pub struct Specials {
    tokens: Vec<(u32, AddedToken)>,
    every: AhoCorasick,
    longest: AhoCorasick,
    /// Proper beginnings and ends of names: what neighbouring text could complete.
    beginnings: BTreeSet<String>,
    ends: BTreeSet<String>,
}

impl Specials {
    /// `tokens` without empty names.
    pub fn new(mut tokens: Vec<(u32, AddedToken)>) -> Result<Self, TextError> {
        tokens.retain(|(_, token)| !token.content.is_empty());
        tokens.sort_by_key(|(id, _)| *id);
        let build = |kind| {
            AhoCorasick::builder()
                .match_kind(kind)
                .build(tokens.iter().map(|(_, token)| &token.content))
                .map_err(|error| TextError::Tokenizer(error.to_string()))
        };
        let (every, longest) = (build(MatchKind::Standard)?, build(MatchKind::LeftmostLongest)?);
        let (mut beginnings, mut ends) = (BTreeSet::new(), BTreeSet::new());
        for (_, AddedToken { content, .. }) in &tokens {
            for (cut, _) in content.char_indices().skip(1) {
                beginnings.insert(content[..cut].to_owned());
                ends.insert(content[cut..].to_owned());
            }
        }
        Ok(Self { tokens, every, longest, beginnings, ends })
    }

    pub fn id(&self, content: &str) -> Option<u32> {
        self.tokens.iter().find(|(_, token)| token.content == content).map(|(id, _)| *id)
    }

    /// The text with `marker` inside every special name, and at an end that could become part of
    /// one together with what the template puts beside it.
    pub fn mark(&self, text: &str, marker: char) -> String {
        let mut at: BTreeSet<usize> = BTreeSet::new();
        for found in self.every.find_overlapping_iter(text) {
            let first = text[found.start()..].chars().next().map_or(1, char::len_utf8);
            at.insert(found.start() + first);
        }
        if self.beginnings.iter().any(|half| text.ends_with(half)) {
            at.insert(text.len());
        }
        if self.ends.iter().any(|half| text.starts_with(half)) {
            at.insert(0);
        }
        let mut marked = String::with_capacity(text.len() + at.len() * marker.len_utf8());
        let mut from = 0;
        for cut in at {
            marked.push_str(&text[from..cut]);
            marked.push(marker);
            from = cut;
        }
        marked + &text[from..]
    }

    /// Cuts rendered text at the special tokens that the template wrote. Without a marker the whole
    /// text is the template's.
    pub fn segments<'a>(&self, rendered: &'a str, marker: Option<char>) -> Vec<Segment<'a>> {
        let mut segments = Vec::new();
        let text = |part: &'a str| {
            let text = match marker.filter(|marker| part.contains(*marker)) {
                Some(marker) => Cow::Owned(part.replace(marker, "")),
                None => Cow::Borrowed(part),
            };
            (!text.is_empty()).then_some(Segment::Text(text))
        };
        let mut from = 0;
        for found in self.longest.find_iter(rendered) {
            // The whitespace that the token before this one took may reach past its beginning.
            let start = found.start().max(from);
            let (id, token) = &self.tokens[found.pattern()];
            let before = &rendered[from..start];
            segments.extend(text(if token.lstrip { before.trim_end() } else { before }));
            segments.push(Segment::Special(*id));
            from = found.end();
            if token.rstrip {
                from = rendered.len() - rendered[from..].trim_start().len();
            }
        }
        segments.extend(text(&rendered[from..]));
        segments
    }
}

/// The private-use characters of a text.
pub fn private(text: &str) -> impl Iterator<Item = char> {
    // Those of the last planes begin with such a byte, and hardly any text has one.
    let text = if text.bytes().any(|byte| byte >= PRIVATE_FROM) { text } else { "" };
    text.chars().filter(|c| PRIVATE.contains(c))
}

/// A private-use character that neither the conversation contains nor the template, which contains
/// those in `used`.
pub fn choose(chat: &Chat, used: &[char]) -> Result<char, TextError> {
    let mut used: HashSet<char> = used.iter().copied().collect();
    let mut see = |text: &str| used.extend(private(text));
    for message in &chat.messages {
        see(&message.role);
        see(message.content.as_str());
        message.tool_calls.iter().chain(message.extra.values()).for_each(|v| visit(v, &mut see));
    }
    chat.tools.iter().chain(chat.args.values()).for_each(|value| visit(value, &mut see));
    PRIVATE.clone().find(|c| !used.contains(c)).ok_or_else(|| {
        TextError::Input("the conversation uses every private-use character".to_owned())
    })
}

fn visit(value: &Value, see: &mut impl FnMut(&str)) {
    match value {
        Value::String(text) => see(text),
        Value::Array(items) => items.iter().for_each(|item| visit(item, see)),
        Value::Object(map) => map.iter().for_each(|(key, item)| {
            see(key);
            visit(item, see);
        }),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Message;

    const MARK: char = '\u{F0000}';

    fn specials(names: &[&str]) -> Specials {
        let token = |(id, name): (usize, &&str)| (id as u32, AddedToken::from(*name, true));
        Specials::new(names.iter().enumerate().map(token).collect()).unwrap()
    }

    #[test]
    fn only_the_templates_own_names_are_special() {
        let s = specials(&["<|im_start|>", "<|im_end|>"]);
        for user in
            ["<|im_end|>", "a<|im_end|>b<|im_start|>", "<|im_<|im_end|>end|>", "<|im_e", "|>"]
        {
            let rendered = format!("<|im_start|>{}<|im_end|>", s.mark(user, MARK));
            let expected = [Segment::Special(0), Segment::Text(user.into()), Segment::Special(1)];
            assert_eq!(s.segments(&rendered, Some(MARK)), expected, "{user}");
        }
    }

    #[test]
    fn halves_of_a_name_in_neighbouring_fields_stay_text() {
        let s = specials(&["<|im_end|>"]);
        let rendered = s.mark("<|im_", MARK) + &s.mark("end|>", MARK);
        assert_eq!(s.segments(&rendered, Some(MARK)), [Segment::Text("<|im_end|>".into())]);
        let rendered = "<|im_".to_owned() + &s.mark("end|>", MARK);
        assert_eq!(s.segments(&rendered, Some(MARK)), [Segment::Text("<|im_end|>".into())]);
    }

    #[test]
    fn a_marker_that_the_user_wrote_is_not_taken() {
        let mut chat = Chat::default();
        chat.messages.push(Message::new("user", "\u{F0000}\u{F0001}"));
        chat.args.insert("x".into(), serde_json::json!([{"\u{F0002}": 1}]));
        assert_eq!(choose(&chat, &['\u{F0003}']).unwrap(), '\u{F0004}');
    }
}
