//! The workers as this router reaches them: one channel for each, rebuilt from the roster.
//!
//! A channel lives as long as its worker is in the roster and connects by itself. What the roster
//! says of a worker's load is corrected by what this router sent there since. A worker that broke
//! a stream is left alone for a moment, longer each time, and forgiven at its next message.
//! Models that left the roster are remembered, so that their clients hear "unavailable" and not
//! "unknown"; the memory is bounded.

use crate::{config::Deadlines, languages::LanguageSlot, policy::Target, queue::Line};
use cluster::{Instance, Roster, State};
use engine::plan::BLOCK_TOKENS;
use proto::v1::worker_client::WorkerClient;
use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use tokio::sync::watch;
use tonic::transport::{Channel, Endpoint};

/// One message between router and worker: prompts of millions of tokens fit.
const MESSAGE_BYTES_MAX: usize = 64 << 20;
/// Unread bytes of one stream: a slow client's tokens wait at the worker.
const STREAM_WINDOW: u32 = 64 << 10;
/// Unread bytes of all streams of one worker: a thousand stuck ones do not block the others.
const CONNECTION_WINDOW: u32 = 64 << 20;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Absent models that are remembered.
const ABSENT_MODELS_MAX: usize = 64;
/// Rest after a first failure; doubles with each further one.
const REST_FIRST: Duration = Duration::from_millis(250);
const REST_MAX: Duration = Duration::from_secs(8);

/// The connection to one worker, and what this router knows of it by its own experience.
pub(crate) struct Link {
    id: String,
    key: u64,
    pub address: String,
    channel: Channel,
    in_flight: AtomicUsize,
    faults: Mutex<Faults>,
}

#[derive(Default)]
struct Faults {
    in_a_row: u32,
    rests_until: Option<Instant>,
}

impl Link {
    fn new(instance: &Instance, connect: Duration) -> Result<Self, tonic::transport::Error> {
        let channel = Endpoint::from_shared(instance.address.clone())?
            .connect_timeout(connect)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .connect_lazy();
        let mut hasher = DefaultHasher::new();
        instance.id.hash(&mut hasher);
        Ok(Self {
            id: instance.id.clone(),
            key: hasher.finish(),
            address: instance.address.clone(),
            channel,
            in_flight: AtomicUsize::new(0),
            faults: Mutex::default(),
        })
    }

