//! Going on with a stream whose router is gone, on another router.
//!
//! Nothing is kept for it: a client that sends `Idempotency-Key` gets events with ids. Whoever
//! sends the same request with the same key, and the last id it got as `Last-Event-ID`, gets what
//! comes after: the answer is computed again, which gives the same tokens wherever it runs, since a
//! key stands for the seed of a request that names none.

use crate::RouterError;
use http::{HeaderMap, HeaderName};
use std::{fmt, str::FromStr};

const KEY: HeaderName = HeaderName::from_static("idempotency-key");
const LAST: HeaderName = HeaderName::from_static("last-event-id");
/// As much as the draft of the header's specification asks servers to take.
const KEY_BYTES_MAX: usize = 255;
/// Each event names the place in every choice.
const CHOICES_MAX: usize = 64;
/// Digits of a fingerprint in an id.
const VERSION_DIGITS: usize = 12;

/// What a client wants to be able to go on with, or goes on with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Resume {
    /// Draws follow from it where the request names no seed.
    pub seed: u64,
    /// What the client has.
    pub last: Option<Cursor>,
}

/// How far a client has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cursor {
    /// The beginning of the fingerprint of what answers.
    version: String,
    choices: Vec<Place>,
}

/// How far one choice has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    /// Tokens that the text so far comes from.
    pub tokens: u32,
    pub ended: bool,
}

impl Resume {
    /// `None` without a key. Errors: `Invalid`.
    pub fn from_http(headers: &HeaderMap) -> Result<Option<Self>, RouterError> {
        let text = |name: HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or(""));
        let Some(key) = text(KEY) else {
            return match text(LAST) {
                None => Ok(None),
                Some(_) => Err(RouterError::invalid(
                    LAST.as_str(),
                    "last-event-id goes with the idempotency-key that the stream began with",
                )),
            };
        };
        if key.is_empty() || key.len() > KEY_BYTES_MAX {
            let wrong = format!("idempotency-key takes 1 to {KEY_BYTES_MAX} ASCII characters");
            return Err(RouterError::invalid(KEY.as_str(), wrong));
        }
        let last = match text(LAST) {
            None => None,
            Some(id) => Some(id.parse().map_err(|()| {
                let wrong = format!("last-event-id is no id of an event of this API: {id:?}");
                RouterError::invalid(LAST.as_str(), wrong)
            })?),
        };
        Ok(Some(Self { seed: hash(key), last }))
    }

    /// Whether the request can be gone on with, `last` being of it. Errors: `Invalid`.
    pub fn check(&self, fingerprint: &str, choices: usize, echo: bool) -> Result<(), RouterError> {
        let invalid = |what: &str| Err(RouterError::invalid(KEY.as_str(), what));
        if choices > CHOICES_MAX {
            return invalid("idempotency-key goes with at most 64 choices");
        }
        if echo {
            return invalid("idempotency-key does not go with echo");
        }
        let Some(last) = &self.last else { return Ok(()) };
        if last.choices.len() != choices {
            return invalid("last-event-id is of a request with another number of choices");
        }
        if last.version != version(fingerprint) {
            return invalid(
                "the stream began with another version of the model, which this router no longer \
                 prefers; send the request anew without last-event-id",
            );
        }
        Ok(())
    }
}

impl Cursor {
    /// The beginning of an answer.
    pub fn new(fingerprint: &str, choices: usize) -> Self {
        Self { version: version(fingerprint).to_owned(), choices: vec![Place::default(); choices] }
    }

    pub fn place(&self, choice: usize) -> Place {
        self.choices.get(choice).copied().unwrap_or_default()
    }

    pub fn advance(&mut self, choice: usize, tokens: u32, ended: bool) {
        if let Some(place) = self.choices.get_mut(choice) {
            place.tokens = place.tokens.saturating_add(tokens);
            place.ended |= ended;
        }
    }
}

/// VERSION-TOKENS,TOKENS,…: tokens of each choice, with an `e` behind those of one that has ended.
impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-", self.version)?;
        for (at, place) in self.choices.iter().enumerate() {
            let (comma, end) = (if at > 0 { "," } else { "" }, if place.ended { "e" } else { "" });
            write!(f, "{comma}{}{end}", place.tokens)?;
        }
        Ok(())
    }
}

impl FromStr for Cursor {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (version, choices) = text.rsplit_once('-').ok_or(())?;
        let place = |text: &str| {
            let (tokens, ended) = text.strip_suffix('e').map_or((text, false), |t| (t, true));
            Ok(Place { tokens: tokens.parse().map_err(|_| ())?, ended })
        };
        let choices: Vec<Place> =
            choices.split(',').take(CHOICES_MAX + 1).map(place).collect::<Result<_, ()>>()?;
        Ok(Self { version: version.to_owned(), choices })
    }
}

fn version(fingerprint: &str) -> &str {
    fingerprint.get(..VERSION_DIGITS).unwrap_or(fingerprint)
}

/// FNV-1a: the same on every router, of whatever build.
fn hash(key: &str) -> u64 {
    let step = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    key.bytes().fold(0xcbf2_9ce4_8422_2325, step)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn ids_read_as_they_are_written() {
        let mut cursor = Cursor::new("mock-0123456789abcdef", 3);
        cursor.advance(0, 2, false);
        cursor.advance(0, 3, true);
        cursor.advance(2, 1, false);
        assert_eq!(cursor.to_string(), "mock-0123456-5e,0,1");
        assert_eq!(cursor.to_string().parse(), Ok(cursor));
        for wrong in ["", "-", "5", "f-", "f-1,", "f-e", "f--1e5", "f-99999999999"] {
            assert_eq!(wrong.parse::<Cursor>(), Err(()), "{wrong}");
        }
    }

    #[test]
    fn a_key_stands_for_a_seed_and_an_id_needs_a_key() {
        let headers = |key: Option<&'static str>, last: Option<&'static str>| {
            let pairs = [(KEY, key), (LAST, last)].into_iter();
            let pairs = pairs.filter_map(|(name, value)| Some((name, value?)));
            Resume::from_http(&pairs.map(|(n, v)| (n, HeaderValue::from_static(v))).collect())
        };
        assert_eq!(headers(None, None).unwrap(), None);
        let seed = |key| headers(Some(key), None).unwrap().unwrap().seed;
        assert_eq!(seed("a"), 0xaf63_dc4c_8601_ec8c, "as published for FNV-1a");
        assert_ne!(seed("a"), seed("b"));
        for (key, last) in [(Some(""), None), (None, Some("f-1")), (Some("k"), Some("7"))] {
            assert!(headers(key, last).is_err(), "{key:?} {last:?}");
        }
        let resume = headers(Some("k"), Some("f-1,2e")).unwrap().unwrap();
        assert!(resume.check("f", 2, false).is_ok());
        for (fingerprint, choices, echo) in [("g", 2, false), ("f", 1, false), ("f", 2, true)] {
            assert!(resume.check(fingerprint, choices, echo).is_err());
        }
    }
}
