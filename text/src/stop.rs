//! Stop strings in streamed text.
//!
//! A stream stops at the first stop string that is complete, wherever tokens end: cutting the text
//! into other pieces never changes what is emitted in total. Of several that end at the same place
//! the longest counts. Text is held back only while it may be the beginning of a stop string.

/// What one piece of text leads to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopStep {
    /// Text that is certainly part of the answer.
    pub emit: String,
    /// A stop string was found; nothing follows.
    pub stopped: bool,
}

/// Watches one stream for its stop strings.
#[derive(Clone, Debug)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
    stopped: bool,
    /// The match is part of the text.
    keeps: bool,
}

impl StopStrings {
    /// Empty strings are ignored: they would stop everything.
    pub fn new(mut stops: Vec<String>) -> Self {
        stops.retain(|stop| !stop.is_empty());
        Self { stops, held: String::new(), stopped: false, keeps: false }
    }

    /// With `keeps`, the stop string that matched is emitted as well.
    pub fn keeping(mut self, keeps: bool) -> Self {
        self.keeps = keeps;
        self
    }

    /// Takes the next piece of the stream.
    pub fn push(&mut self, text: &str) -> StopStep {
        if self.stopped {
            return StopStep { emit: String::new(), stopped: true };
        }
        self.held.push_str(text);
        if let Some((end, start)) = self.first_match() {
            self.held.truncate(if self.keeps { end } else { start });
            self.stopped = true;
            return StopStep { emit: std::mem::take(&mut self.held), stopped: true };
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        StopStep { emit: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// The stream ended: what was held back is text after all.
    pub fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Where the first complete stop string ends and begins.
    fn first_match(&self) -> Option<(usize, usize)> {
        let found = self.stops.iter().filter_map(|stop| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start))
        });
        found.min()
    }
}

/// Bytes at the end of `text` that are a proper beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = (stop.len() - 1).min(text.len());
    let fits = |&len: &usize| {
        stop.is_char_boundary(len) && text.as_bytes().ends_with(&stop.as_bytes()[..len])
    };
    (1..=longest).rev().find(fits).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut watch = StopStrings::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let mut out = String::new();
        for piece in pieces {
            let step = watch.push(piece);
            out += &step.emit;
            if step.stopped {
                return (out, true);
            }
        }
        out += &watch.flush();
        (out, false)
    }

    #[test]
    fn a_stop_string_across_pieces_is_found_and_not_emitted() {
        assert_eq!(stream(&["</end>"], &["hello <", "/en", "d> more"]), ("hello ".into(), true));
        assert_eq!(stream(&["</end>"], &["hello <", "/em"]), ("hello </em".into(), false));
        assert_eq!(stream(&["ab", "b"], &["xa", "b"]), ("x".into(), true));
        assert_eq!(stream(&[""], &["x"]), ("x".into(), false));
        assert_eq!(stream(&["abcd", "bc"], &["abcd"]), ("a".into(), true));
    }

    #[test]
    fn the_match_is_kept_where_it_is_wanted() {
        let mut watch = StopStrings::new(vec!["</end>".into(), "end".into()]).keeping(true);
        assert_eq!(watch.push("hello </e").emit, "hello ");
        let step = watch.push("nd> more");
        assert_eq!((step.emit.as_str(), step.stopped), ("</end", true));
    }

    #[test]
    fn only_what_may_begin_a_stop_string_is_held_back() {
        let mut watch = StopStrings::new(vec!["aab".into(), "é!".into()]);
        assert_eq!(watch.push("xaaa").emit, "xa");
        assert_eq!(watch.push("cé").emit, "aac");
        assert_eq!(watch.push("é").emit, "é");
        assert_eq!(watch.push("!").emit, "");
        assert!(watch.push("anything").stopped);
    }

    /// Character by character: stop as soon as the text so far ends with a stop string.
    fn naive(stops: &[&str], text: &str) -> (String, bool) {
        let ends = text.char_indices().map(|(at, c)| at + c.len_utf8());
        for end in ends {
            let found = stops.iter().filter(|s| text[..end].ends_with(**s)).map(|s| s.len()).max();
            if let Some(len) = found {
                return (text[..end - len].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    #[test]
    fn any_cut_of_any_text_stops_where_the_naive_search_does() {
        let mut random = crate::tests::Random::new(7);
        for _ in 0..20_000 {
            let mut word = |max: u64| -> String {
                let len = 1 + random.below(max);
                (0..len).map(|_| ['a', 'b', 'é', '漢'][random.below(4) as usize]).collect()
            };
            let stops = [word(4), word(4), word(2)];
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let pieces: Vec<String> = (0..6).map(|_| word(4)).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            assert_eq!(stream(&stops, &pieces), naive(&stops, &pieces.concat()), "{stops:?}");
        }
    }
}
