//! The workers as this router reaches them: one link for each, followed through the roster's
//! changes.
//!
//! Workers of one name whose fingerprints differ serve different versions of a model. New requests
//! go to the version with the most workers, the newer of equals; a stream stays with its own. Work
//! on a change of the roster follows from what changed, not from how many workers there are.
//! Versions that left the roster are remembered, so that their clients hear "unavailable" and not
//! "unknown"; the memory is bounded.

use crate::{
    config::Deadlines,
    dial::Dial,
    link::Link,
    losses::Losses,
    presence::News,
    status::ModelStatus,
    version::{Entry, Model, Version},
};
use cluster::{Instance, Roster, State};
use std::{
    cmp::Ordering::{Equal, Greater, Less},
    collections::BTreeMap,
    sync::Arc,
};
use tokio::sync::watch;

/// Absent versions that are remembered.
const ABSENT_MAX: usize = 64;

/// The roster at one moment.
#[derive(Clone, Default)]
pub(crate) struct Snapshot {
    /// In order of id.
    entries: Vec<Arc<Entry>>,
    /// By name; present versions and remembered absent ones.
    names: BTreeMap<String, Vec<Arc<Version>>>,
}

impl Snapshot {
    /// Every name that is or was served.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }

    /// Names with a worker in the roster.
    pub fn present(&self) -> impl Iterator<Item = &str> {
        let present = |versions: &[Arc<Version>]| versions.iter().any(|v| !v.entries.is_empty());
        self.names.iter().filter(move |(_, versions)| present(versions)).map(|(name, _)| &**name)
    }

    /// The version that new requests for a name go to.
    pub fn serving(&self, name: &str) -> Option<&Version> {
        match &self.names.get(name)?[..] {
            [only] => Some(only),
            several => {
                several.iter().max_by_key(|version| version.rank()).map(|version| &**version)
            }
        }
    }

    /// Everything that is known, of versions with workers.
    pub fn status(&self) -> Vec<ModelStatus> {
        let versions = self.names.iter().flat_map(|(name, versions)| {
            let serving = self.serving(name).map(|version| version.model.fingerprint.clone());
            let present = versions.iter().filter(|version| !version.entries.is_empty());
            present.map(move |v| v.status(serving.as_deref() == Some(&v.model.fingerprint)))
        });
        versions.collect()
    }

    /// The workers of a version; `None` once it is forgotten.
    pub fn version(&self, model: &Model) -> Option<&Version> {
        let versions = self.names.get(&model.name)?;
        versions.iter().find(|v| v.model.fingerprint == model.fingerprint).map(|v| &**v)
    }

    fn next(&self, roster: &[Arc<Instance>], links: &Links) -> Self {
        let mut next =
            Self { entries: Vec::with_capacity(roster.len()), names: self.names.clone() };
        let mut changed: Vec<Arc<Model>> = Vec::new();
        let mut old = self.entries.iter().peekable();
        for instance in roster {
            let mut known = None;
            while let Some(entry) = old.peek() {
                match entry.instance.id.cmp(&instance.id) {
                    Less => changed.push(entry.model.clone()),
                    Equal => known = Some(*entry),
                    Greater => break,
                }
                old.next();
            }
            let entry = match known {
                Some(entry) if Arc::ptr_eq(&entry.instance, instance) => entry.clone(),
                known => {
                    changed.extend(known.map(|entry| entry.model.clone()));
                    let Some(entry) = next.entry(known, instance, links) else { continue };
                    changed.push(entry.model.clone());
                    entry
                }
            };
            next.entries.push(entry);
        }
        changed.extend(old.map(|entry| entry.model.clone()));
        next.regroup(changed);
        next
    }

    /// A new or changed instance; `None` where its address is none.
    fn entry(
        &mut self,
        known: Option<&Arc<Entry>>,
        instance: &Arc<Instance>,
        links: &Links,
    ) -> Option<Arc<Entry>> {
        let facts = |i: &Instance| (i.address.clone(), i.fingerprint.clone(), i.model.clone());
        let known = known.filter(|known| facts(&known.instance) == facts(instance));
        let (link, model) = match known {
            Some(known) => (known.link.clone(), known.model.clone()),
            None => (links.link(instance)?, self.model(instance)),
        };
        if instance.state != State::Loading {
            link.watch(instance, &links.news, &links.deadlines);
        }
        Some(Arc::new(Entry { instance: instance.clone(), link, model }))
    }

