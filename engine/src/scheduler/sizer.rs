//! How many prompt tokens a step may have, so that it takes about as long as wanted.
//!
//! The speed is learned from the steps themselves: the caller measures them. What a
//! token costs grows with the tokens before it, so steps are counted in units: one for a token's
//! matrix products, and one more for every `ATTENTION_KEYS` keys that it looks at. An estimate that
//! is wrong for one context corrects itself within a few steps of it.

use std::time::Duration;

use crate::plan::BLOCK_TOKENS;

/// Prompt tokens that a step may always have, or a slow machine would never get on.
const TOKENS_MIN: usize = BLOCK_TOKENS / 2;
/// Prompt tokens of the first step, before anything is known.
const TOKENS_FIRST: usize = BLOCK_TOKENS;
/// Keys whose attention costs about as much as the matrix products of one token: 1,000 in a model
/// of 135 M parameters, 3,000 at 0.5 B, 9,000 at 8 B.
const ATTENTION_KEYS: f64 = 4096.0;
/// How much longer a step may be in which nobody waits for a token.
const ALONE: f64 = 3.0;
/// How much one step may change the estimate: a machine that stood still for a moment is not slow.
const CHANGE_MAX: f64 = 4.0;

/// What one token costs after `start` others.
fn weight(start: usize) -> f64 {
    1.0 + start as f64 / ATTENTION_KEYS
}

/// What `len` tokens cost after `start` others, in units.
pub(super) fn units(start: usize, len: usize) -> f64 {
    len as f64 * weight(start)
}

/// What is left of one step for prompts.
pub(super) struct Room {
    tokens: usize,
    units: f64,
    /// Tokens that may be had whatever they cost.
    tokens_min: usize,
}

impl Room {
    /// The most tokens of a prompt that go on after `start`: whole blocks where time is the bound
    /// and there are many.
    pub fn tokens_at(&self, start: usize) -> usize {
        let timed = (self.units / weight(start)) as usize;
        let odd = if timed < 8 * BLOCK_TOKENS { 0 } else { timed % BLOCK_TOKENS };
        (timed - odd).max(self.tokens_min).min(self.tokens)
    }

    pub fn spend(&mut self, start: usize, len: usize) {
        self.tokens = self.tokens.saturating_sub(len);
        self.tokens_min = self.tokens_min.saturating_sub(len);
        self.units = (self.units - units(start, len)).max(0.0);
    }

    /// Takes half of it away.
    pub fn split(&mut self) -> Self {
        let Self { tokens, units, tokens_min } = *self;
        let half = Self { tokens: tokens / 2, units: units / 2.0, tokens_min: tokens_min / 2 };
        self.tokens -= half.tokens;
        self.units -= if units.is_finite() { half.units } else { 0.0 };
        self.tokens_min -= half.tokens_min;
        half
    }

    /// Puts back what is left of a half.
    pub fn join(&mut self, half: Self) {
        self.tokens += half.tokens;
        self.units += half.units;
        self.tokens_min += half.tokens_min;
    }

    /// Nothing more fits.
    pub fn close(&mut self) {
        (self.tokens, self.units, self.tokens_min) = (0, 0.0, 0);
    }
}

/// The estimate of one engine.
pub(super) struct StepSizer {
    /// Seconds that a step should take; `None` sizes steps by tokens alone.
    target: Option<f64>,
    seconds_per_unit: Option<f64>,
    /// Units that the step sized last can have, and the seconds that it should take.
    planned: (f64, f64),
}

impl StepSizer {
    pub fn new(target: Option<Duration>) -> Self {
        let target = target.map(|target| target.as_secs_f64());
        Self { target, seconds_per_unit: None, planned: (0.0, 0.0) }
    }

    /// The room of a step that has `tokens` left. `alone`: nobody waits for a token of another
    /// sequence meanwhile.
    pub fn room(&mut self, tokens: usize, alone: bool) -> Room {
        let Some(target) = self.target else {
            return Room { tokens, units: f64::INFINITY, tokens_min: 0 };
        };
        let target = if alone { ALONE * target } else { target };
        let units = match self.seconds_per_unit {
            Some(seconds) => target / seconds,
            None => TOKENS_FIRST as f64,
        };
        self.planned = (units, target);
        Room { tokens, units, tokens_min: TOKENS_MIN }
    }

    /// Units that the step sized last can have, and the seconds that it should take.
    pub fn planned(&self) -> (f64, f64) {
        self.planned
    }

    /// A step had prompt tokens of `units` and took `seconds`, everything in it included; `planned`
    /// is what it could have had.
    pub fn learn(&mut self, units: f64, seconds: f64, planned: (f64, f64)) {
        if self.target.is_none() || units <= 0.0 || !seconds.is_finite() || seconds <= 0.0 {
            return;
        }
        let measured = seconds / units;
        let Some(known) = self.seconds_per_unit else {
            self.seconds_per_unit = Some(measured);
            return;
        };
        // What a step costs besides its prompts weighs on few tokens more than on many: a small
        // step that was quick enough is no sign that large ones are slow.
        let (room, target) = planned;
        let telling = units >= room / 2.0 || seconds >= target;
        self.seconds_per_unit = Some(if measured < known / 2.0 {
            measured.max(known / CHANGE_MAX)
        } else if measured <= known || telling {
            (known + measured.min(known * CHANGE_MAX)) / 2.0
        } else {
            known
        });
    }
}
