//! The workers of one version of a model.

use crate::{
    languages::LanguageSlot,
    link::{Link, Presence},
    policy::{RouteKey, Target},
    queue::Line,
    status::{ModelStatus, WorkerStatus},
};
use cluster::{Instance, State};
use engine::plan::BLOCK_TOKENS;
use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

/// What the router keeps for one version of a model.
pub(crate) struct Model {
    /// What clients ask for.
    pub name: String,
    pub fingerprint: String,
    /// Unix seconds at which this router first saw it.
    pub created: u64,
    pub language: LanguageSlot,
    /// Sequences that wait while every worker is full.
    pub line: Line,
}

impl Model {
    pub fn new(instance: &Instance) -> Self {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        Self {
            name: instance.model.clone(),
            fingerprint: instance.fingerprint.clone(),
            created,
            language: LanguageSlot::default(),
            line: Line::default(),
        }
    }
}

/// One worker in the roster.
pub(crate) struct Entry {
    pub instance: Arc<Instance>,
    pub link: Arc<Link>,
    pub model: Arc<Model>,
}

impl Entry {
    fn is_ready(&self) -> bool {
        self.instance.state == State::Ready && self.link.is_here()
    }

    fn status(&self) -> WorkerStatus {
        let Instance { id, address, state, ranks, context_max, blocks_total, epoch, .. } =
            &*self.instance;
        let presence = self.link.presence().borrow().clone();
        let load = self.link.last_told();
        let rests = self.link.rests();
        let (word, reason) = match presence {
            Presence::Here if *state == State::Loading => ("here", Some(self.loads_for())),
            _ if *state == State::Loading => ("unmet", Some(self.loads_for())),
            Presence::Unmet => ("unmet", Some("it has not answered yet".to_owned())),
            Presence::Silent => ("silent", Some("its process has stopped speaking".to_owned())),
            Presence::Away(reason) => ("away", Some(reason.to_string())),
            Presence::Here if *state == State::Draining => ("here", Some("it drains".to_owned())),
            Presence::Here if rests => ("here", Some("it broke a stream a moment ago".to_owned())),
            Presence::Here => ("here", None),
        };
        WorkerStatus {
            id: id.clone(),
            address: address.clone(),
            state: *state,
            presence: word.to_owned(),
            usable: reason.is_none(),
            reason,
            ranks: *ranks,
            epoch: *epoch,
            context_max: *context_max,
            running: load.running,
            waiting: load.waiting,
            places: load.places,
            prefill_tokens: load.prefill_tokens,
            blocks_free: load.blocks_free,
            blocks_total: *blocks_total,
            in_flight: self.link.in_flight(),
        }
    }

    /// What a loading worker does.
    fn loads_for(&self) -> String {
        match &*self.instance.reason {
            "" => "it loads".to_owned(),
            reason => format!("its group is formed anew: {reason}"),
        }
    }

    /// Tokens of prompt and answer that one sequence may have here.
    fn context(&self) -> usize {
        let pool = self.instance.blocks_total.saturating_mul(BLOCK_TOKENS);
        self.instance.context_max.min(pool)
    }
}

/// The workers of one version of a model; none while it is only remembered.
pub(crate) struct Version {
    pub model: Arc<Model>,
    pub entries: Vec<Arc<Entry>>,
}

/// What every worker of a version can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Capacity {
    pub context_max: usize,
    pub vocab_size: usize,
}

impl Version {
    /// Links to the workers that are ready and there.
    pub fn ready(&self) -> impl Iterator<Item = &Arc<Link>> {
        self.entries.iter().filter(|entry| entry.is_ready()).map(|entry| &entry.link)
    }

    /// Sequences that its workers may run or let wait, as far as they have said.
    pub fn places(&self) -> usize {
        self.ready().map(|link| link.last_told().places as usize).sum()
    }

    fn count(&self, state: State) -> usize {
        self.entries.iter().filter(|entry| entry.instance.state == state).count()
    }

    /// Whether a worker is on its way.
    pub fn loads(&self) -> bool {
        self.count(State::Loading) > 0
    }

    /// Whether the roster has a ready worker, there or not.
    pub fn is_listed(&self) -> bool {
        self.count(State::Ready) > 0
    }

    /// The least of what its ready workers can do; `None` without any.
    pub fn capacity(&self) -> Option<Capacity> {
        let ready = self.entries.iter().filter(|entry| entry.is_ready());
        ready
            .map(|e| Capacity { context_max: e.context(), vocab_size: e.instance.vocab_size })
            .reduce(|a, b| Capacity {
                context_max: a.context_max.min(b.context_max),
                vocab_size: a.vocab_size.min(b.vocab_size),
            })
    }

    /// Ready, rested workers that are not among `refused`, and how the policy sees them
    /// with a prompt of that key.
    pub fn candidates(&self, key: &RouteKey, refused: &[Arc<Link>]) -> Vec<(Arc<Link>, Target)> {
        let target =
            |link: &Link| Target { id: link.key(), load: link.load(), cached: link.cached(key) };
        self.ready()
            .filter(|link| !link.rests())
            .filter(|link| !refused.iter().any(|other| Arc::ptr_eq(link, other)))
            .map(|link| (link.clone(), target(link)))
            .collect()
    }

    /// Whether a worker other than this could take a sequence.
    pub fn has_other(&self, than: &Link) -> bool {
        self.ready().any(|link| !std::ptr::eq(&**link, than) && !link.rests())
    }

    /// Why there is no worker to give, for people.
    pub fn shortage(&self) -> String {
        let [ready, loading, draining] =
            [State::Ready, State::Loading, State::Draining].map(|state| self.count(state));
        let mut text = format!(
            "no worker of '{}' answers ({ready} ready but failing, {loading} loading, {draining} \
             draining)",
            self.model.name
        );
        let away = self.entries.iter().find_map(|entry| match &*entry.link.presence().borrow() {
            _ if !entry.instance.reason.is_empty() => {
                Some(format!("; {}: {}", entry.link.id(), entry.instance.reason))
            }
            Presence::Away(reason) => Some(format!("; {}: {reason}", entry.link.id())),
            Presence::Silent => Some(format!("; {} has stopped speaking", entry.link.id())),
            Presence::Unmet | Presence::Here => None,
        });
        text.extend(away);
        text
    }

    pub fn status(&self, serving: bool) -> ModelStatus {
        ModelStatus {
            name: self.model.name.clone(),
            fingerprint: self.model.fingerprint.clone(),
            serving,
            workers: self.entries.iter().map(|entry| entry.status()).collect(),
        }
    }

    /// For the choice among versions of one name: how many workers, and how new.
    pub fn rank(&self) -> (usize, usize, u64) {
        let started = self.entries.iter().map(|entry| entry.instance.started).min();
        (self.ready().count(), self.entries.len(), started.unwrap_or(0))
    }
}
