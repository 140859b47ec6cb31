//! The roster of workers that are named one by one: for a few machines without a registry.
//!
//! Every address is asked, again and again, for what stands there; the answer is what that worker
//! would put in a registry. A worker whose port refuses connections is gone at once; one that is
//! merely silent is believed in for as long as a lease in etcd would last. Addresses stay in the
//! list for ever, so a worker that returns is found.

use std::{
    error::Error,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use proto::v1::{DescribeWorkerRequest, worker_client::WorkerClient};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};

use crate::{
    Connector, INSTANCE_BYTES_MAX, Instance, Membership, MembershipError, Registration, Roster,
    root_cause,
};

/// Addresses in one list, at most.
const WORKERS_MAX: usize = 1000;
/// Between two questions to one worker.
const PERIOD: Duration = Duration::from_millis(500);
/// For one answer, and for connecting.
const CALL_DEADLINE: Duration = Duration::from_secs(2);
/// A worker that was silent for this long is taken for dead: as long as a lease in etcd lasts.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// A connection without an answer to its ping is given up after this.
const KEEPALIVE: Duration = Duration::from_secs(5);

/// Membership for routers: the workers at fixed addresses, those of them that answer.
pub struct StaticList {
    known: Arc<Known>,
    _tasks: JoinSet<()>,
}

impl StaticList {
    /// Follows the workers at `addresses`, e.g. `http://10.0.0.7:7001`, for as long as the value
    /// lives; with `tls` they are reached by that alone. None of them needs to be there yet. Must
    /// be called within a tokio runtime.
    ///
    /// # Errors
    /// `Invalid` for an empty list, one of more than 1000, or an address that is none.
    pub fn follow(addresses: &[String], tls: Option<tls::Client>) -> Result<Self, MembershipError> {
        let count = addresses.len();
        if !(1..=WORKERS_MAX).contains(&count) {
            let message = format!("{count} workers listed; give 1 to {WORKERS_MAX}");
            return Err(MembershipError::Invalid(message));
        }
        let known = Arc::new(Known {
            answers: Mutex::new(vec![None; count]),
            roster: watch::Sender::new(Roster::default()),
        });
        let mut tasks = JoinSet::new();
        for (at, address) in addresses.iter().enumerate() {
            let endpoint = Endpoint::from_shared(address.clone()).map_err(|error| {
                let wanted = "write http://HOST:PORT";
                MembershipError::Invalid(format!("worker address {address:?}: {error}; {wanted}"))
            })?;
            let channel = endpoint
                .connect_timeout(CALL_DEADLINE)
                .http2_keep_alive_interval(KEEPALIVE)
                .keep_alive_timeout(KEEPALIVE)
                .keep_alive_while_idle(true)
                .connect_with_connector_lazy(Connector::new(tls.clone(), CALL_DEADLINE));
            let follower = Follower { address: address.clone(), at, known: known.clone() };
            tasks.spawn(follower.run(channel));
        }
        Ok(Self { known, _tasks: tasks })
    }
}

#[async_trait::async_trait]
impl Membership for StaticList {
    /// Refused: whoever keeps such a list is a router.
    async fn announce(
        &self,
        _instance: watch::Receiver<Instance>,
    ) -> Result<Box<dyn Registration>, MembershipError> {
        let message = "a list of workers takes no registrations; add the address to the list";
        Err(MembershipError::Invalid(message.into()))
    }

    fn roster(&self) -> watch::Receiver<Roster> {
        self.known.roster.subscribe()
    }
}

/// What the addresses last answered.
struct Known {
    answers: Mutex<Vec<Option<Arc<Instance>>>>,
    roster: watch::Sender<Roster>,
}

impl Known {
    fn set(&self, at: usize, instance: Option<Instance>) {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        if answers[at].as_deref() == instance.as_ref() {
            return;
        }
        answers[at] = instance.map(Arc::new);
        let mut all: Vec<Arc<Instance>> = answers.iter().flatten().cloned().collect();
        all.sort_by(|a, b| a.id.cmp(&b.id));
        // One worker may be listed by two of its addresses.
        all.dedup_by(|a, b| a.id == b.id);
        self.roster.send_if_modified(|current| {
            let changed = **current != all;
            if changed {
                *current = Arc::new(all);
            }
            changed
        });
    }
}

/// Why an address gave no instance.
#[derive(Debug)]
enum Fault {
    /// Nothing listens there, or something else does.
    Gone(String),
    /// No answer in time: perhaps busy, perhaps dead.
    Silent(String),
}

