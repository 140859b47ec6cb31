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
    EtcdOptions,
    session::{Fault, Session},
    unreachable,
};
use crate::{Instance, MembershipError, Registration};

/// Changes closer together than this are written as one.
const WRITE_GAP: Duration = Duration::from_millis(50);
pub(super) const PAUSE: Duration = Duration::from_millis(200);
/// Between two lines about the same trouble.
const TELL_AGAIN: Duration = Duration::from_secs(60);
/// How long leaving may take before the lease is left to expire.
const LEAVE_DEADLINE: Duration = Duration::from_secs(5);

/// Registers and returns once the instance is in the roster. Members before the one that was
/// `found` have not answered: none of them is asked first.
pub(super) async fn start(
    options: Arc<EtcdOptions>,
    found: usize,
    instance: watch::Receiver<Instance>,
) -> Result<EtcdRegistration, MembershipError> {
    let key = format!("{}{}", options.prefix(), instance.borrow().id);
    // Registrations of one process begin at different members.
    let begin = key.bytes().map(usize::from).sum::<usize>() % options.endpoints.len();
    let (stop, stopped) = watch::channel(false);
    let (registered, mut first) = oneshot::channel();
    let trouble = Trouble::default();
    let mut keeper =
        Keeper { options: options.clone(), key, instance, stopped, lease: None, trouble };
    // Every member may be tried twice: connecting, the lease, the keepalive, the value.
    let patience = options.call_deadline * 8 * options.endpoints.len() as u32;
    let task = tokio::spawn(async move { keeper.run(begin.max(found), registered).await });
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
    trouble: Trouble,
}

#[derive(Clone, Copy)]
struct Lease {
    id: i64,
    /// Last time that etcd is known to have renewed it.
    renewed: Instant,
}

impl Keeper {
    async fn run(&mut self, mut at: usize, registered: oneshot::Sender<Result<(), String>>) {
        let mut registered = Some(registered);
        loop {
            let mut stopped = self.stopped.clone();
            let Err(fault) = tokio::select! {
                failed = self.serve(at, &mut registered) => failed,
                () = crate::shutdown::requested(&mut stopped) => return self.leave(at).await,
            };
            match fault {
                Fault::Refused(reason) if registered.is_some() => {
                    return report(&mut registered, Err(reason));
                }
                Fault::LeaseGone => {
                    tracing::warn!(key = self.key, "lease lost, registering again");
                    self.lease = None;
                }
                fault => {
                    let endpoint = &self.options.endpoints[at % self.options.endpoints.len()];
                    if let Some(state) = self.trouble.failed(Instant::now()) {
                        let State { seconds, attempts } = state;
                        tracing::warn!(
                            endpoint, %fault, seconds, attempts,
                            "registration: etcd does not answer; serving on, trying each member"
                        );
                    }
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
        report(registered, Ok(()));
        if let Some(State { seconds, attempts }) = self.trouble.over(Instant::now()) {
            tracing::info!(key = self.key, seconds, attempts, "registration: etcd answers again");
        }
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
        let value = current.encode().map_err(|error| Fault::Refused(error.to_string()))?;
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

/// Tells of trouble with etcd once at its beginning, then rarely, and once at its end: attempts
/// come several a second.
#[derive(Default)]
pub(super) struct Trouble {
    since: Option<Instant>,
    attempts: u64,
    told: Option<Instant>,
    /// This trouble was told, so its end is too.
    known: bool,
}

/// How long etcd has been away, and how often it was tried.
#[derive(Debug, PartialEq)]
pub(super) struct State {
    pub seconds: u64,
    pub attempts: u64,
}

impl Trouble {
    /// One more attempt failed: what to tell, where it is time to.
    pub fn failed(&mut self, now: Instant) -> Option<State> {
        self.since.get_or_insert(now);
        self.attempts += 1;
        if self.told.is_some_and(|told| now.duration_since(told) < TELL_AGAIN) {
            return None;
        }
        self.told = Some(now);
        self.known = true;
        Some(self.state(now))
    }

    /// An attempt was well: what to tell, where the trouble was told.
    pub fn over(&mut self, now: Instant) -> Option<State> {
        let state = self.known.then(|| self.state(now));
        (self.since, self.attempts, self.known) = (None, 0, false);
        state
    }

    fn state(&self, now: Instant) -> State {
        let seconds = self.since.map_or(0, |since| now.duration_since(since).as_secs());
        State { seconds, attempts: self.attempts }
    }
}

/// Answers the one who waits for the first registration.
fn report(
    registered: &mut Option<oneshot::Sender<Result<(), String>>>,
    outcome: Result<(), String>,
) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trouble_is_told_at_its_beginning_then_rarely_then_at_its_end() {
        let (mut trouble, began) = (Trouble::default(), Instant::now());
        let at = |milliseconds| began + Duration::from_millis(milliseconds);
        let told: Vec<State> = (0..1000).filter_map(|n| trouble.failed(at(200 * n))).collect();
        let state = |seconds, attempts| State { seconds, attempts };
        assert_eq!(told, [state(0, 1), state(60, 301), state(120, 601), state(180, 901)]);
        assert_eq!(trouble.over(at(200_000)), Some(state(200, 1000)));
        assert_eq!(trouble.over(at(200_000)), None);
        // Again at once: a connection that comes and goes is no reason for a line each time.
        assert_eq!(trouble.failed(at(200_200)), None);
        assert_eq!(trouble.over(at(200_400)), None);
        assert_eq!(trouble.failed(at(240_000)), Some(state(0, 1)));
    }
}
