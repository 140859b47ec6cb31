//! The connection to one worker, and what this router knows of the worker by its own experience.
//!
//! A worker is used only while it is there: it has said that it is who the roster says, and it
//! keeps speaking (`presence.rs`). Of its load it tells now and then; what this router sent there
//! since is counted in. One that broke a stream is left alone for a moment, longer each time, and
//! forgiven at its next message.

use crate::{
    config::Deadlines,
    policy::RouteKey,
    presence::{self, News},
    version::Model,
};
use cluster::Instance;
use proto::v1::{CachedPrefixes, Load, worker_client::WorkerClient};
use std::{
    collections::HashSet,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{sync::watch, task::AbortHandle, time::Instant};
use tonic::transport::Channel;

/// One message between router and worker: prompts of millions of tokens fit.
const MESSAGE_BYTES_MAX: usize = 64 << 20;
/// Rest after a first failure; doubles with each further one.
const REST_FIRST: Duration = Duration::from_millis(250);
const REST_MAX: Duration = Duration::from_secs(8);

/// Whether a worker is at its address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Presence {
    /// It has not been heard of yet.
    #[default]
    Unmet,
    /// It is who the roster says, and speaks.
    Here,
    /// It was here, and has stopped speaking; its connection is open.
    Silent,
    /// Not here, or somebody else: why.
    Away(Arc<str>),
}

/// How a worker was lost.
pub(crate) struct Loss {
    /// For people.
    pub reason: String,
    /// It says nothing any more: nothing that it runs has made it so.
    pub stopped: bool,
}

/// The connection to one worker. The channel connects by itself, as often as need be.
pub(crate) struct Link {
    id: String,
    key: u64,
    address: String,
    channel: Channel,
    in_flight: AtomicUsize,
    faults: Mutex<Faults>,
    load: Mutex<Told>,
    /// Prefixes that it says it has cached, by name.
    cached: Mutex<HashSet<u64>>,
    presence: watch::Sender<Presence>,
    watcher: OnceLock<AbortHandle>,
}

#[derive(Default)]
struct Faults {
    in_a_row: u32,
    rests_until: Option<Instant>,
}

/// The worker's load as it last told it.
#[derive(Default)]
struct Told {
    load: Load,
    /// This router's own sequences there at that time.
    in_flight: usize,
}

impl Link {
    /// `channel` leads to the instance's address.
    pub fn new(instance: &Instance, channel: Channel) -> Self {
        let mut hasher = DefaultHasher::new();
        instance.id.hash(&mut hasher);
        Self {
            id: instance.id.clone(),
            key: hasher.finish(),
            address: instance.address.clone(),
            channel,
            in_flight: AtomicUsize::new(0),
            faults: Mutex::default(),
            load: Mutex::default(),
            cached: Mutex::default(),
            presence: watch::Sender::default(),
            watcher: OnceLock::new(),
        }
    }

    /// Begins to watch the worker, once.
    pub fn watch(self: &Arc<Self>, instance: &Arc<Instance>, news: &News, deadlines: &Deadlines) {
        self.watcher.get_or_init(|| {
            let watch =
                presence::follow(Arc::downgrade(self), instance.clone(), news.clone(), *deadlines);
            tokio::spawn(watch).abort_handle()
        });
    }

    /// The worker's name in the roster.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The worker's name as policies use it.
    pub fn key(&self) -> u64 {
        self.key
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// A client on the shared channel.
    pub fn client(&self) -> WorkerClient<Channel> {
        WorkerClient::new(self.channel.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    pub fn presence(&self) -> watch::Receiver<Presence> {
        self.presence.subscribe()
    }

    pub fn is_here(&self) -> bool {
        *self.presence.borrow() == Presence::Here
    }

    /// Returns what there was before, where it was something else.
    pub fn set_presence(&self, presence: Presence) -> Option<Presence> {
        let mut before = None;
        self.presence.send_if_modified(|known| {
            let changes = *known != presence;
            if changes {
                before = Some(std::mem::replace(known, presence));
            }
            changes
        });
        before
    }

    /// Waits until the worker is not there.
    pub async fn lost(&self) -> Loss {
        let mut presence = self.presence();
        match presence.wait_for(|presence| *presence != Presence::Here).await.as_deref() {
            Ok(Presence::Away(reason)) => Loss { reason: reason.to_string(), stopped: false },
            _ => {
                let reason = "its process has stopped, or its machine is cut off".to_owned();
                Loss { reason, stopped: true }
            }
        }
    }

    /// The worker's own words on how busy it is.
    pub fn told(&self, load: Load) {
        let in_flight = self.in_flight.load(Ordering::Relaxed);
        *lock(&self.load) = Told { load, in_flight };
    }

    /// The worker's own words on what it has cached.
    pub fn told_prefixes(&self, told: CachedPrefixes) {
        let mut cached = lock(&self.cached);
        if told.anew {
            cached.clear();
        }
        for name in &told.gone {
            cached.remove(name);
        }
        for name in told.cached {
            if cached.len() >= proto::CACHED_PREFIXES_MAX {
                break;
            }
            cached.insert(name);
        }
    }

    /// Blocks at the beginning of a prompt that the worker has cached.
    pub fn cached(&self, key: &RouteKey) -> usize {
        let cached = lock(&self.cached);
        // A prefix is cached for as long as what extends it.
        key.blocks.partition_point(|name| cached.contains(name))
    }

    /// Sequences there, as well as is known.
    pub fn load(&self) -> usize {
        let own = self.in_flight.load(Ordering::Relaxed);
        let Told { load, in_flight } = &*lock(&self.load);
        let told = load.running as usize + load.waiting as usize;
        (told + own).saturating_sub(*in_flight).max(own)
    }

    /// The worker's own words, as it last said them; all 0 before.
    pub fn last_told(&self) -> Load {
        lock(&self.load).load
    }

    /// This router's own sequences there.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// The worker broke a stream or could not be reached. What breaks while it rests breaks with
    /// what broke before: a cable that many streams shared is one failure.
    pub fn failed(&self) {
        let mut faults = lock(&self.faults);
        if faults.rests_until.is_some_and(|until| Instant::now() < until) {
            return;
        }
        let rest = REST_FIRST.saturating_mul(1 << faults.in_a_row.min(8)).min(REST_MAX);
        faults.in_a_row = faults.in_a_row.saturating_add(1);
        faults.rests_until = Some(Instant::now() + rest);
    }

    /// The worker answered.
    pub fn works(&self) {
        *lock(&self.faults) = Faults::default();
    }

    pub fn rests(&self) -> bool {
        lock(&self.faults).rests_until.is_some_and(|until| Instant::now() < until)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Some(watcher) = self.watcher.get() {
            watcher.abort();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One sequence on a worker, counted until dropped.
pub(crate) struct InFlight {
    link: Arc<Link>,
    model: Arc<Model>,
    accepted: bool,
}

impl InFlight {
    pub fn new(link: Arc<Link>, model: Arc<Model>) -> Self {
        link.in_flight.fetch_add(1, Ordering::Relaxed);
        Self { link, model, accepted: false }
    }

    /// The worker took it: its end will free a place.
    pub fn accepted(&mut self) {
        self.accepted = true;
    }

    pub fn link(&self) -> &Arc<Link> {
        &self.link
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.link.in_flight.fetch_sub(1, Ordering::Relaxed);
        if self.accepted {
            self.model.line.place_freed();
        }
    }
}
