//! How the next token of a sequence is chosen, and the one check of it, whichever way it came.
//!
//! The bounds are those that OpenAI documents, where it does, and else what arithmetic can use.

use serde::{Deserialize, Serialize};

use crate::EngineError;

/// The most likeliest tokens that are reported beside a chosen one.
pub const LOGPROBS_MAX: u32 = 20;
const LOGIT_BIAS_MAX: usize = 1024;

/// The range of one number.
struct Limit {
    name: &'static str,
    least: f32,
    most: f32,
    words: &'static str,
}

impl Limit {
    const fn new(name: &'static str, (least, most): (f32, f32), words: &'static str) -> Self {
        Self { name, least, most, words }
    }

    /// NaN is in no range.
    fn check(&self, value: f32) -> Result<(), EngineError> {
        match (self.least..=self.most).contains(&value) {
            true => Ok(()),
            false => Err(outside(self.name, value, format!("in {}", self.words))),
        }
    }
}

/// Subnormal divisors would overflow what they divide.
const LIMITS: [Limit; 6] = [
    Limit::new("temperature", (0.0, 2.0), "[0, 2]"),
    Limit::new("top_p", (f32::MIN_POSITIVE, 1.0), "(0, 1]"),
    Limit::new("min_p", (0.0, 1.0), "[0, 1]"),
    Limit::new("repetition_penalty", (f32::MIN_POSITIVE, 100.0), "(0, 100]"),
    Limit::new("presence_penalty", (-2.0, 2.0), "[-2, 2]"),
    Limit::new("frequency_penalty", (-2.0, 2.0), "[-2, 2]"),
];
const LOGIT_BIAS: Limit = Limit::new("logit_bias", (-100.0, 100.0), "[-100, 100]");

/// How the next token of a sequence is chosen. [`Self::check`] tells whether it can be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus mass in (0, 1]; 1 is off.
    pub top_p: f32,
    /// The likeliest tokens kept; 0 is off.
    pub top_k: u32,
    /// Tokens below `min_p` times the likeliest one's probability are dropped; 0 is off.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or answer; 1 is
    /// off.
    pub repetition_penalty: f32,
    /// Subtracted once from the logit of every token seen in the answer.
    pub presence_penalty: f32,
    /// Subtracted from the logit of a token once for each time it was seen in the answer.
    pub frequency_penalty: f32,
    /// With the position, the only source of randomness.
    pub seed: u64,
    /// Added to logits before anything else, by token id.
    pub logit_bias: Vec<(u32, f32)>,
    /// Tokens that the beginning of the answer must not have.
    pub ban: Option<Box<Ban>>,
    /// `Some(k)`: report the chosen token's logprob and the `k` likeliest.
    pub logprobs: Option<u32>,
}

impl SamplingParams {
    /// A draw from the model's own distribution: every filter and penalty off, no logprobs.
    pub const NEUTRAL: Self = Self::plain(1.0);
    /// The likeliest token, every filter and penalty off, no logprobs.
    pub const GREEDY: Self = Self::plain(0.0);

    const fn plain(temperature: f32) -> Self {
        Self {
            temperature,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            logit_bias: Vec::new(),
            ban: None,
            logprobs: None,
        }
    }

    /// Whether everything lies in its range, and names only tokens of a vocabulary of `vocab`.
    ///
    /// # Errors
    /// `Parameter` and `Token`, for the first that does not.
    pub fn check(&self, vocab: usize) -> Result<(), EngineError> {
        LIMITS.iter().zip(self.numbers()).try_for_each(|(limit, value)| limit.check(value))?;
        check_count("logit_bias", self.logit_bias.len(), LOGIT_BIAS_MAX)?;
        for &(id, bias) in &self.logit_bias {
            check_ids("logit_bias", &[id], vocab)?;
            LOGIT_BIAS.check(bias)?;
        }
        match self.logprobs.filter(|&top| top > LOGPROBS_MAX) {
            Some(top) => Err(outside("logprobs", top, format!("in [0, {LOGPROBS_MAX}]"))),
            None => Ok(()),
        }
    }

    /// Brings what lies above its range to the end of it; what lies below, and NaN, becomes 0 where
    /// that is in the range, else neutral. For settings that nobody can be asked to correct. What
    /// was changed comes back: what [`Self::check`] would have said, and the value now.
    pub fn clamp(&mut self) -> Vec<(EngineError, f32)> {
        let (neutral, mut changed) = (Self::NEUTRAL.numbers(), Vec::new());
        for ((limit, value), neutral) in LIMITS.iter().zip(self.numbers_mut()).zip(neutral) {
            let Err(error) = limit.check(*value) else { continue };
            *value = match *value > limit.most {
                true => limit.most,
                false if limit.least == 0.0 => 0.0,
                false => neutral,
            };
            changed.push((error, *value));
        }
        changed
    }

    /// No mass at all still leaves the likeliest token, and only that.
    pub fn settle_top_p(&mut self) {
        if self.top_p == 0.0 {
            (self.top_p, self.top_k) = (1.0, 1);
        }
    }

    /// In the order of [`LIMITS`].
    fn numbers(&self) -> [f32; 6] {
        let Self { temperature, top_p, min_p, .. } = *self;
        let Self { repetition_penalty, presence_penalty, frequency_penalty, .. } = *self;
        [temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty]
    }

    fn numbers_mut(&mut self) -> [&mut f32; 6] {
        [
            &mut self.temperature,
            &mut self.top_p,
            &mut self.min_p,
            &mut self.repetition_penalty,
            &mut self.presence_penalty,
            &mut self.frequency_penalty,
        ]
    }

