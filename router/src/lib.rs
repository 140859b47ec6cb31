#![forbid(unsafe_code)]
//! The front of the cluster: gRPC and OpenAI HTTP in, worker streams out.
//!
//! Stateless: text becomes token ids here, a policy picks a worker, and the worker's ids become
//! text again. What breaks underneath is mended here (see `upstream`) or told in plain words.
//! Everything is bounded: bodies, connections, requests in flight, lines, indices, waits.

mod aliases;
mod choice;
mod config;
mod dial;
mod error;
mod facts;
mod generate;
mod grpc;
mod http;
mod languages;
mod link;
mod losses;
mod metrics;
mod openai;
mod opening;
mod placement;
pub mod policy;
mod presence;
mod queue;
mod record;
mod request;
mod resume;
mod sampling;
mod server;
mod service;
#[cfg(test)]
mod simulation;
mod status;
mod targets;
mod time_limit;
mod trace;
mod upstream;
mod version;

pub use config::{Deadlines, Limits, RouterConfig};
pub use error::RouterError;
pub use sampling::sampling_params;
pub use server::{Router, RouterHandle};
pub use status::{ModelStatus, Status, WorkerStatus};

use aliases::Aliases;
use metrics::Metrics;
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use upstream::Upstream;

/// What every request of one router shares.
struct RouterState {
    upstream: Arc<Upstream>,
    aliases: Aliases,
    metrics: Arc<Metrics>,
    /// Threads that may tokenise long text at once.
    tokenizers: Arc<Semaphore>,
    /// One permit for each choice.
    in_flight: Arc<Semaphore>,
    /// True: health says that this router ends.
    leaving: watch::Sender<bool>,
    /// True: take nothing new.
    drain: watch::Sender<bool>,
    /// True: end what still runs.
    stop: watch::Sender<bool>,
}

/// Waits until a flag is up. A sender that is gone can no longer raise it: that counts as well.
async fn raised(flag: &mut watch::Receiver<bool>) {
    drop(flag.wait_for(|up| *up).await);
}

impl RouterState {
    /// Room for `choices` more. Errors: `Overloaded`.
    fn permit(&self, choices: usize) -> Result<OwnedSemaphorePermit, RouterError> {
        let count = u32::try_from(choices).unwrap_or(u32::MAX);
        self.in_flight.clone().try_acquire_many_owned(count).map_err(|_| {
            let max = self.upstream.limits.in_flight_max;
            queue::overloaded(&format!("this router holds {max} choices at most"), None)
        })
    }

    fn idle(&self) -> bool {
        self.in_flight.available_permits() >= self.upstream.limits.in_flight_max
    }

    /// Whether balancers should send nothing new here.
    fn leaves(&self) -> bool {
        *self.leaving.borrow()
    }

    fn count_refusal(&self, error: &RouterError) {
        if matches!(error, RouterError::Overloaded { .. }) {
            self.metrics.rejected.inc();
        }
    }

    /// Names that can be asked for now: models with at least one ready worker, then aliases of
    /// these.
    fn served(&self) -> Vec<proto::v1::Model> {
        let now = self.upstream.targets.now();
        let served = now.names().filter_map(|name| {
            let version = now.serving(name)?;
            let capacity = version.capacity()?;
            let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
            Some(proto::v1::Model {
                id: name.to_owned(),
                context_max: count(capacity.context_max),
                workers: count(version.ready().count()),
                created: version.model.created,
                root: String::new(),
            })
        });
        self.aliases.listed(served.collect())
    }
}
