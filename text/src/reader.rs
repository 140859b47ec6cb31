//! The text of one answer, out of its tokens: decoded, watched for stop strings, cut where one ends
//! it.
//!
//! Text that may be the beginning of a stop string, or half a character, is held back together with
//! its tokens. Tokens whose text begins after the cut are not handed out.

use std::collections::VecDeque;

use engine::{EngineError, check_count, check_ids};

use crate::{Detokenizer, stop::StopStrings};

const STOPS_MAX: usize = 64;
const STOP_BYTES_MAX: usize = 1024;
const STOP_IDS_MAX: usize = 256;

/// What ends the text beside the stop ids that whoever samples looks for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stops {
    pub strings: Vec<String>,
    /// Special tokens that stop strings name: they leave no text in which the name could be found,
    /// so whoever samples stops at their ids.
    pub named: Vec<(u32, String)>,
    /// The stop string is part of the text.
    pub keep: bool,
    /// The text of so many tokens is not searched.
    pub min_tokens: u32,
}

impl Stops {
    /// Stop strings alone. `special` knows the ids of special tokens by their names.
    pub fn new(strings: Vec<String>, special: impl Fn(&str) -> Option<u32>) -> Self {
        let named = strings.iter().filter_map(|text| Some((special(text)?, text.clone())));
        let named = named.collect();
        Self { strings, named, ..Self::default() }
    }

    /// Whether so many stop strings as these, and ids of a vocabulary of `vocab`, may end an
    /// answer, whichever way they came.
    ///
    /// # Errors
    /// `Parameter` and `Token`, of `stop` or `stop_token_ids`.
    pub fn check(strings: &[String], ids: &[u32], vocab: usize) -> Result<(), EngineError> {
        let refuse = |value: String, allowed: String| {
            Err(EngineError::Parameter { name: "stop", value, allowed })
        };
        if strings.len() > STOPS_MAX {
            return refuse(strings.len().to_string(), format!("at most {STOPS_MAX} strings"));
        }
        let sound = |stop: &&String| (1..=STOP_BYTES_MAX).contains(&stop.len());
        if let Some(stop) = strings.iter().find(|stop| !sound(stop)) {
            let value = format!("{} bytes", stop.len());
            return refuse(value, format!("in 1 to {STOP_BYTES_MAX} bytes each"));
        }
        check_count("stop_token_ids", ids.len(), STOP_IDS_MAX)?;
        check_ids("stop_token_ids", ids, vocab)
    }
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop id or a stop string.
    Stop,
    /// As many tokens as were asked for, or as fit.
    Length,
}

impl FinishReason {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// A token and where its text begins.
#[derive(Clone, Debug, PartialEq)]
pub struct Token<T> {
    pub info: T,
    /// In characters from the beginning of the text.
    pub offset: usize,
    /// The stop id that ended the answer: it has no text.
    pub end: bool,
}

/// Text that is certain, and its tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece<T> {
    pub text: String,
    pub tokens: Vec<Token<T>>,
}

impl<T> Default for Piece<T> {
    fn default() -> Self {
        Self { text: String::new(), tokens: Vec::new() }
    }
}

/// Reads one answer; `T` is what a caller knows of a token beside its id.
pub struct Reader<T> {
    detokenizer: Detokenizer,
    strings: StopStrings,
    stops: Stops,
    /// Tokens so far.
    read: u32,
    /// Tokens whose text is held back.
    pending: VecDeque<Token<T>>,
    /// Characters decoded, and of those the ones handed out.
    decoded: usize,
    emitted: usize,
}

impl<T> Reader<T> {
    pub fn new(detokenizer: Detokenizer, mut stops: Stops) -> Self {
        let strings = StopStrings::new(std::mem::take(&mut stops.strings)).keeping(stops.keep);
        let (read, pending, decoded, emitted) = (0, VecDeque::new(), 0, 0);
        Self { detokenizer, strings, stops, read, pending, decoded, emitted }
    }

    /// The text goes on after `chars` characters that came otherwise, e.g. the prompt's echo.
    pub fn begin_at(&mut self, chars: usize) {
        (self.decoded, self.emitted) = (chars, chars);
    }

    /// Takes the next token. True where a stop string is complete: nothing may follow.
    pub fn push(&mut self, id: u32, info: T, piece: &mut Piece<T>) -> bool {
        self.read = self.read.saturating_add(1);
        let text = self.detokenizer.push(id);
        self.pending.push_back(Token { info, offset: self.decoded, end: false });
        if self.push_text(&text, piece) {
            self.cut(piece);
            return true;
        }
        let all = self.decoded == self.emitted && !self.detokenizer.holds();
        let out = |token: &mut Token<T>| all || token.offset < self.emitted;
        while let Some(token) = self.pending.pop_front_if(out) {
            piece.tokens.push(token);
        }
        false
    }

    /// The answer ended, with `end` where a stop id did it. What was held back is text after all,
    /// unless half a character at the end completes a stop string: then true.
    pub fn finish(&mut self, end: Option<(u32, T)>, piece: &mut Piece<T>) -> bool {
        self.read = self.read.saturating_add(u32::from(end.is_some()));
        let tail = self.detokenizer.finish();
        if self.push_text(&tail, piece) {
            self.cut(piece);
            return true;
        }
        piece.text += &self.strings.flush();
        piece.tokens.extend(self.pending.drain(..));
        if let Some((id, info)) = end {
            let named = self.stops.named.iter().find(|(named, _)| *named == id);
            if let Some((_, name)) = named.filter(|_| self.stops.keep) {
                piece.text += name;
            }
            piece.tokens.push(Token { info, offset: self.decoded, end: true });
        }
        false
    }

