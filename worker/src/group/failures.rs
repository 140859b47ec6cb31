//! Why ranks ended: reported by what watches them, read by what depends on them.

use std::{
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::Duration,
};

use crate::WorkerError;
use model::ModelError;

/// How long to wait for the reason of a rank's end once its end is known.
pub(super) const REASON_PATIENCE: Duration = Duration::from_secs(1);

/// The first rank to die is the cause; a few more are kept, since others die of it at the same
/// time.
const REPORTS_MAX: usize = 4;

#[derive(Default)]
struct Reports {
    list: Mutex<Vec<(usize, String)>>,
    added: Condvar,
}

/// The reports of one group.
#[derive(Clone, Default)]
pub(super) struct RankFailures {
    reports: Arc<Reports>,
}

impl RankFailures {
    /// A rank has ended, and should not have.
    pub fn report(&self, rank: usize, reason: impl Into<String>) {
        let mut reports = self.reports.list.lock().unwrap_or_else(PoisonError::into_inner);
        if reports.len() < REPORTS_MAX {
            reports.push((rank, reason.into()));
        }
        drop(reports);
        self.reports.added.notify_all();
    }

    /// All reports as one text; waits up to `patience` for the first.
    pub fn describe(&self, patience: Duration) -> Option<String> {
        let reports = self.reports.list.lock().unwrap_or_else(PoisonError::into_inner);
        let (reports, _) = self
            .reports
            .added
            .wait_timeout_while(reports, patience, |reports| reports.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        let lines: Vec<String> =
            reports.iter().map(|(rank, reason)| format!("rank {rank}: {reason}")).collect();
        (!lines.is_empty()).then(|| lines.join("; "))
    }

    /// What made `error` happen, where that was another rank's end.
    pub fn or_cause(&self, error: WorkerError) -> WorkerError {
        let exchange = matches!(error, WorkerError::Model(ModelError::Collective(_)));
        let patience = if exchange { REASON_PATIENCE } else { Duration::ZERO };
        self.describe(patience).map_or(error, WorkerError::Group)
    }
}
