//! What is asked of a device that chooses tokens itself, and what it answers.
//!
//! Numbers mean what they do for a sampler on the host; nothing here knows what a sequence is.

/// The most tokens that a row may have reported beside the chosen one.
pub const TOP_MAX: usize = 20;

/// One row.
#[derive(Clone, Copy, Debug)]
pub struct SampleRequest<'a> {
    pub wanted: Wanted<'a>,
    /// `Some(n)`: report the token's logprob and the `n` likeliest tokens, of the unmodified
    /// logits.
    pub logprobs: Option<usize>,
}

/// Which token a row is about.
#[derive(Clone, Copy, Debug)]
pub enum Wanted<'a> {
    /// The one that follows.
    Next(NextToken<'a>),
    /// This one: only its logprob is wanted.
    Token(u32),
}

/// How the next token is chosen. Numbers mean what they do for the host sampler.
#[derive(Clone, Copy, Debug)]
pub struct NextToken<'a> {
    /// 0 is greedy.
    pub temperature: f32,
    /// In (0, 1]; 1 is off.
    pub top_p: f32,
    /// 0 is off.
    pub top_k: u32,
    /// In [0, 1]; 0 is off.
    pub min_p: f32,
    /// 1 is off.
    pub repetition_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    pub seed: u64,
    /// Of the new token in its sequence: with the seed, all that a draw depends on.
    pub position: u64,
    /// Added to logits before anything else, by token id; one id may come more than once.
    pub logit_bias: &'a [(u32, f32)],
    /// What penalties look at: strictly ascending ids, and how often the answer holds each; 0 where
    /// only the prompt does. Empty without penalties. Ids past the vocabulary are ignored.
    pub seen: &'a [(u32, u32)],
    /// ⌈V / 32⌉ words: id i may be drawn where bit i % 32 of word i / 32 is set.
    pub allowed: Option<&'a [u32]>,
}

impl NextToken<'_> {
    /// The likeliest token, every filter and penalty off.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        seed: 0,
        position: 0,
        logit_bias: &[],
        seen: &[],
        allowed: None,
    };

    /// The first parameter that is out of range. Parameters arrive validated; one that did not must
    /// not reach the arithmetic.
    pub fn bad_parameter(&self) -> Option<Refused> {
        let at_least_0 = self.temperature.is_finite() && self.temperature >= 0.0;
        let repetition = self.repetition_penalty;
        let rules: [(&'static str, f32, bool); 6] = [
            ("temperature", self.temperature, at_least_0),
            ("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0),
            ("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p)),
            ("repetition_penalty", repetition, repetition.is_finite() && repetition > 0.0),
            ("presence_penalty", self.presence_penalty, self.presence_penalty.is_finite()),
            ("frequency_penalty", self.frequency_penalty, self.frequency_penalty.is_finite()),
        ];
        let broken = rules.iter().find(|rule| !rule.2);
        broken.map(|&(name, value, _)| Refused::Parameter { name, value })
    }
}

/// A row's answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    pub token: u32,
    /// `None` where none was asked for.
    pub logprob: Option<f32>,
    /// The likeliest tokens, best first, ties by the lower id.
    pub top: Vec<(u32, f32)>,
}

/// Why a row has no answer.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum Refused {
    #[error("the model's logits are not finite")]
    NotFinite,
    #[error("the logits with bias and penalties are not finite")]
    Adjusted,
    #[error("the mask allows no token")]
    NothingAllowed,
    #[error("logit_bias names token {token}, the vocabulary ends at {vocab}")]
    Bias { token: u32, vocab: usize },
    #[error("sampling parameter {name} cannot be {value}")]
    Parameter { name: &'static str, value: f32 },
    #[error("token {token} has no logit, the vocabulary ends at {vocab}")]
    Token { token: u32, vocab: usize },
}

impl SampleRequest<'_> {
    /// Why the row cannot be served whatever its logits are.
    pub fn refused(&self, vocab: usize) -> Option<Refused> {
        let outside = |token: u32| token as usize >= vocab;
        match self.wanted {
            Wanted::Token(token) => outside(token).then_some(Refused::Token { token, vocab }),
            Wanted::Next(next) => next.bad_parameter().or_else(|| {
                let bad = next.logit_bias.iter().find(|(token, _)| outside(*token));
                bad.map(|&(token, _)| Refused::Bias { token, vocab })
            }),
        }
    }
}