    /// What is kept for the instance's version, from now on.
    fn model(&mut self, instance: &Instance) -> Arc<Model> {
        let versions = self.names.entry(instance.model.clone()).or_default();
        let known = versions.iter().find(|v| v.model.fingerprint == instance.fingerprint);
        if let Some(version) = known {
            return version.model.clone();
        }
        let model = Arc::new(Model::new(instance));
        versions.push(Arc::new(Version { model: model.clone(), entries: Vec::new() }));
        model
    }

    /// Gives the versions that changed their workers anew.
    fn regroup(&mut self, mut changed: Vec<Arc<Model>>) {
        changed.sort_by_key(|model| Arc::as_ptr(model) as usize);
        changed.dedup_by(|a, b| Arc::ptr_eq(a, b));
        for model in changed {
            let of_it = self.entries.iter().filter(|entry| Arc::ptr_eq(&entry.model, &model));
            let entries: Vec<_> = of_it.cloned().collect();
            if entries.is_empty() {
                model.language.forget();
            }
            let Some(versions) = self.names.get_mut(&model.name) else { continue };
            let count = |v: &&Arc<Version>| !v.entries.is_empty();
            let before = versions.iter().filter(count).count();
            for version in versions.iter_mut().filter(|v| Arc::ptr_eq(&v.model, &model)) {
                *version = Arc::new(Version { model: model.clone(), entries: entries.clone() });
            }
            let now = versions.iter().filter(count).count();
            if now > 1 && now > before {
                let (name, fingerprint) = (&*model.name, &*model.fingerprint);
                tracing::warn!(
                    model = name,
                    fingerprint,
                    versions = now,
                    "workers of one name serve different weights, tokenizers or templates: new \
                     requests go to the version with the most workers"
                );
            }
        }
        self.forget();
    }

    /// Drops the absent versions that were first seen the longest ago.
    fn forget(&mut self) {
        let absent = |v: &&Arc<Version>| v.entries.is_empty();
        let mut created: Vec<u64> =
            self.names.values().flatten().filter(absent).map(|v| v.model.created).collect();
        if created.len() <= ABSENT_MAX {
            return;
        }
        created.sort_unstable_by_key(|&at| std::cmp::Reverse(at));
        let oldest = created[ABSENT_MAX];
        let mut drop = created.len() - ABSENT_MAX;
        for versions in self.names.values_mut() {
            versions.retain(|version| {
                let goes =
                    drop > 0 && version.entries.is_empty() && version.model.created <= oldest;
                drop -= usize::from(goes);
                !goes
            });
        }
        self.names.retain(|_, versions| !versions.is_empty());
    }
}

/// What new links are made with.
struct Links {
    dial: Dial,
    deadlines: Deadlines,
    news: News,
}

impl Links {
    fn link(&self, instance: &Instance) -> Option<Arc<Link>> {
        match (self.dial)(instance) {
            Ok(channel) => Some(Arc::new(Link::new(instance, channel))),
            Err(error) => {
                let (worker, address) = (&*instance.id, &*instance.address);
                tracing::warn!(worker, address, %error, "worker left out: its address is no URI");
                None
            }
        }
    }
}

/// The workers, followed through the roster's changes.
#[derive(Clone)]
pub(crate) struct Targets {
    snapshots: watch::Receiver<Arc<Snapshot>>,
    news: watch::Receiver<()>,
    losses: Arc<Losses>,
}

impl Targets {
    /// Follows the roster in a task of its own, which ends with the last `Targets`.
    pub fn follow(mut roster: watch::Receiver<Roster>, deadlines: &Deadlines, dial: Dial) -> Self {
        let all = News::default();
        let (news, losses) = (all.changed.subscribe(), all.losses.clone());
        let links = Links { dial, deadlines: *deadlines, news: all };
        let first = Snapshot::default().next(&roster.borrow_and_update().clone(), &links);
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
                let next = sender.borrow().next(&now, &links);
                sender.send_replace(Arc::new(next));
            }
        });
        Self { snapshots, news, losses }
    }

    pub fn now(&self) -> Arc<Snapshot> {
        self.snapshots.borrow().clone()
    }

    /// Workers that broke lately.
    pub fn losses(&self) -> &Losses {
        &self.losses
    }

    /// Changes from now on: of the roster, and of which workers are there.
    pub fn changes(&self) -> Changes {
        let mut changes = Changes(self.clone());
        changes.0.snapshots.mark_unchanged();
        changes.0.news.mark_unchanged();
        changes
    }
}

/// See [`Targets::changes`].
pub(crate) struct Changes(Targets);

