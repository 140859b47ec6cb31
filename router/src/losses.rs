//! Workers that broke lately: whether a request is what breaks its workers, or is only there when
//! they break.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// How long a loss says something about what happens now.
const LATELY: Duration = Duration::from_secs(60);
/// Losses that are remembered.
const LOSSES_MAX: usize = 64;

/// The last time that each of some workers broke a stream or could not be reached.
#[derive(Default)]
pub(crate) struct Losses(Mutex<VecDeque<(u64, Instant)>>);

impl Losses {
    /// A worker was lost, by its key.
    pub fn note(&self, worker: u64) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|(other, at)| *other != worker && at.elapsed() < LATELY);
        known.truncate(LOSSES_MAX - 1);
        known.push_front((worker, Instant::now()));
    }

    /// Whether workers beside these were lost lately, so that something else breaks workers too.
    pub fn beside(&self, workers: &[u64]) -> bool {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.iter().any(|(worker, at)| at.elapsed() < LATELY && !workers.contains(worker))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_other_workers_lost_lately_count() {
        let losses = Losses::default();
        losses.note(1);
        assert!(!losses.beside(&[1]) && losses.beside(&[2]));
        losses.note(2);
        assert!(losses.beside(&[1]) && !losses.beside(&[2, 1]));
        tokio::time::advance(LATELY).await;
        assert!(!losses.beside(&[]), "long ago");
        for worker in 0..1000 {
            losses.note(worker);
        }
        assert_eq!(losses.0.lock().unwrap().len(), LOSSES_MAX);
    }
}
