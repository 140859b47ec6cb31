//! A group whose other ranks hear of their leader however long this process is busy elsewhere.
//!
//! Ranks that hear nothing for ten seconds end. Between steps a tool encodes a large file, or waits
//! for whoever reads its output; a thread calls `idle` meanwhile.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result};
use engine::plan::{Executor, StepOutput, StepPlan};

/// Between two signs of life.
const PERIOD: Duration = Duration::from_millis(500);

type SharedExecutor = Arc<Mutex<Box<dyn Executor>>>;

/// An executor, and the thread that calls `idle` while it rests.
pub struct KeptAlive {
    executor: SharedExecutor,
    /// Closed to end the thread.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl KeptAlive {
    /// One rank alone needs no thread.
    pub fn new(executor: Box<dyn Executor>, ranks: usize) -> Result<Self> {
        let executor = Arc::new(Mutex::new(executor));
        let (stop, stopped) = channel();
        let thread = if ranks > 1 {
            let executor = Arc::clone(&executor);
            let builder = thread::Builder::new().name("keep-alive".into());
            let thread = builder.spawn(move || keep_alive(&executor, &stopped));
            Some(thread.context("cannot start a thread")?)
        } else {
            None
        };
        Ok(Self { executor, stop: Some(stop), thread })
    }

    /// Runs one plan.
    pub fn run(&mut self, plan: StepPlan) -> Result<StepOutput> {
        let mut executor = lock(&self.executor);
        executor.launch(plan)?;
        Ok(executor.finish()?)
    }
}

fn lock(executor: &SharedExecutor) -> MutexGuard<'_, Box<dyn Executor>> {
    executor.lock().unwrap_or_else(PoisonError::into_inner)
}

fn keep_alive(executor: &SharedExecutor, stopped: &Receiver<()>) {
    while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(PERIOD) {
        if lock(executor).idle().is_err() {
            // The group is lost; the next plan says so with the reason.
            return;
        }
    }
}

impl Drop for KeptAlive {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // It ends by itself, and holds nothing that a panic could have left half done.
            let _ended = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering::SeqCst},
        time::Instant,
    };

    use engine::plan::ExecutorError;

    use super::*;

    struct Counted(Arc<AtomicUsize>);

    impl Executor for Counted {
        fn depth(&self) -> usize {
            1
        }
        fn launch(&mut self, _plan: StepPlan) -> Result<(), ExecutorError> {
            Ok(())
        }
        fn finish(&mut self) -> Result<StepOutput, ExecutorError> {
            Ok(StepOutput::default())
        }
        fn idle(&mut self) -> Result<(), ExecutorError> {
            self.0.fetch_add(1, SeqCst);
            Ok(())
        }
    }

    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.store(1000, SeqCst);
        }
    }

    #[test]
    fn ranks_hear_of_a_leader_that_is_busy_elsewhere() {
        let count = Arc::new(AtomicUsize::new(0));
        let mut kept = KeptAlive::new(Box::new(Counted(Arc::clone(&count))), 2).unwrap();
        let start = Instant::now();
        while count.load(SeqCst) < 2 {
            assert!(start.elapsed() < Duration::from_secs(60), "nobody calls idle");
            thread::sleep(Duration::from_millis(10));
        }
        let plan = StepPlan { number: 0, chunks: Vec::new(), released: Vec::new() };
        assert_eq!(kept.run(plan).unwrap(), StepOutput::default());
        drop(kept);
        assert_eq!(count.load(SeqCst), 1000, "the group has ended with it");
    }
}
