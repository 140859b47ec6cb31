//! What this router knows: for people who look for a fault, and for `lockstep status`.

use crate::RouterState;
use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering;

/// The whole of it; models in order of name, their workers in order of id.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub draining: bool,
    /// Choices being answered, waiting ones included.
    pub in_flight: usize,
    /// Of those, the ones that wait for a place on any worker.
    pub queued: usize,
    pub models: Vec<ModelStatus>,
}

/// One version of a model.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ModelStatus {
    pub name: String,
    pub fingerprint: String,
    /// Whether new requests for the name go to this version.
    pub serving: bool,
    pub workers: Vec<WorkerStatus>,
}

/// One worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WorkerStatus {
    pub id: String,
    pub address: String,
    /// What the roster says: loading, ready or draining.
    pub state: cluster::State,
    /// What this router finds: here, silent, away or unmet.
    pub presence: String,
    /// Whether it gets requests now.
    pub usable: bool,
    /// Why it does not.
    pub reason: Option<String>,
    pub ranks: usize,
    /// How often its group was formed, where ranks are processes; else 0.
    pub epoch: u64,
    pub context_max: usize,
    pub running: u32,
    pub waiting: u32,
    /// Sequences that may run or wait there.
    pub places: u32,
    pub prefill_tokens: u64,
    pub blocks_free: u32,
    pub blocks_total: usize,
    /// This router's own sequences there.
    pub in_flight: usize,
}

impl RouterState {
    pub(crate) fn status(&self) -> Status {
        let max = self.upstream.limits.in_flight_max;
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            draining: self.leaves(),
            in_flight: max.saturating_sub(self.in_flight.available_permits()),
            queued: self.upstream.queued.load(Ordering::Relaxed),
            models: self.upstream.targets.now().status(),
        }
    }
}
