//! Keeps the roster's entry of this worker true.

use std::{
    net::SocketAddr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use cluster::{Instance, Membership, Registration, State};
use tokio::{sync::watch, time};

use crate::{ModelInfo, WorkerError};

/// Of a reason, so much is told.
const REASON_CHARS_MAX: usize = 500;

/// This worker's place in the roster.
pub(crate) struct Announcement {
    instance: watch::Sender<Instance>,
    registration: Box<dyn Registration>,
}

impl Announcement {
    /// Enters the roster as loading; `listens` is where, for the name.
    pub async fn new(
        membership: &dyn Membership,
        listens: SocketAddr,
        (model, address): (String, String),
        info: &ModelInfo,
    ) -> Result<Self, WorkerError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let instance = Instance {
            // Unique for the life of the process, and after it: ports and process ids come back.
            id: format!("{listens}-{}-{:x}", std::process::id(), now.as_nanos()),
            model,
            fingerprint: info.fingerprint.clone(),
            address,
            protocol: proto::WORKER_PROTOCOL,
            started: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
            state: State::Loading,
            context_max: info.context_max,
            vocab_size: info.vocab,
            ranks: info.ranks,
            blocks_total: info.blocks,
            epoch: 0,
            reason: String::new(),
        };
        let (sender, receiver) = watch::channel(instance);
        let registration = membership.announce(receiver).await?;
        Ok(Self { instance: sender, registration })
    }

    /// What the roster is told, now and later.
    pub fn instance(&self) -> watch::Receiver<Instance> {
        self.instance.subscribe()
    }

    /// `reason`: why the group does not serve, where it should.
    pub fn set(&self, state: State, epoch: u64, reason: &str) {
        // Of what ranks said last there may be much.
        let reason: String = reason.chars().take(REASON_CHARS_MAX).collect();
        self.instance.send_modify(|instance| {
            *instance = Instance { state, epoch, reason, ..instance.clone() };
        });
    }

    /// Leaves the roster and waits, up to `limit`, until it says so.
    pub async fn leave(self, limit: Duration) {
        if time::timeout(limit, self.registration.leave()).await.is_err() {
            tracing::warn!("the registry did not confirm leaving; the lease will run out");
        }
    }
}
