//! Whether one more sequence may be accepted, known without asking the engine loop: a step may last
//! long, and whoever knocks meanwhile wants an answer at once.

use std::sync::{Mutex, MutexGuard, PoisonError};

use engine::EngineError;

/// Counts the sequences that wait, and the places in the batch that are open to them.
pub(crate) struct Places {
    counts: Mutex<Counts>,
    waiting_max: usize,
    running_max: usize,
}

struct Counts {
    /// Accepted, not yet seen by the engine loop.
    inbox: usize,
    /// Waiting in the scheduler when the loop last looked.
    scheduled: usize,
    /// Places in the batch that nobody waits for.
    open: usize,
}

impl Places {
    /// Of an idle engine that runs at most `running_max` sequences and lets `waiting_max` wait.
    pub fn new(waiting_max: usize, running_max: usize) -> Self {
        let counts = Counts { inbox: 0, scheduled: 0, open: running_max };
        Self { counts: Mutex::new(counts), waiting_max, running_max }
    }

    /// Sequences that may run or wait at once.
    pub fn max(&self) -> usize {
        self.waiting_max + self.running_max
    }

    /// Accepts one more; says how many wait before it. Errors: `Overloaded`.
    pub fn take(&self) -> Result<usize, EngineError> {
        let mut counts = self.counts();
        let waiting = counts.inbox + counts.scheduled;
        if waiting >= self.waiting_max + counts.open {
            return Err(EngineError::Overloaded(waiting));
        }
        counts.inbox += 1;
        Ok(waiting)
    }

    /// What the loop knows once it has planned a step: how many it has received since the last
    /// call, how many wait and run.
    pub fn settle(&self, received: usize, waiting: usize, running: usize) {
        let mut counts = self.counts();
        counts.inbox = counts.inbox.saturating_sub(received);
        counts.scheduled = waiting;
        // Where some wait, blocks are short: a place in the batch alone helps nobody.
        counts.open = if waiting == 0 { self.running_max.saturating_sub(running) } else { 0 };
    }

    /// So many sequences have ended since the last `settle`.
    pub fn open(&self, ended: usize) {
        self.counts().open += ended;
    }

    /// Nobody waits or runs any more.
    pub fn clear(&self) {
        *self.counts() = Counts { inbox: 0, scheduled: 0, open: self.running_max };
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_are_accepted_as_have_a_place_or_may_wait() {
        let places = Places::new(2, 3);
        let taken: Vec<_> = (0..5).map(|_| places.take().unwrap()).collect();
        assert_eq!(taken, [0, 1, 2, 3, 4]);
        assert_eq!(places.take(), Err(EngineError::Overloaded(5)));
        // Three run, two wait: nothing has changed for the next one.
        places.settle(5, 2, 3);
        assert_eq!(places.take(), Err(EngineError::Overloaded(2)));
        places.settle(0, 1, 3);
        assert_eq!(places.take(), Ok(1));
        assert!(places.take().is_err());
        // One that the loop has not received yet still counts.
        places.settle(0, 0, 3);
        assert_eq!(places.take(), Ok(1));
        assert!(places.take().is_err());
        places.settle(2, 0, 0);
        assert_eq!(places.take(), Ok(0));
    }

    #[test]
    fn open_places_do_not_count_while_blocks_are_short() {
        let places = Places::new(1, 8);
        places.take().unwrap();
        places.take().unwrap();
        places.settle(2, 1, 1);
        assert!(places.take().is_err());
        places.open(1);
        assert_eq!(places.take(), Ok(1));
        assert!(places.take().is_err());
    }
}
