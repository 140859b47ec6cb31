//! What a watcher knows: the instances by key, and which of the missing ones it still believes in.
//!
//! Synchronous; the clock is handed in, so that tests decide what time it is.

use std::{
    collections::BTreeMap,
    mem,
    sync::Arc,
    time::{Duration, Instant},
};

use proto::etcd::{Event, KeyValue, RangeResponse, event::EventType};

use crate::{Instance, Roster};

pub(super) struct View {
    prefix: String,
    grace: Duration,
    /// `None`: a value that could not be read, kept so that it is told once.
    entries: BTreeMap<Vec<u8>, (i64, Option<Arc<Instance>>)>,
    /// Revision that `entries` stands for; older events are history.
    revision: i64,
    /// Until then a mass disappearance is put down to etcd.
    doubt_until: Option<Instant>,
    held: BTreeMap<Vec<u8>, Arc<Instance>>,
}

impl View {
    pub(super) fn new(prefix: String, grace: Duration) -> Self {
        let (entries, held) = (BTreeMap::new(), BTreeMap::new());
        Self { prefix, grace, entries, revision: 0, doubt_until: None, held }
    }

    /// The next revision to watch.
    pub(super) fn next_revision(&self) -> i64 {
        self.revision + 1
    }

    /// etcd failed: believe less in what vanishes for a while.
    pub(super) fn doubt(&mut self, now: Instant) {
        self.doubt_until = Some(now + self.grace);
    }

    /// Takes a whole list in place of what was known.
    pub(super) fn replace(&mut self, list: RangeResponse, now: Instant) {
        let revision = list.header.map_or(0, |header| header.revision);
        let mut before = mem::take(&mut self.entries);
        for kv in list.kvs {
            match before.remove(&kv.key) {
                // Rubbish is told once.
                Some(known) if known == (kv.mod_revision, None) => {
                    self.entries.insert(kv.key, known);
                }
                known => self.insert(&kv, known.and_then(|(_, instance)| instance)),
            }
        }
        self.revision = revision;
        self.vanished(before, now);
    }

    /// Takes one change. Changes that the last list already held are history.
    pub(super) fn apply(&mut self, event: &Event, now: Instant) {
        let Some(kv) = &event.kv else { return };
        if kv.mod_revision <= self.revision {
            return;
        }
        match event.r#type() {
            EventType::Put => self.insert(kv, None),
            EventType::Delete => {
                if let Some(entry) = self.entries.remove(&kv.key) {
                    self.vanished(BTreeMap::from([(kv.key.clone(), entry)]), now);
                }
            }
        }
    }

    /// What says the same as before stays the same value: readers compare addresses first.
    fn insert(&mut self, kv: &KeyValue, known: Option<Arc<Instance>>) {
        let instance = match read(&self.prefix, kv) {
            Ok(instance) => {
                self.held.remove(&kv.key);
                Some(known.filter(|known| **known == instance).unwrap_or_else(|| instance.into()))
            }
            Err(reason) => {
                let key = String::from_utf8_lossy(&kv.key);
                tracing::warn!(%key, reason, "instance skipped");
                None
            }
        };
        self.entries.insert(kv.key.clone(), (kv.mod_revision, instance));
    }

    /// One instance may die at any time; that many die together soon after trouble with etcd is
    /// far more likely the trouble.
    fn vanished(&mut self, gone: BTreeMap<Vec<u8>, (i64, Option<Arc<Instance>>)>, now: Instant) {
        let doubted = self.doubt_until.is_some_and(|until| now < until);
        if !doubted {
            return;
        }
        let gone = gone.into_iter().filter_map(|(key, (_, instance))| Some((key, instance?)));
        self.held.extend(gone);
        let left = self.entries.values().filter(|(_, instance)| instance.is_some()).count();
        if self.held.len() <= left {
            self.held.clear();
        } else if !self.held.is_empty() {
            let (held, seconds) = (self.held.len(), self.grace.as_secs());
            tracing::warn!(held, left, seconds, "instances vanished after trouble with etcd, kept");
        }
    }

    /// Forgets what was held once the doubt is over; says when to ask again.
    pub(super) fn settle(&mut self, now: Instant) -> Option<Instant> {
        let until = self.doubt_until?;
        if now < until {
            return Some(until);
        }
        self.doubt_until = None;
        self.held.clear();
        None
    }

    /// The whole set, in order of id.
    pub(super) fn roster(&self) -> Roster {
        let known = self.entries.values().filter_map(|(_, instance)| instance.as_ref());
        let mut all: Vec<_> = known.chain(self.held.values()).cloned().collect();
        all.sort_by(|a, b| a.id.cmp(&b.id));
        Arc::new(all)
    }
}

fn read(prefix: &str, kv: &KeyValue) -> Result<Instance, String> {
    let instance = Instance::decode(&kv.value)?;
    match kv.key.strip_prefix(prefix.as_bytes()) {
        Some(id) if id == instance.id.as_bytes() => Ok(instance),
        _ => Err(format!("it says that it is {:?}", instance.id)),
    }
}
