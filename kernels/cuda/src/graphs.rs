//! Steps that are captured and run again: one launch instead of a thousand.
//!
//! Decode steps are padded to few sizes. The first of a kind runs as it is, so that whatever is
//! made at a first use is there; the second is captured. A graph holds addresses: where memory
//! moves, all are captured anew.

use super::{Cuda, Driver};
use kernels::KernelError;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Rows of the largest step that is captured; at most [`super::LOGIT_ROWS_MAX`].
const ROWS_MAX: usize = 256;
/// Sizes between are multiples of it; below are powers of two.
const ROWS_STEP: usize = 8;

/// What is known of steps of one size.
enum Known<G> {
    /// One has run.
    Ran,
    Captured(Arc<G>),
}

/// A step's rows, and whether attention turns them itself.
pub(super) type Kind = (usize, bool);

/// By the kind of a step.
pub(super) struct Graphs<D: Driver>(Mutex<HashMap<Kind, Known<D::Graph>>>);

impl<D: Driver> Graphs<D> {
    pub fn new() -> Self {
        Self(Mutex::new(HashMap::new()))
    }

    fn known(&self) -> MutexGuard<'_, HashMap<Kind, Known<D::Graph>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory that graphs may use has moved.
    pub fn forget(&self) {
        self.known().clear();
    }
}

/// The size to which a step of so many rows is padded.
pub(super) fn rows(rows: usize) -> Option<usize> {
    let padded = match rows {
        0 => return None,
        1..ROWS_STEP => rows.next_power_of_two(),
        _ => rows.next_multiple_of(ROWS_STEP),
    };
    (padded <= ROWS_MAX).then_some(padded)
}

impl<D: Driver> Cuda<D> {
    pub(super) fn run_captured<E: From<KernelError>>(
        &self,
        kind: Kind,
        ops: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        // Not held while ops run: they may forget.
        let ran = match self.graphs.known().get(&kind) {
            None => false,
            Some(Known::Ran) => true,
            Some(Known::Captured(graph)) => {
                let graph = Arc::clone(graph);
                return Ok(self.driver.replay(&graph)?);
            }
        };
        if !ran {
            ops()?;
            self.graphs.known().insert(kind, Known::Ran);
            return Ok(());
        }
        self.driver.begin_capture()?;
        let done = ops();
        // Ended whatever came of it.
        let graph = self.driver.end_capture();
        done?;
        let graph = Arc::new(graph?);
        self.driver.replay(&graph)?;
        self.graphs.known().insert(kind, Known::Captured(graph));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_padded_to_few_sizes() {
        let sizes = [1, 2, 3, 4, 5, 8, 9, 63, 64, 250].map(rows);
        assert_eq!(sizes, [1, 2, 4, 4, 8, 8, 16, 64, 64, 256].map(Some));
        assert_eq!([0, 257].map(rows), [None, None]);
        let all: std::collections::BTreeSet<_> = (1..=256).filter_map(rows).collect();
        assert_eq!(all.len(), 3 + 256 / 8);
    }
}