impl Changes {
    /// Waits for one since the last call.
    pub async fn next(&mut self) {
        let Targets { snapshots, news, .. } = &mut self.0;
        let changed = tokio::select! {
            changed = snapshots.changed() => changed,
            changed = news.changed() => changed,
        };
        if changed.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dial;
    use std::time::Instant;

    fn links() -> Links {
        let deadlines = Deadlines::default();
        Links { dial: dial::tcp(deadlines.hello, None), deadlines, news: News::default() }
    }

    /// Loading, so that nobody connects.
    fn instance(at: usize, model: &str, fingerprint: &str) -> Arc<Instance> {
        Arc::new(Instance {
            id: format!("10.0.{}.{}:7001-{at:08x}", at / 256, at % 256),
            model: model.into(),
            fingerprint: fingerprint.into(),
            address: format!("http://10.0.{}.{}:7001", at / 256, at % 256),
            protocol: proto::WORKER_PROTOCOL,
            started: at as u64,
            state: State::Loading,
            context_max: 4096,
            vocab_size: 1000,
            ranks: 1,
            blocks_total: 100,
            epoch: 0,
            reason: String::new(),
        })
    }

    fn sorted(mut roster: Vec<Arc<Instance>>) -> Vec<Arc<Instance>> {
        roster.sort_by(|a, b| a.id.cmp(&b.id));
        roster
    }

    #[tokio::test]
    async fn a_change_touches_what_changed_and_nothing_else() {
        let links = links();
        let roster = |models: [&str; 4]| {
            let each = models.into_iter().enumerate();
            sorted(each.map(|(at, model)| instance(at, model, "f")).collect())
        };
        let all = roster(["a", "a", "b", "c"]);
        let first = Snapshot::default().next(&all, &links);
        assert_eq!(first.present().collect::<Vec<_>>(), ["a", "b", "c"]);
        let mut changed = all.clone();
        let ready = Instance { context_max: 99, ..(*changed[0]).clone() };
        changed[0] = Arc::new(ready);
        changed.remove(3);
        changed.push(instance(9, "a", "g"));
        let second = first.next(&sorted(changed), &links);
        let version = |snapshot: &Snapshot, name: &str| snapshot.names[name][0].clone();
        assert!(Arc::ptr_eq(&version(&first, "b"), &version(&second, "b")), "untouched");
        let [before, after] = [&first, &second].map(|snapshot| version(snapshot, "a"));
        assert!(Arc::ptr_eq(&before.model, &after.model), "the same model");
        assert!(Arc::ptr_eq(&before.entries[0].link, &after.entries[0].link), "the same link");
        assert!(Arc::ptr_eq(&before.entries[1], &after.entries[1]), "untouched");
        assert_eq!(after.entries[0].instance.context_max, 99);
        assert_eq!(second.names["a"].len(), 2, "another fingerprint is another version");
        assert_eq!(second.present().collect::<Vec<_>>(), ["a", "b"]);
        assert!(second.names().any(|name| name == "c"), "what left is remembered");
        // Whoever moves, even in place, is met anew.
        let moved = Instance { address: "http://10.9.9.9:1".into(), ..(*all[2]).clone() };
        let third = second.next(&[Arc::new(moved)], &links);
        let [before, after] = [&second, &third].map(|snapshot| version(snapshot, "b"));
        assert!(!Arc::ptr_eq(&before.entries[0].link, &after.entries[0].link));
    }

    #[tokio::test]
    async fn the_memory_of_what_left_is_bounded() {
        let links = links();
        let mut snapshot = Snapshot::default();
        for at in 0..3 * ABSENT_MAX {
            snapshot = snapshot.next(&[instance(at, "m", &format!("f{at}"))], &links);
        }
        assert_eq!(snapshot.names["m"].len(), ABSENT_MAX + 1);
        assert_eq!(snapshot.present().count(), 1);
    }

    /// `cargo test --release -p router -- --ignored --nocapture a_change_among`
    #[tokio::test]
    #[ignore = "a measurement"]
    async fn a_change_among_many_workers_takes_so_long() {
        let links = links();
        for workers in [100, 1000, 3000] {
            let mut roster =
                sorted((0..workers).map(|at| instance(at, "m", "f")).collect::<Vec<_>>());
            let mut snapshot = Snapshot::default().next(&roster, &links);
            let rounds = 200;
            let started = Instant::now();
            for round in 0..rounds {
                let at = round * 7 % workers;
                let changed = Instance { context_max: round, ..(*roster[at]).clone() };
                roster[at] = Arc::new(changed);
                snapshot = snapshot.next(&roster, &links);
            }
            println!("{workers} workers: {:?} for a change", started.elapsed() / rounds as u32);
            assert_eq!(snapshot.entries.len(), workers);
        }
    }
}
