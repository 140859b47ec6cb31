//! Why ranks ended: reported by what watches them, read by what depends on them.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use collective::Cut;
use model::ModelError;

use crate::WorkerError;

/// How long to wait for the reason of a rank's end once its end is known.
pub(super) const REASON_PATIENCE: Duration = Duration::from_secs(1);

/// Ranks that end because of another's end may be seen first: then the cause comes within this.
const SETTLE: Duration = Duration::from_millis(100);

/// The first rank to die is the cause; a few more are kept, since others die of it at the same
/// time.
const REPORTS_MAX: usize = 4;

struct Failure {
    rank: usize,
    reason: String,
    /// Its process may be as good as new.
    lives: bool,
}

#[derive(Default)]
struct State {
    /// Each rank once.
    list: Vec<Failure>,
    links: Option<Cut>,
}

#[derive(Default)]
struct Reports {
    state: Mutex<State>,
    added: Condvar,
}

/// The reports of one group.
#[derive(Clone, Default)]
pub(super) struct RankFailures {
    reports: Arc<Reports>,
}

impl RankFailures {
    /// A rank has ended, or must. What else is told of it later does not count.
    pub fn report(&self, rank: usize, reason: impl Into<String>) {
        self.add(Failure { rank, reason: reason.into(), lives: false });
    }

    /// A rank has left the group, for a reason of its own.
    pub fn report_left(&self, rank: usize) {
        self.add(Failure { rank, reason: "it has left the group".into(), lives: true });
    }

    fn add(&self, failure: Failure) {
        let mut state = self.state();
        let is_known = state.list.iter().any(|known| known.rank == failure.rank);
        if state.list.len() < REPORTS_MAX && !is_known {
            state.list.push(failure);
        }
        state.links.iter().for_each(Cut::cut);
        drop(state);
        self.reports.added.notify_all();
    }

    /// From the first report on, nobody waits on these links.
    pub fn end_links(&self, links: Cut) {
        let mut state = self.state();
        if !state.list.is_empty() {
            links.cut();
        }
        state.links = Some(links);
    }

    /// Nobody waits on the links any more, whether or not a rank has failed.
    pub fn cut_links(&self) {
        self.state().links.iter().for_each(Cut::cut);
    }

    /// The ranks that have ended, or must.
    pub fn ended(&self) -> Vec<usize> {
        let state = self.state();
        state.list.iter().filter(|failure| !failure.lives).map(|failure| failure.rank).collect()
    }

    /// For the next epoch, in which nobody has failed yet.
    pub fn clear(&self) {
        *self.state() = State::default();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.reports.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All reports as one text; waits up to `patience` for the first, and then a little for more.
    pub fn describe(&self, patience: Duration) -> Option<String> {
        let (mut state, _) = self
            .reports
            .added
            .wait_timeout_while(self.state(), patience, |state| state.list.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        if !patience.is_zero() && !state.list.is_empty() {
            drop(state);
            thread::sleep(SETTLE);
            state = self.state();
        }
        let lines: Vec<String> = state
            .list
            .iter()
            .map(|known| format!("rank {}: {}", known.rank, known.reason))
            .collect();
        (!lines.is_empty()).then(|| lines.join("; "))
    }

    /// What made `error` happen, where that was another rank's end.
    pub fn or_cause(&self, error: WorkerError) -> WorkerError {
        let exchange = matches!(error, WorkerError::Model(ModelError::Collective(_)));
        let patience = if exchange { REASON_PATIENCE } else { Duration::ZERO };
        match self.describe(patience) {
            // Whoever has only left knows no more than this.
            Some(_) if self.ended().is_empty() => error,
            Some(reason) => WorkerError::Group(reason),
            None => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_is_told_though_its_consequence_was_seen_first() {
        let failures = RankFailures::default();
        assert_eq!(failures.describe(Duration::ZERO), None);
        let told = thread::scope(|scope| {
            let told = scope.spawn(|| failures.describe(REASON_PATIENCE));
            failures.report(2, "lost rank 0");
            failures.report(1, "killed");
            // A rank ends once.
            failures.report(1, "killed again");
            told.join().unwrap()
        });
        assert_eq!(told.as_deref(), Some("rank 2: lost rank 0; rank 1: killed"));
        assert_eq!(failures.describe(Duration::ZERO), told);
        failures.report_left(3);
        assert_eq!(failures.ended(), [2, 1]);
        failures.clear();
        assert_eq!(failures.describe(Duration::ZERO), None);
    }
}