    /// Hands text on; true when a stop string is complete.
    fn push_text(&mut self, text: &str, piece: &mut Piece<T>) -> bool {
        self.decoded += text.chars().count();
        if self.read <= self.stops.min_tokens {
            self.emitted += text.chars().count();
            piece.text += text;
            return false;
        }
        let step = self.strings.push(text);
        self.emitted += step.emit.chars().count();
        piece.text += &step.emit;
        step.stopped
    }

    /// What begins after the cut is not shown.
    fn cut(&mut self, piece: &mut Piece<T>) {
        self.pending.retain(|token| token.offset < self.emitted);
        piece.tokens.extend(self.pending.drain(..));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pieces::Pieces;
    use std::sync::Arc;

    /// Ids: 0 "ab", 1 "c", 2 and 3 the halves of "é", 4 special.
    const PIECES: [&[u8]; 5] = [b"ab", b"c", b"\xc3", b"\xa9", b"<end>"];

    fn reader(stops: &Stops) -> Reader<u32> {
        let decoder =
            Detokenizer::new(Arc::new(Pieces::of(&PIECES, vec![false, false, false, false, true])));
        Reader::new(decoder, stops.clone())
    }

    fn stop(strings: &[&str]) -> Stops {
        let strings = strings.iter().map(|text| (*text).to_owned()).collect();
        Stops { strings, ..Stops::default() }
    }

    /// Each token's text and the ids that came with it; the last line is the finish, or what the
    /// stop string left.
    fn read(stops: &Stops, ids: &[u32], end: Option<u32>) -> Vec<String> {
        let mut reader = reader(stops);
        let line = |piece: &Piece<u32>| {
            let token = |t: &Token<u32>| {
                let end = if t.end { "!" } else { "" };
                format!(" {}@{}{end}", t.info, t.offset)
            };
            let tokens: String = piece.tokens.iter().map(token).collect();
            format!("{}{tokens}", piece.text)
        };
        let mut lines = Vec::new();
        for &id in ids {
            let mut piece = Piece::default();
            let stopped = reader.push(id, id, &mut piece);
            lines.push(line(&piece));
            if stopped {
                return lines;
            }
        }
        let mut piece = Piece::default();
        reader.finish(end.map(|id| (id, id)), &mut piece);
        lines.push(line(&piece));
        lines
    }

    #[test]
    fn tokens_wait_for_their_text() {
        assert_eq!(read(&stop(&[]), &[0, 2, 3, 1], None), ["ab 0@0", "", "é 2@2 3@2", "c 1@3", ""]);
        assert_eq!(read(&stop(&[]), &[0, 2], None), ["ab 0@0", "", "\u{FFFD} 2@2"]);
        assert_eq!(read(&stop(&[]), &[4, 1, 4], None), [" 4@0", "c 1@0", " 4@1", ""]);
        assert_eq!(read(&stop(&["bcd"]), &[0, 1, 1], None), ["a 0@0", "", "bcc 1@2 1@3", ""]);
        assert_eq!(read(&stop(&["bcd"]), &[0, 1], None), ["a 0@0", "", "bc 1@2"]);
    }

    #[test]
    fn what_begins_after_the_cut_is_not_shown() {
        assert_eq!(read(&stop(&["bc"]), &[0, 1, 0], None), ["a 0@0", ""]);
        let keep = Stops { keep: true, ..stop(&["bc"]) };
        assert_eq!(read(&keep, &[0, 1, 0], None), ["a 0@0", "bc 1@2"]);
        // Half a character becomes one that a stop string names.
        assert_eq!(read(&stop(&["\u{FFFD}"]), &[1, 2], None), ["c 1@0", "", ""]);
    }

    #[test]
    fn the_stop_id_has_no_text_but_the_name_that_is_kept() {
        let named = Stops { named: vec![(4, "<end>".into())], ..stop(&["<end>"]) };
        assert_eq!(read(&named, &[1], Some(4)), ["c 1@0", " 4@1!"]);
        let keep = Stops { keep: true, ..named };
        assert_eq!(read(&keep, &[1], Some(4)), ["c 1@0", "<end> 4@1!"]);
    }

    #[test]
    fn the_first_tokens_are_not_searched() {
        let late = Stops { min_tokens: 2, ..stop(&["c"]) };
        assert_eq!(read(&late, &[1, 1, 1], None), ["c 1@0", "c 1@1", ""]);
        // One that only the end completes counts the stop id in.
        let late = Stops { min_tokens: 2, ..stop(&["\u{FFFD}"]) };
        assert_eq!(read(&late, &[1, 2], None), ["c 1@0", "", "\u{FFFD} 2@1"]);
        assert_eq!(read(&late, &[1, 2], Some(4)), ["c 1@0", "", ""]);
    }

    #[test]
    fn offsets_go_on_after_an_echo() {
        let mut reader = reader(&stop(&[]));
        reader.begin_at(7);
        let mut piece = Piece::default();
        assert!(!reader.push(0, 0, &mut piece));
        assert_eq!((piece.text.as_str(), piece.tokens[0].offset), ("ab", 7));
    }
}
