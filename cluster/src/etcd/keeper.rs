//! Keeps one instance registered: a lease, its renewal, and the value under it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
    time::{MissedTickBehavior, interval, sleep, timeout},
};

use super::{
    EtcdOptions, encode,
    session::{Fault, Session},
    unreachable,
};
use crate::{Instance, MembershipError, Registration};

/// Changes closer together than this are written as one.
const WRITE_GAP: Duration = Duration::from_millis(50);
const PAUSE: Duration = Duration::from_millis(200);
/// How long leaving may take before the lease is left to expire.
const LEAVE_DEADLINE: Duration = Duration::from_secs(5);

/// Registers and returns once the instance is in the roster.
pub(super) async fn start(
    options: Arc<EtcdOptions>,
    instance: watch::Receiver<Instance>,
) -> Result<EtcdRegistration, MembershipError> {
    let key = format!("{}{}", options.prefix(), instance.borrow().id);
    let (stop, stopped) = watch::channel(false);
    let (registered, mut first) = oneshot::channel();
    let mut keeper = Keeper { options: options.clone(), key, instance, stopped, lease: None };
    // Every member may be tried twice: connecting, the lease, the keepalive, the value.
    let patience = options.call_deadline * 8 * options.endpoints.len() as u32;
    let task = tokio::spawn(async move { keeper.run(registered).await });
    let mut registration = EtcdRegistration { stop, task: Some(task) };
    match timeout(patience, &mut first).await {
        Ok(Ok(Ok(()))) => Ok(registration),
        Ok(Ok(Err(reason))) => Err(MembershipError::Refused(reason)),
        Ok(Err(_)) | Err(_) => {
            registration.end().await;
            let reason = format!("no registration within {} s", patience.as_secs());
            Err(unreachable(&options, reason))
        }
    }
}

struct Keeper {
    options: Arc<EtcdOptions>,
    key: String,
    instance: watch::Receiver<Instance>,
    stopped: watch::Receiver<bool>,
    lease: Option<Lease>,
}

#[derive(Clone, Copy)]
struct Lease {
    id: i64,
    /// Last time that etcd is known to have renewed it.
    renewed: Instant,
}

impl Keeper {
    async fn run(&mut self, registered: oneshot::Sender<Result<(), String>>) {
        let mut registered = Some(registered);
        // Registrations of one process begin at different members.
        let mut at = self.key.bytes().map(usize::from).sum::<usize>();
        loop {
            let mut stopped = self.stopped.clone();
            let Err(fault) = tokio::select! {
                failed = self.serve(at, &mut registered) => failed,
                () = crate::shutdown::requested(&mut stopped) => return self.leave(at).await,
            };
            match fault {
                Fault::Refused(reason) if registered.is_some() => {
                    return tell(&mut registered, Err(reason));
                }
                Fault::LeaseGone => {
                    tracing::warn!(key = self.key, "lease lost, registering again");
                    self.lease = None;
                }
                fault => {
                    let endpoint = &self.options.endpoints[at % self.options.endpoints.len()];
                    tracing::warn!(endpoint, %fault, "registration: trying the next etcd member");
                    at += 1;
                    sleep(PAUSE).await;
                }
            }
        }
    }

    /// Registers through one member and stays with it; returns only with what went wrong.
    async fn serve(
        &mut self,
        at: usize,
        registered: &mut Option<oneshot::Sender<Result<(), String>>>,
    ) -> Result<std::convert::Infallible, Fault> {
        let mut session = Session::open(&self.options, at).await?;
        // A lease that may have run out is not worth asking about.
        let lease = match self.lease {
            Some(lease) if lease.renewed.elapsed() < self.options.lease => lease.id,
            _ => {
                let lease = session.grant().await?;
                // Known from here on, so that leaving can take it back.
                self.lease = Some(Lease { id: lease, renewed: Instant::now() });
                lease
            }
        };
        let mut keepalive = session.keep(lease).await?;
        self.write(&mut session, lease).await?;
        tell(registered, Ok(()));
        let mut renewal = interval(self.options.lease / 4);
        renewal.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut followed = true;
        loop {
            tokio::select! {
                _ = renewal.tick() => {
                    keepalive.renew().await?;
                    self.lease = Some(Lease { id: lease, renewed: Instant::now() });
                }
                changed = self.instance.changed(), if followed => {
                    followed = changed.is_ok();
                    if followed {
                        self.write(&mut session, lease).await?;
                        sleep(WRITE_GAP).await;
                    }
                }
            }
        }
    }

    async fn write(&mut self, session: &mut Session, lease: i64) -> Result<(), Fault> {
        let current = self.instance.borrow_and_update().clone();
        let value = encode(&current).map_err(|error| Fault::Refused(error.to_string()))?;
        session.put(&self.key, value, lease).await
    }

    /// Takes the key out of the roster at once, through whichever member answers.
    async fn leave(&mut self, at: usize) {
        let Some(Lease { id, .. }) = self.lease else { return };
        for at in at..at + self.options.endpoints.len() {
            let left = async { Session::open(&self.options, at).await?.revoke(id).await };
            match left.await {
                Ok(()) | Err(Fault::LeaseGone) => return,
                Err(fault) => tracing::warn!(key = self.key, %fault, "leaving: no answer yet"),
            }
        }
        tracing::warn!(key = self.key, "left to expire: no etcd member took the lease back");
    }
}

/// Answers the one who waits for the first registration.
fn tell(registered: &mut Option<oneshot::Sender<Result<(), String>>>, outcome: Result<(), String>) {
    if let Some(waiting) = registered.take() {
        // Nobody waits any more: the wait has its own deadline.
        let _abandoned = waiting.send(outcome);
    }
}

pub(super) struct EtcdRegistration {
    stop: watch::Sender<bool>,
    task: Option<JoinHandle<()>>,
}

impl EtcdRegistration {
    async fn end(&mut self) {
        self.stop.send_replace(true);
        let Some(mut task) = self.task.take() else { return };
        if timeout(LEAVE_DEADLINE, &mut task).await.is_err() {
            task.abort();
        }
    }
}

#[async_trait::async_trait]
impl Registration for EtcdRegistration {
    async fn leave(mut self: Box<Self>) {
        self.end().await;
    }
}

impl Drop for EtcdRegistration {
    /// The task goes on for as long as taking the lease back needs.
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}
