//! How often a group is formed anew before it is given up: what breaks it again and again is not
//! mended by that, and whoever watches the process should know.

use std::{
    collections::VecDeque,
    thread,
    time::{Duration, Instant},
};

use engine::plan::ExecutorError;

/// So often at most within the period; then the worker ends.
const RESTARTS_MAX: usize = 5;
const PERIOD: Duration = Duration::from_secs(600);
/// Before the second within the period; doubles with each further one.
const PAUSE: Duration = Duration::from_secs(1);
/// Between two looks at whether anybody still waits.
const POLL: Duration = Duration::from_millis(50);

/// When the group was formed anew lately.
#[derive(Default)]
pub(super) struct Restarts(VecDeque<Instant>);

impl Restarts {
    /// Waits, longer each time, before the group that failed for `reason` is formed anew.
    ///
    /// # Errors
    /// It has been too often, or is not `wanted` any more.
    pub fn wait(&mut self, reason: &str, wanted: &dyn Fn() -> bool) -> Result<(), ExecutorError> {
        let now = Instant::now();
        while self.0.front().is_some_and(|at| now.duration_since(*at) > PERIOD) {
            self.0.pop_front();
        }
        if self.0.len() >= RESTARTS_MAX {
            let minutes = PERIOD.as_secs() / 60;
            return Err(ExecutorError(format!(
                "the group was formed anew {RESTARTS_MAX} times within {minutes} minutes; last: \
                 {reason}"
            )));
        }
        let pause = match self.0.len() {
            0 => Duration::ZERO,
            others => PAUSE * (1 << (others - 1)),
        };
        self.0.push_back(now);
        let seconds = pause.as_secs();
        tracing::warn!(reason, seconds, "the group has lost a rank and is formed anew");
        while now.elapsed() < pause {
            if !wanted() {
                return Err(ExecutorError("it is to end".into()));
            }
            thread::sleep(POLL);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_breaks_again_and_again_is_given_up() {
        let mut restarts = Restarts::default();
        let began = Instant::now();
        restarts.wait("first", &|| true).unwrap();
        assert!(began.elapsed() < PAUSE, "the first is at once");
        restarts.wait("second", &|| true).unwrap();
        assert!(began.elapsed() >= PAUSE);
        assert!(restarts.wait("third", &|| false).is_err(), "not wanted");
        restarts.0 = vec![Instant::now(); RESTARTS_MAX].into();
        let error = restarts.wait("rank 1: gone", &|| true).unwrap_err().to_string();
        assert!(error.contains("5 times") && error.contains("rank 1: gone"), "{error}");
    }
}
