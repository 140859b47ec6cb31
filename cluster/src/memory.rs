//! The roster of one process: what announces and what reads share it directly.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::watch;

use crate::{Instance, Membership, MembershipError, Registration, Roster};

/// Membership for a router and workers that live in one process. Clones share one roster.
#[derive(Clone)]
pub struct InMemory {
    shared: Arc<Members>,
}

struct Members {
    instances: Mutex<BTreeMap<String, Arc<Instance>>>,
    roster: watch::Sender<Roster>,
}

impl Default for InMemory {
    fn default() -> Self {
        Self::new()
    }
}

impl InMemory {
    /// An empty roster.
    pub fn new() -> Self {
        let shared =
            Members { instances: Mutex::default(), roster: watch::Sender::new(Roster::default()) };
        Self { shared: Arc::new(shared) }
    }
}

impl Members {
    /// Changes the set and shows the whole of it, as one step for every observer.
    fn change(&self, edit: impl FnOnce(&mut BTreeMap<String, Arc<Instance>>)) {
        let mut instances = self.instances.lock().unwrap_or_else(PoisonError::into_inner);
        edit(&mut instances);
        let roster = Arc::new(instances.values().cloned().collect());
        self.roster.send_replace(roster);
    }
}

#[async_trait::async_trait]
impl Membership for InMemory {
    async fn announce(
        &self,
        mut instance: watch::Receiver<Instance>,
    ) -> Result<Box<dyn Registration>, MembershipError> {
        let first = Arc::new(instance.borrow_and_update().clone());
        let id = first.id.clone();
        self.shared.change(|all| {
            all.insert(id.clone(), first);
        });
        let (shared, followed) = (self.shared.clone(), id.clone());
        let follower = tokio::spawn(async move {
            while instance.changed().await.is_ok() {
                let current = Arc::new(instance.borrow_and_update().clone());
                // Only what is still there is updated: an update may race with the leaving.
                shared.change(|all| {
                    if let Some(entry) = all.get_mut(&followed) {
                        *entry = current;
                    }
                });
            }
        });
        Ok(Box::new(InMemoryRegistration { shared: self.shared.clone(), id, follower }))
    }

    fn roster(&self) -> watch::Receiver<Roster> {
        self.shared.roster.subscribe()
    }
}

struct InMemoryRegistration {
    shared: Arc<Members>,
    id: String,
    follower: tokio::task::JoinHandle<()>,
}

#[async_trait::async_trait]
impl Registration for InMemoryRegistration {
    async fn leave(self: Box<Self>) {}
}

impl Drop for InMemoryRegistration {
    fn drop(&mut self) {
        self.follower.abort();
        self.shared.change(|all| {
            all.remove(&self.id);
        });
    }
}
