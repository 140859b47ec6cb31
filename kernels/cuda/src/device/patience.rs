//! How a thread waits for the device: neither late by a sleep nor burning a core through a long
//! step.
//!
//! Steps of one shape launch as many kernels and take about as long, so what the last such wait
//! took foretells this one: the thread sleeps until shortly before, then asks again and again. A
//! sleep ends some 50 to 100 µs late, which is why none begins near the expected end.

use std::{collections::HashMap, time::Duration};

/// Asking again and again goes on for this long past the expected end, then sleeps come between.
const SPIN: Duration = Duration::from_millis(2);
/// A sleep ends this much before the expected end, and a sixteenth of the whole wait: steps vary.
const EARLY: Duration = Duration::from_micros(200);
const POLL: Duration = Duration::from_micros(50);
/// Shorter waits are not worth a sleep.
const SHORT: Duration = Duration::from_micros(500);
/// Shapes of steps that are remembered.
const KNOWN_MAX: usize = 1024;

/// What waits have taken so far, by the number of kernels between what was waited for before and
/// what is now.
#[derive(Default)]
pub(super) struct Patience {
    took: HashMap<u32, Duration>,
}

/// What to do after a look that found the device busy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Yield,
    Sleep(Duration),
}

impl Patience {
    /// How long a wait behind so many kernels takes, as far as is known.
    pub fn expected(&self, kernels: u32) -> Duration {
        self.took.get(&kernels).copied().unwrap_or_default()
    }

    pub fn learn(&mut self, kernels: u32, took: Duration) {
        if self.took.len() == KNOWN_MAX && !self.took.contains_key(&kernels) {
            self.took.clear();
        }
        self.took.insert(kernels, took);
    }
}

/// What to do at this point of a wait that is expected to take so long.
pub(super) fn next(waited: Duration, expected: Duration) -> Next {
    let awake = expected.saturating_sub(EARLY + expected / 16);
    if expected > SHORT && waited < awake {
        return Next::Sleep(awake - waited);
    }
    if waited < expected + SPIN { Next::Yield } else { Next::Sleep(POLL) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_wait_sleeps_until_shortly_before_its_expected_end_then_looks_all_the_time() {
        assert_eq!(next(Duration::ZERO, 16 * MS), Next::Sleep(15 * MS - EARLY));
        assert_eq!(next(15 * MS, 16 * MS), Next::Yield);
        assert_eq!(next(17 * MS, 16 * MS), Next::Yield);
        assert_eq!(next(19 * MS, 16 * MS), Next::Sleep(POLL));
    }

    #[test]
    fn a_wait_of_which_nothing_is_known_looks_at_first_and_sleeps_between_later() {
        assert_eq!(next(Duration::ZERO, Duration::ZERO), Next::Yield);
        assert_eq!(next(3 * MS, Duration::ZERO), Next::Sleep(POLL));
        assert_eq!(next(Duration::ZERO, SHORT), Next::Yield);
    }

    #[test]
    fn waits_are_told_apart_by_what_was_launched() {
        let mut patience = Patience::default();
        patience.learn(800, 20 * MS);
        patience.learn(3, MS);
        assert_eq!((patience.expected(800), patience.expected(3)), (20 * MS, MS));
        assert_eq!(patience.expected(4), Duration::ZERO);
        (0..5000).for_each(|kernels| patience.learn(kernels, MS));
        assert!(patience.took.len() <= KNOWN_MAX);
    }
}
