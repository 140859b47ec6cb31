//! A worker that serves, until it drains or its group is lost.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use cluster::State;
use proto::v1::worker_server::WorkerServer;
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{self, Instant},
};
use tonic_health::server::HealthReporter;

use super::{LEAVE_LIMIT, blocking};
use crate::{
    Engine, Health, WorkerError,
    announce::Announcement,
    service::{Service, ServiceState},
};

/// How long connections may take to close once every stream has ended.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);
/// Between two looks at whether the group hangs.
const HANG_POLL: Duration = Duration::from_millis(500);
/// Between two looks at the streams while draining.
const DRAIN_POLL: Duration = Duration::from_millis(20);

/// What the task that outlives `Worker::start` owns.
pub(super) struct WorkerTask {
    pub shared: Arc<ServiceState>,
    pub announcement: Announcement,
    pub health: HealthReporter,
    pub server: JoinHandle<Result<(), tonic::transport::Error>>,
    pub closing: watch::Sender<bool>,
    pub drain_limit: Duration,
    pub step_limit: Duration,
    /// As `Group::epoch`.
    pub epoch: Arc<AtomicU64>,
}

impl WorkerTask {
    pub async fn run(
        mut self,
        mut shutdown: watch::Receiver<bool>,
        mut drain_asked: watch::Receiver<Option<Duration>>,
    ) -> Result<(), WorkerError> {
        let mut health = self.shared.engine.health();
        let telling = (&self.announcement, &self.health, &*self.epoch);
        let limit = tokio::select! {
            reason = follow_health(&self.shared.engine, telling) => {
                return self.give_up(reason).await;
            }
            reason = hangs(&self.shared.engine, self.step_limit) => {
                self.shared.engine.give_up(&reason);
                return self.give_up(reason).await;
            }
            ended = &mut self.server => {
                let reason = format!("the gRPC server ended: {ended:?}");
                return self.give_up(reason).await;
            }
            limit = asked(&mut drain_asked) => limit,
            () = signalled(&mut shutdown) => self.drain_limit,
        };
        self.drain(limit, &mut health).await
    }

    /// The group is lost: out of the roster, and out.
    async fn give_up(self, reason: String) -> Result<(), WorkerError> {
        self.shared.draining.store(true, Ordering::SeqCst);
        self.health.set_not_serving::<WorkerServer<Service>>().await;
        // Streams have their reason; let it reach the routers. Neither waits for the other: where
        // the network is away both last for as long as they may, and a successor cannot start.
        let _closed = self.closing.send(true);
        tokio::join!(self.announcement.leave(LEAVE_LIMIT), close(self.server));
        Err(WorkerError::Group(reason))
    }

    async fn drain(
        self,
        limit: Duration,
        group: &mut watch::Receiver<Health>,
    ) -> Result<(), WorkerError> {
        tracing::info!(limit_seconds = limit.as_secs(), "draining");
        self.announcement.set(State::Draining, self.epoch.load(Ordering::Relaxed), "");
        self.health.set_not_serving::<WorkerServer<Service>>().await;
        self.shared.draining.store(true, Ordering::SeqCst);
        let deadline = Instant::now() + limit;
        let mut cut = 0;
        while let streams @ 1.. = self.shared.streams.load(Ordering::SeqCst) {
            let now = group.borrow().clone();
            if let Health::Lost(reason) = now {
                return self.give_up(reason).await;
            }
            if Instant::now() >= deadline {
                cut = streams;
                break;
            }
            time::sleep(DRAIN_POLL).await;
        }
        let Self { shared, announcement, server, closing, .. } = self;
        announcement.leave(LEAVE_LIMIT).await;
        let stopping = Arc::clone(&shared);
        blocking(move || stopping.engine.stop()).await?;
        let _closed = closing.send(true);
        close(server).await;
        tracing::info!("stopped");
        if cut > 0 {
            return Err(WorkerError::DrainLimit { seconds: limit.as_secs(), streams: cut });
        }
        Ok(())
    }
}

/// Waits for the server's connections, then cuts them.
async fn close(mut server: JoinHandle<Result<(), tonic::transport::Error>>) {
    if time::timeout(CLOSE_LIMIT, &mut server).await.is_err() {
        server.abort();
    }
}

/// Says in the roster whether the group serves, until it is lost: then why. Never returns where the
/// engine ends in order.
async fn follow_health(
    engine: &Engine,
    (announcement, reporter, epoch): (&Announcement, &HealthReporter, &AtomicU64),
) -> String {
    let (mut health, mut told) = (engine.health(), Health::Serves);
    loop {
        let changed = health.wait_for(|now| *now != told).await.map(|now| now.clone());
        let Ok(now) = changed else { return std::future::pending().await };
        told.clone_from(&now);
        let epoch = epoch.load(Ordering::Relaxed);
        match now {
            Health::Lost(reason) => return reason,
            Health::Forms(reason) => {
                announcement.set(State::Loading, epoch, &reason);
                reporter.set_not_serving::<WorkerServer<Service>>().await;
            }
            Health::Serves => {
                announcement.set(State::Ready, epoch, "");
                reporter.set_serving::<WorkerServer<Service>>().await;
            }
        }
    }
}

/// The reason, once the engine loop has not turned for longer than a step may last.
async fn hangs(engine: &Engine, limit: Duration) -> String {
    loop {
        let silent = engine.silent_for();
        if silent > limit {
            let (silent, limit) = (silent.as_secs(), limit.as_secs());
            return format!(
                "the group hangs: a step has lasted {silent} s, more than the limit of {limit} s; \
                 if it is only slow, raise --step-limit-seconds"
            );
        }
        time::sleep(HANG_POLL).await;
    }
}

async fn asked(drain: &mut watch::Receiver<Option<Duration>>) -> Duration {
    let limit = drain.wait_for(Option::is_some).await.ok().and_then(|limit| *limit);
    match limit {
        Some(limit) => limit,
        None => std::future::pending().await,
    }
}

/// Whoever holds the other end may be gone: then there is no signal to come.
async fn signalled(shutdown: &mut watch::Receiver<bool>) {
    if shutdown.wait_for(|&asked| asked).await.is_err() {
        std::future::pending::<()>().await;
    }
}
