//! The line in front of full workers: in order of arrival, one for each model, bounded over all.

use crate::{RouterError, targets::Model, upstream::Upstream};
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::OwnedMutexGuard,
    time::{Instant, timeout_at},
};

/// What a refused client is told to wait.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// Being first in line, until dropped.
pub(crate) struct Ticket {
    _waiting: Waiting,
    _turn: OwnedMutexGuard<()>,
}

/// Standing in line, counted until dropped.
struct Waiting {
    upstream: Arc<Upstream>,
    model: Arc<Model>,
}

impl Waiting {
    fn new(upstream: &Arc<Upstream>, model: &Arc<Model>) -> Result<Self, RouterError> {
        let max = upstream.limits.queue_max;
        let take = |count: &AtomicUsize| {
            let more = |waiting: usize| (waiting < max).then_some(waiting + 1);
            count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
        };
        if take(&upstream.queued).is_err() {
            return Err(overloaded(&format!("{max} choices wait for a place already")));
        }
        model.waiting.fetch_add(1, Ordering::Relaxed);
        upstream.metrics.queued.inc();
        Ok(Self { upstream: upstream.clone(), model: model.clone() })
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.upstream.queued.fetch_sub(1, Ordering::Relaxed);
        self.model.waiting.fetch_sub(1, Ordering::Relaxed);
        self.upstream.metrics.queued.dec();
    }
}

impl Ticket {
    /// Whether others wait for this model, so that a newcomer belongs behind them.
    pub fn line_waits(model: &Model) -> bool {
        model.waiting.load(Ordering::Relaxed) > 0
    }

    /// Stands in line until first. Errors: `Overloaded` when the line is full or too slow.
    pub async fn take(
        upstream: &Arc<Upstream>,
        model: &Arc<Model>,
        started: Instant,
    ) -> Result<Self, RouterError> {
        let waiting = Waiting::new(upstream, model)?;
        let limit = upstream.deadlines.queue;
        match timeout_at(started + limit, model.turn.clone().lock_owned()).await {
            Ok(turn) => Ok(Self { _waiting: waiting, _turn: turn }),
            Err(_) => Err(overloaded(&format!("no place for '{}' within {limit:?}", model.name))),
        }
    }
}

/// Refused for now.
pub(crate) fn overloaded(reason: &str) -> RouterError {
    RouterError::Overloaded { reason: reason.to_owned(), retry_after: RETRY_AFTER }
}
