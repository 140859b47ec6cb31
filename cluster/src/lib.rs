#![forbid(unsafe_code)]
//! Who is alive and what they serve: the roster, in memory, in etcd, or asked of a fixed list.
//! Beside it what every server needs: its end by signals, its log lines, how it tells its metrics,
//! and who comes in and how others are reached, with TLS and without.

mod dial;
mod etcd;
mod memory;
pub mod metrics;
pub mod port;
mod process;
pub mod shutdown;
mod static_list;
pub mod telemetry;

pub use dial::{Connector, Dialed};
pub use etcd::{Epoch, Etcd, EtcdOptions, GroupKey, Reign, route_to};
pub use memory::InMemory;
pub use static_list::StaticList;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// Whether an instance takes new requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Reading weights, or forming its group anew.
    Loading,
    /// Takes requests.
    Ready,
    /// Finishes what it has, takes nothing new.
    Draining,
}

/// One worker group as the roster shows it: facts that seldom change. How busy it is, it tells
/// routers itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// Unique for the life of the process.
    pub id: String,
    /// Name that clients ask for.
    pub model: String,
    /// Names weights, tokenizer and template: instances of one name and different fingerprints
    /// serve different models.
    pub fingerprint: String,
    /// gRPC address, e.g. `http://127.0.0.1:7001`.
    pub address: String,
    /// Version of the protocol between routers and workers.
    pub protocol: u32,
    /// Unix time at which the process announced itself, in milliseconds.
    pub started: u64,
    pub state: State,
    /// Tokens of prompt and answer together that one sequence may have.
    pub context_max: usize,
    /// Token ids at or above this do not exist.
    pub vocab_size: usize,
    /// Tensor-parallel ranks.
    pub ranks: usize,
    /// KV pool, in the engine's blocks.
    pub blocks_total: usize,
    /// How often its group was formed, where ranks are processes; else 0.
    #[serde(default)]
    pub epoch: u64,
    /// Why it does not take requests, where it should; else empty.
    #[serde(default)]
    pub reason: String,
}

/// Bytes of one instance in its outer form, at most.
const INSTANCE_BYTES_MAX: usize = 16 * 1024;

impl Instance {
    /// As JSON: what registries hold and what a worker says of itself.
    ///
    /// # Errors
    /// `Invalid` for more than 16 KiB.
    pub fn encode(&self) -> Result<Vec<u8>, MembershipError> {
        let invalid = |reason: String| {
            MembershipError::Invalid(format!("instance {} cannot be told: {reason}", self.id))
        };
        let value = serde_json::to_vec(self).map_err(|error| invalid(error.to_string()))?;
        if value.len() > INSTANCE_BYTES_MAX {
            return Err(invalid(format!("{} bytes, at most {INSTANCE_BYTES_MAX}", value.len())));
        }
        Ok(value)
    }

    /// Reads what `encode` wrote, here or in another process; without trusting it.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn decode(value: &[u8]) -> Result<Self, String> {
        if value.len() > INSTANCE_BYTES_MAX {
            return Err(format!("{} bytes, at most {INSTANCE_BYTES_MAX}", value.len()));
        }
        serde_json::from_slice(value).map_err(|error| error.to_string())
    }
}

/// Every known instance, in order of id. Always the whole set, never a difference.
pub type Roster = Arc<Vec<Arc<Instance>>>;

/// Why membership could not be set up or kept.
#[derive(Debug, thiserror::Error)]
pub enum MembershipError {
    /// The registry did not answer; the remedy is in the message.
    #[error(
        "etcd at {endpoints} is unreachable: {reason}; check --etcd and that the cluster has a \
         leader"
    )]
    Unreachable { endpoints: String, reason: String },
    /// The registry answered with a refusal.
    #[error("etcd refused: {0}")]
    Refused(String),
    /// A name, an address or an instance that cannot be used as given.
    #[error("{0}")]
    Invalid(String),
}

/// Keeps an instance in the roster until dropped (or `leave` is awaited, which says so at once).
#[async_trait::async_trait]
pub trait Registration: Send + Sync {
    /// Removes the instance from the roster and waits until the registry knows.
    async fn leave(self: Box<Self>);
}

/// The registry. Implementations: in memory (one process), etcd, a fixed list of addresses.
#[async_trait::async_trait]
pub trait Membership: Send + Sync + 'static {
    /// Puts the instance in the roster, follows its changes, and keeps it there through faults of
    /// the registry.
    async fn announce(
        &self,
        instance: watch::Receiver<Instance>,
    ) -> Result<Box<dyn Registration>, MembershipError>;
    /// The roster as last known; serving goes on with it while the registry is away.
    fn roster(&self) -> watch::Receiver<Roster>;
}

/// What transports wrap in sentences that say no more than that something failed.
fn root_cause<'a>(
    mut error: &'a (dyn std::error::Error + 'static),
) -> &'a (dyn std::error::Error + 'static) {
    while let Some(source) = error.source() {
        error = source;
    }
    error
}