/// Asks one address.
struct Follower {
    address: String,
    at: usize,
    known: Arc<Known>,
}

impl Follower {
    async fn run(self, channel: Channel) {
        let mut client =
            WorkerClient::new(channel).max_decoding_message_size(2 * INSTANCE_BYTES_MAX);
        // `None`: not in the roster.
        let mut heard: Option<Instant> = None;
        let mut told = false;
        loop {
            match ask(&mut client).await {
                Ok(instance) => {
                    if heard.replace(Instant::now()).is_none() {
                        tracing::info!(worker = self.address, model = instance.model, "joined");
                    }
                    told = false;
                    // The worker may not know by which address it is reached from here.
                    let address = self.address.clone();
                    self.known.set(self.at, Some(Instance { address, ..instance }));
                }
                Err(fault) => {
                    let (gone, reason) = match fault {
                        Fault::Gone(reason) => (true, reason),
                        Fault::Silent(reason) => {
                            (heard.is_none_or(|at| at.elapsed() >= SILENCE_MAX), reason)
                        }
                    };
                    if gone && !std::mem::replace(&mut told, true) {
                        tracing::warn!(worker = self.address, reason, "not in the roster");
                    }
                    if gone && heard.take().is_some() {
                        self.known.set(self.at, None);
                    }
                }
            }
            sleep(PERIOD).await;
        }
    }
}

async fn ask(client: &mut WorkerClient<Channel>) -> Result<Instance, Fault> {
    let answer = timeout(CALL_DEADLINE, client.describe_worker(DescribeWorkerRequest {})).await;
    match answer {
        Ok(Ok(described)) => {
            let decoded = Instance::decode(&described.into_inner().instance);
            decoded.map_err(|reason| Fault::Gone(format!("no worker's answer: {reason}")))
        }
        Ok(Err(status)) => Err(fault(&status)),
        Err(_) => Err(Fault::Silent(format!("no answer within {} s", CALL_DEADLINE.as_secs()))),
    }
}

fn fault(status: &Status) -> Fault {
    let (mut refused, mut reason) = (false, status.message().to_owned());
    if let Some(error) = status.source() {
        let cause = root_cause(error);
        let kind = cause.downcast_ref::<io::Error>().map(io::Error::kind);
        (refused, reason) = (kind == Some(io::ErrorKind::ConnectionRefused), cause.to_string());
    }
    match status.code() {
        Code::Unimplemented | Code::NotFound | Code::PermissionDenied | Code::Unauthenticated => {
            Fault::Gone("something other than a worker of this version answers".into())
        }
        _ if refused => Fault::Gone(reason),
        _ => Fault::Silent(reason),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::State;

    fn instance(id: &str) -> Instance {
        Instance {
            id: id.into(),
            model: "m".into(),
            fingerprint: "f".into(),
            address: "http://a:1".into(),
            protocol: proto::WORKER_PROTOCOL,
            started: 0,
            state: State::Ready,
            context_max: 8,
            vocab_size: 8,
            ranks: 1,
            blocks_total: 1,
            epoch: 0,
            reason: String::new(),
        }
    }

    #[test]
    fn the_roster_is_the_whole_set_in_order_and_each_worker_once() {
        let answers = Mutex::new(vec![None; 3]);
        let known = Known { answers, roster: watch::Sender::new(Roster::default()) };
        let mut seen = known.roster.subscribe();
        let ids = |seen: &watch::Receiver<Roster>| {
            seen.borrow().iter().map(|one| one.id.clone()).collect::<Vec<_>>()
        };
        known.set(2, Some(instance("a")));
        known.set(0, Some(instance("b")));
        known.set(1, Some(instance("a")));
        assert_eq!(ids(&seen), ["a", "b"]);
        seen.mark_unchanged();
        known.set(0, Some(instance("b")));
        assert!(!seen.has_changed().unwrap(), "the same answer is no news");
        known.set(0, None);
        assert_eq!(ids(&seen), ["a"]);
    }

    #[tokio::test]
    async fn lists_that_cannot_work_are_refused_with_the_remedy() {
        let many = vec!["http://a:1".to_owned(); WORKERS_MAX + 1];
        for (list, word) in [
            (vec![], "1 to 1000"),
            (many, "1 to 1000"),
            (vec!["not an address".to_owned()], "http://HOST:PORT"),
        ] {
            let error = StaticList::follow(&list, None).err().expect("refused").to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