    /// Keeps `tokens` out of all positions below `before`.
    pub fn ban(&mut self, before: usize, tokens: impl IntoIterator<Item = u32>) {
        let banned = tokens.into_iter().map(|token| (token, BAN));
        let logit_bias = self.logit_bias.iter().copied().chain(banned).collect();
        self.ban = Some(Box::new(Ban { before, logit_bias }));
    }

    /// What is added to logits for the token at `position`.
    pub fn bias_at(&self, position: usize) -> &[(u32, f32)] {
        match &self.ban {
            Some(ban) if position < ban.before => &ban.logit_bias,
            _ => &self.logit_bias,
        }
    }
}

/// Far below any logit: nothing is left of the token's probability. Finite, and so far from the
/// largest number that no penalty makes it infinite.
const BAN: f32 = -1e30;

/// See [`SamplingParams::ban`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ban {
    /// Positions from here on are free.
    pub before: usize,
    /// In place of `SamplingParams::logit_bias`: that, and the ban.
    pub logit_bias: Vec<(u32, f32)>,
}

/// Whether the parameter `name` brings at most `max` token ids.
///
/// # Errors
/// `Parameter`.
pub fn check_count(name: &'static str, count: usize, max: usize) -> Result<(), EngineError> {
    match count <= max {
        true => Ok(()),
        false => Err(outside(name, count, format!("at most {max} token ids"))),
    }
}

/// Whether all `ids` of the parameter `name` are in a vocabulary of `vocab`.
///
/// # Errors
/// `Token`.
pub fn check_ids(name: &'static str, ids: &[u32], vocab: usize) -> Result<(), EngineError> {
    match ids.iter().find(|&&id| id as usize >= vocab) {
        Some(&id) => Err(EngineError::Token { name, id, vocab }),
        None => Ok(()),
    }
}

fn outside(name: &'static str, value: impl ToString, allowed: String) -> EngineError {
    EngineError::Parameter { name, value: value.to_string(), allowed }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOCAB: usize = 100;

    fn with(change: fn(&mut SamplingParams)) -> Result<(), String> {
        let mut params = SamplingParams::NEUTRAL;
        change(&mut params);
        params.check(VOCAB).map_err(|error| error.to_string())
    }

    #[test]
    fn every_parameter_is_refused_with_its_name_its_value_and_its_range() {
        type Change = fn(&mut SamplingParams);
        let table: &[(Change, &str)] = &[
            (|p| p.temperature = -0.1, "temperature must be in [0, 2], not -0.1"),
            (|p| p.temperature = 2.1, "temperature must be in [0, 2], not 2.1"),
            (|p| p.temperature = f32::NAN, "temperature must be in [0, 2], not NaN"),
            (|p| p.temperature = f32::INFINITY, "temperature must be in [0, 2], not inf"),
            (|p| p.top_p = 0.0, "top_p must be in (0, 1], not 0"),
            (|p| p.top_p = 1.5, "top_p must be in (0, 1], not 1.5"),
            (|p| p.min_p = -1.0, "min_p must be in [0, 1], not -1"),
            (|p| p.min_p = f32::NAN, "min_p must be in [0, 1], not NaN"),
            (|p| p.repetition_penalty = 0.0, "repetition_penalty must be in (0, 100], not 0"),
            (|p| p.repetition_penalty = 101.0, "repetition_penalty must be in (0, 100], not 101"),
            (|p| p.presence_penalty = 2.5, "presence_penalty must be in [-2, 2], not 2.5"),
            (
                |p| p.frequency_penalty = f32::NEG_INFINITY,
                "frequency_penalty must be in [-2, 2], not -inf",
            ),
            (|p| p.logprobs = Some(21), "logprobs must be in [0, 20], not 21"),
            (
                |p| p.logit_bias = vec![(100, 0.0)],
                "logit_bias: token id 100 does not exist; ids are below 100",
            ),
            (|p| p.logit_bias = vec![(1, 100.5)], "logit_bias must be in [-100, 100], not 100.5"),
            (
                |p| p.logit_bias = vec![(1, 0.0); 1025],
                "logit_bias must be at most 1024 token ids, not 1025",
            ),
        ];
        for (change, message) in table {
            assert_eq!(with(*change), Err((*message).to_owned()));
        }
    }

    #[test]
    fn what_is_out_of_range_is_brought_into_it_and_told() {
        let mut params = SamplingParams {
            temperature: 2.5,
            top_p: -0.5,
            min_p: f32::NAN,
            repetition_penalty: 0.0,
            frequency_penalty: f32::INFINITY,
            ..SamplingParams::NEUTRAL
        };
        let told: Vec<String> =
            params.clamp().iter().map(|(error, now)| format!("{error}: {now}")).collect();
        let wanted = [
            "temperature must be in [0, 2], not 2.5: 2",
            "top_p must be in (0, 1], not -0.5: 1",
            "min_p must be in [0, 1], not NaN: 0",
            "repetition_penalty must be in (0, 100], not 0: 1",
            "frequency_penalty must be in [-2, 2], not inf: 2",
        ];
        assert_eq!(told, wanted);
        assert_eq!(params.check(0), Ok(()));
        assert!(params.clamp().is_empty());
    }

    #[test]
    fn bounds_themselves_are_accepted() {
        assert_eq!(SamplingParams::GREEDY.check(0), Ok(()));
        let most = with(|p| {
            (p.temperature, p.top_p, p.min_p) = (2.0, 1.0, 1.0);
            (p.presence_penalty, p.frequency_penalty) = (-2.0, 2.0);
            (p.repetition_penalty, p.logprobs) = (100.0, Some(20));
            p.logit_bias = vec![(99, -100.0); 1024];
            p.ban(4, [7]);
        });
        assert_eq!(most, Ok(()));
    }
}