    /// The worker's name in the roster.
    pub fn id(&self) -> &str {
        &self.id
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

    /// The worker broke a stream or could not be reached.
    pub fn failed(&self) {
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        let rest = REST_FIRST.saturating_mul(1 << faults.in_a_row.min(8)).min(REST_MAX);
        faults.in_a_row = faults.in_a_row.saturating_add(1);
        faults.rests_until = Some(Instant::now() + rest);
    }

    /// The worker answered.
    pub fn works(&self) {
        *self.faults.lock().unwrap_or_else(PoisonError::into_inner) = Faults::default();
    }

    fn rests(&self) -> bool {
        let faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        faults.rests_until.is_some_and(|until| Instant::now() < until)
    }
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

    pub fn link(&self) -> &Link {
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

/// What the router keeps for a name that clients ask for.
pub(crate) struct Model {
    pub name: String,
    /// Unix seconds at which this router first saw it.
    pub created: u64,
    pub language: LanguageSlot,
    /// Sequences that wait while every worker is full.
    pub line: Line,
}

impl Model {
    fn new(name: &str) -> Self {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        Self {
            name: name.to_owned(),
            created,
            language: LanguageSlot::default(),
            line: Line::default(),
        }
    }
}

/// One worker in the roster.
#[derive(Clone)]
pub(crate) struct Entry {
    pub instance: Instance,
    pub link: Arc<Link>,
    /// This router's own sequences there when the roster last reported another load.
    in_flight_then: usize,
}

impl Entry {
    fn load(&self) -> usize {
        let own = self.link.in_flight.load(Ordering::Relaxed);
        let reported = self.instance.load.running + self.instance.load.waiting;
        (reported + own).saturating_sub(self.in_flight_then).max(own)
    }

    /// Tokens of prompt and answer that one sequence may have here.
    fn context(&self) -> usize {
        let pool = self.instance.blocks_total.saturating_mul(BLOCK_TOKENS);
        self.instance.context_max.min(pool)
    }
}

/// The roster at one moment.
#[derive(Clone, Default)]
pub(crate) struct Snapshot {
    pub entries: Vec<Entry>,
    /// By name; present ones and remembered absent ones.
    pub models: BTreeMap<String, Arc<Model>>,
}

/// What every worker of a model can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Capacity {
    pub context_max: usize,
    pub vocab_size: usize,
}

impl Snapshot {
    fn of<'a>(&'a self, model: &'a str) -> impl Iterator<Item = &'a Entry> {
        self.entries.iter().filter(move |entry| entry.instance.model == model)
    }

    /// Ready workers of a model.
    pub fn ready<'a>(&'a self, model: &'a str) -> impl Iterator<Item = &'a Entry> {
        self.of(model).filter(|entry| entry.instance.state == State::Ready)
    }

    /// Whether a worker of the model is on its way.
    pub fn loads(&self, model: &str) -> bool {
        self.of(model).any(|entry| entry.instance.state == State::Loading)
    }

    /// The least of what its ready workers can do; `None` without any.
    pub fn capacity(&self, model: &str) -> Option<Capacity> {
        self.ready(model)
            .map(|e| Capacity { context_max: e.context(), vocab_size: e.instance.vocab_size })
            .reduce(|a, b| Capacity {
                context_max: a.context_max.min(b.context_max),
                vocab_size: a.vocab_size.min(b.vocab_size),
            })
    }

    /// Ready, rested workers whose address is not in `refused`, and how the policy sees them.
    pub fn candidates(&self, model: &str, refused: &[Arc<Link>]) -> Vec<(Arc<Link>, Target)> {
        self.ready(model)
            .filter(|entry| !entry.link.rests())
            .filter(|entry| !refused.iter().any(|link| Arc::ptr_eq(link, &entry.link)))
            .map(|e| (e.link.clone(), Target { id: e.link.key, load: e.load() }))
            .collect()
    }

    /// Why a model has no worker to give, for people.
    pub fn shortage(&self, model: &str) -> String {
        let count = |state| self.of(model).filter(|e| e.instance.state == state).count();
        let (loading, ready) = (count(State::Loading), count(State::Ready));
        let draining = count(State::Draining);
        format!(
            "no worker of '{model}' answers ({ready} ready but failing, {loading} loading, \
             {draining} draining)"
        )
    }

    /// The snapshot that follows from a new roster.
    fn next(&self, roster: &[Instance], connect: Duration) -> Self {
        let mut entries = Vec::with_capacity(roster.len());
        for instance in roster {
            let known = self.entries.iter().find(|entry| {
                entry.instance.id == instance.id && entry.link.address == instance.address
            });
            let (link, in_flight_then) = match known {
                Some(entry) if entry.instance.load == instance.load => {
                    (entry.link.clone(), entry.in_flight_then)
                }
                Some(entry) => (entry.link.clone(), entry.link.in_flight.load(Ordering::Relaxed)),
                None => match Link::new(instance, connect) {
                    Ok(link) => (Arc::new(link), 0),
                    Err(error) => {
                        tracing::warn!(
                            instance = instance.id,
                            address = instance.address,
                            %error,
                            "worker left out: its address is not a URI"
                        );
                        continue;
                    }
                },
            };
            entries.push(Entry { instance: instance.clone(), link, in_flight_then });
        }
        let models = self.next_models(&entries);
        Self { entries, models }
    }

    fn next_models(&self, entries: &[Entry]) -> BTreeMap<String, Arc<Model>> {
        let mut models = BTreeMap::new();
        for entry in entries {
            let name = &entry.instance.model;
            let model = || self.models.get(name).cloned();
            models
                .entry(name.clone())
                .or_insert_with(|| model().unwrap_or_else(|| Arc::new(Model::new(name))));
        }
        let mut absent: Vec<_> =
            self.models.iter().filter(|(name, _)| !models.contains_key(*name)).collect();
        absent.sort_by_key(|(_, model)| std::cmp::Reverse(model.created));
        for (name, model) in absent.into_iter().take(ABSENT_MODELS_MAX) {
            model.language.forget();
            models.insert(name.clone(), model.clone());
        }
        models
    }
}

/// The workers, followed through the roster's changes.
#[derive(Clone)]
pub(crate) struct Targets {
    snapshots: watch::Receiver<Arc<Snapshot>>,
}

impl Targets {
    /// Follows the roster in a task of its own, which ends with the last `Targets`.
    pub fn follow(mut roster: watch::Receiver<Roster>, deadlines: &Deadlines) -> Self {
        let connect = deadlines.connect;
        let first = Snapshot::default().next(&roster.borrow_and_update().clone(), connect);
        let (sender, snapshots) = watch::channel(Arc::new(first));
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    changed = roster.changed() => if changed.is_err() {
                        // It ends with the membership, which the end of the process drops first.
                        tracing::debug!("the roster ended; serving on as last known");
                        sender.closed().await;
                        return;
                    },
                    () = sender.closed() => return,
                }
                let now = roster.borrow_and_update().clone();
                let next = sender.borrow().next(&now, connect);
                sender.send_replace(Arc::new(next));
            }
        });
        Self { snapshots }
    }

    pub fn now(&self) -> Arc<Snapshot> {
        self.snapshots.borrow().clone()
    }

    /// Waits until the roster changes.
    pub async fn changed(&mut self) {
        if self.snapshots.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
