//! Keeps the roster's entry of this worker true: its state and how busy it is.

use std::{sync::Arc, time::Duration};

use cluster::{Instance, Load, Membership, Registration, State};
use engine::Stats;
use tokio::{sync::watch, task::JoinHandle, time};

use crate::{ModelInfo, WorkerError};

/// Load changes with every token; the roster hears of it at most this often.
const LOAD_PERIOD: Duration = Duration::from_millis(100);

/// This worker's place in the roster.
pub(crate) struct Announcement {
    instance: Arc<watch::Sender<Instance>>,
    registration: Box<dyn Registration>,
    load: Option<JoinHandle<()>>,
}

impl Announcement {
    /// Enters the roster as loading.
    pub async fn new(
        membership: &dyn Membership,
        id: String,
        (model, address): (String, String),
        info: &ModelInfo,
    ) -> Result<Self, WorkerError> {
        let instance = Instance {
            id,
            model,
            address,
            state: State::Loading,
            context_max: info.context_max,
            vocab_size: info.vocab,
            ranks: info.ranks,
            blocks_total: info.blocks,
            load: Load { running: 0, waiting: 0, blocks_free: info.blocks },
        };
        let (sender, receiver) = watch::channel(instance);
        let registration = membership.announce(receiver).await?;
        Ok(Self { instance: Arc::new(sender), registration, load: None })
    }

    /// Requests may come; from now on the load follows the engine's figures.
    pub fn ready(&mut self, mut stats: watch::Receiver<Stats>) {
        self.set_state(State::Ready);
        let instance = Arc::clone(&self.instance);
        self.load = Some(tokio::spawn(async move {
            while stats.changed().await.is_ok() {
                let now = *stats.borrow_and_update();
                let load = Load {
                    running: now.running,
                    waiting: now.waiting,
                    blocks_free: now.blocks_free,
                };
                instance.send_if_modified(|instance| {
                    std::mem::replace(&mut instance.load, load) != load
                });
                time::sleep(LOAD_PERIOD).await;
            }
        }));
    }

    /// What the roster is told, now and later.
    pub fn instance(&self) -> watch::Receiver<Instance> {
        self.instance.subscribe()
    }

    pub fn set_state(&self, state: State) {
        self.instance.send_modify(|instance| instance.state = state);
    }

    /// Leaves the roster and waits, up to `limit`, until it says so.
    pub async fn leave(self, limit: Duration) {
        if let Some(load) = &self.load {
            load.abort();
        }
        if time::timeout(limit, self.registration.leave()).await.is_err() {
            tracing::warn!("the registry did not confirm leaving; the lease will run out");
        }
    }
}
