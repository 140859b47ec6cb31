//! Which prefixes this worker has cached, for the routers that watch it.
//!
//! The engine loop notes what changes; each watcher asks for what it has not heard of, and gets
//! everything anew where it has fallen behind too far.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

use engine::blocks::PrefixChange;
use proto::v1::CachedPrefixes;
use tokio::sync::watch;

/// Prefixes that are told of: half a million tokens, and as many as a router remembers of a worker.
const NAMES_MAX: usize = proto::CACHED_PREFIXES_MAX;
/// Changes that a watcher may be behind.
const CHANGES_MAX: usize = 1 << 14;

#[derive(Default)]
struct Known {
    names: HashSet<u64>,
    /// The last changes, and how many there were before them.
    changes: VecDeque<PrefixChange>,
    forgotten: u64,
}

/// The prefixes of one engine, by name.
#[derive(Default)]
pub(crate) struct Prefixes {
    known: Mutex<Known>,
    changed: watch::Sender<()>,
}

impl Prefixes {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Prefixes were cached or given up, in this order.
    pub fn note(&self, changes: Vec<PrefixChange>) {
        if changes.is_empty() {
            return;
        }
        let mut known = self.known();
        for change in changes {
            let PrefixChange { name, is_cached } = change;
            let is_news = match is_cached {
                true => known.names.len() < NAMES_MAX && known.names.insert(name),
                false => known.names.remove(&name),
            };
            if is_news {
                known.changes.push_back(change);
            }
        }
        while known.changes.len() > CHANGES_MAX {
            known.changes.pop_front();
            known.forgotten += 1;
        }
        drop(known);
        self.changed.send_replace(());
    }

    /// Nothing is cached any more.
    pub fn clear(&self) {
        let gone: Vec<_> = self.known().names.iter().copied().collect();
        self.note(gone.into_iter().map(|name| PrefixChange { name, is_cached: false }).collect());
    }

    /// For a watcher that has heard of nothing yet.
    pub fn watch(&self) -> Seen {
        Seen { changes: None, changed: self.changed.subscribe() }
    }
}

/// How far a watcher has heard.
pub(crate) struct Seen {
    /// `None` before everything was told once.
    changes: Option<u64>,
    changed: watch::Receiver<()>,
}

impl Seen {
    /// Waits until there may be news.
    pub async fn changed(&mut self) {
        if self.changed.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// What the watcher has not heard of; from now on it has.
    pub fn news(&mut self, prefixes: &Prefixes) -> Option<CachedPrefixes> {
        self.changed.mark_unchanged();
        let known = prefixes.known();
        let now = known.forgotten + known.changes.len() as u64;
        let before = self.changes.replace(now);
        let Some(before) = before.filter(|before| *before >= known.forgotten) else {
            let cached: Vec<u64> = known.names.iter().copied().collect();
            let anew = CachedPrefixes { anew: true, cached, gone: Vec::new() };
            return (before.is_some() || !anew.cached.is_empty()).then_some(anew);
        };
        let skip = usize::try_from(before - known.forgotten).unwrap_or(usize::MAX);
        let mut last: HashMap<u64, bool> = HashMap::new();
        for change in known.changes.iter().skip(skip) {
            last.insert(change.name, change.is_cached);
        }
        if last.is_empty() {
            return None;
        }
        let of = |wanted: bool| {
            last.iter().filter(|(_, is)| **is == wanted).map(|(name, _)| *name).collect()
        };
        Some(CachedPrefixes { anew: false, cached: of(true), gone: of(false) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(name: u64, is_cached: bool) -> PrefixChange {
        PrefixChange { name, is_cached }
    }

    /// What a watcher believes.
    #[derive(Default)]
    struct Belief(HashSet<u64>);

    impl Belief {
        fn hear(&mut self, seen: &mut Seen, prefixes: &Prefixes) -> bool {
            let Some(CachedPrefixes { anew, cached, gone }) = seen.news(prefixes) else {
                return false;
            };
            if anew {
                self.0.clear();
            }
            self.0.extend(cached);
            gone.iter().for_each(|name| assert!(self.0.remove(name) || !anew));
            true
        }
    }

    #[test]
    fn a_watcher_hears_of_each_change_once() {
        let prefixes = Prefixes::default();
        let (mut seen, mut belief) = (prefixes.watch(), Belief::default());
        assert!(!belief.hear(&mut seen, &prefixes), "nothing is cached");
        prefixes.note(vec![change(1, true), change(3, true), change(3, false)]);
        assert!(belief.hear(&mut seen, &prefixes));
        assert!(!belief.hear(&mut seen, &prefixes));
        prefixes.note(vec![change(1, false), change(1, true), change(5, true)]);
        // One that comes later hears of everything.
        let (mut late, mut latecomer) = (prefixes.watch(), Belief::default());
        assert!(belief.hear(&mut seen, &prefixes) && latecomer.hear(&mut late, &prefixes));
        assert_eq!(belief.0, HashSet::from([1, 5]));
        assert_eq!(latecomer.0, belief.0);
        prefixes.clear();
        assert!(belief.hear(&mut seen, &prefixes) && belief.0.is_empty());
    }

    #[test]
    fn whoever_is_far_behind_hears_of_everything_and_nothing_grows() {
        let prefixes = Prefixes::default();
        let (mut seen, mut belief) = (prefixes.watch(), Belief::default());
        prefixes.note(vec![change(1, true)]);
        belief.hear(&mut seen, &prefixes);
        let many = 2..3 * NAMES_MAX as u64;
        many.clone().for_each(|name| prefixes.note(vec![change(name, true)]));
        many.clone().for_each(|name| prefixes.note(vec![change(name, false)]));
        prefixes.note(vec![change(7, true)]);
        let known = prefixes.known();
        assert!(known.changes.len() <= CHANGES_MAX && known.names.len() == 2);
        drop(known);
        assert!(belief.hear(&mut seen, &prefixes));
        assert_eq!(belief.0, HashSet::from([1, 7]));
    }
}
