//! What a worker tells each router that watches it: who it is, how busy it is, and that it lives.
//!
//! Nothing of this waits for the engine loop, which may be in a long step.

use std::{convert::Infallible, sync::Arc, time::Duration};

use cluster::Instance;
use engine::Stats;
use futures_util::{Stream, stream};
use proto::v1::{Load, WorkerReport};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tonic::Status;

use crate::prefixes::{Prefixes, Seen};

/// Between two messages, at least: the load changes with every step.
const LOAD_PERIOD: Duration = Duration::from_millis(100);
/// And at most: routers take a longer silence for a process that does not run.
const BEAT: Duration = Duration::from_millis(proto::WORKER_BEAT_MS);

/// One router's view of this worker.
pub(crate) struct Watch {
    pub instance: watch::Receiver<Instance>,
    pub stats: watch::Receiver<Stats>,
    /// Sequences that may run or wait.
    pub places: usize,
    pub prefixes: Arc<Prefixes>,
    /// Turns true when the worker's connections are to end.
    pub closing: watch::Receiver<bool>,
}

impl Watch {
    /// The messages, without an end before the worker's.
    ///
    /// # Errors
    /// `Internal` for an instance that cannot be told.
    pub fn reports(
        self,
    ) -> Result<impl Stream<Item = Result<WorkerReport, Status>> + Send + 'static, Status> {
        let instance = self.instance.borrow().encode();
        let instance = instance.map_err(|error| Status::internal(error.to_string()))?;
        let told = self.load();
        let mut seen = self.prefixes.watch();
        let prefixes = seen.news(&self.prefixes);
        let first = WorkerReport { instance: instance.into(), load: Some(told), prefixes };
        let later = stream::unfold((self, told, seen), async |(mut watch, told, mut seen)| {
            let mut closing = watch.closing.clone();
            let report = tokio::select! {
                report = watch.next(told, &mut seen) => report,
                // A dropped sender closes as well.
                _ = closing.wait_for(|&closing| closing) => return None,
            };
            let told = report.load.unwrap_or(told);
            Some((report, (watch, told, seen)))
        });
        let first = stream::once(async { first });
        Ok(futures_util::StreamExt::map(futures_util::StreamExt::chain(first, later), Ok))
    }

    async fn next(&mut self, told: Load, seen: &mut Seen) -> WorkerReport {
        sleep(LOAD_PERIOD).await;
        let news = async {
            tokio::select! {
                _load = self.other_than(told) => {}
                () = seen.changed() => {}
            }
        };
        // Where there is none, this is a sign of life.
        let _none = timeout(BEAT - LOAD_PERIOD, news).await;
        let load = Some(self.load()).filter(|load| *load != told);
        WorkerReport { load, prefixes: seen.news(&self.prefixes), ..WorkerReport::default() }
    }

    /// The load, once it is another.
    async fn other_than(&mut self, told: Load) -> Load {
        loop {
            let load = self.load();
            if load != told {
                return load;
            }
            if self.stats.changed().await.is_err() {
                // The engine has ended: nothing changes any more.
                let never: Infallible = std::future::pending().await;
                match never {}
            }
        }
    }

    fn load(&self) -> Load {
        let stats = *self.stats.borrow();
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        Load {
            running: count(stats.running),
            waiting: count(stats.waiting),
            places: count(self.places),
            blocks_free: count(stats.blocks_free),
            prefill_tokens: stats.to_prefill as u64,
            finished: stats.finished + stats.cancelled + stats.failed,
        }
    }
}
