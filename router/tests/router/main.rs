//! The router as its clients see it, with scripted workers behind it.

mod aliases;
mod client;
mod connections;
mod faults;
mod grpc;
mod interop;
mod line;
mod logs;
mod openai;
mod presence;
mod raw;
mod resume;
mod shapes;
mod slow;
mod static_list;
mod streams;
mod worker;

use client::Http;
use cluster::{InMemory, Instance, Membership, Registration, State};
use router::{Deadlines, Limits, Router, RouterConfig, RouterHandle};
use std::{sync::Arc, time::Duration};
use tokio::sync::watch;
use worker::Worker;

pub const MODEL: &str = "org/tiny";
pub const PATH: &str = "/v1/completions";
/// What a scripted worker answers where no test says otherwise.
pub const TEXT: &str = "Hello, wörld! 漢字 done.";

/// A request for [`PATH`] whose answer is [`TEXT`].
pub fn body() -> serde_json::Value {
    serde_json::json!({"model": MODEL, "prompt": "Once upon a time", "max_tokens": 100, "seed": 5})
}

/// A router on free ports, and what stands behind it.
pub struct Cluster {
    pub membership: InMemory,
    pub shutdown: watch::Sender<bool>,
    pub router: RouterHandle,
    pub members: Vec<Member>,
}

/// A worker in the roster.
pub struct Member {
    pub worker: Arc<Worker>,
    pub instance: watch::Sender<Instance>,
    _registration: Box<dyn Registration>,
}

/// Short waits: what takes longer in a test is a fault.
pub fn config() -> RouterConfig {
    let any = "127.0.0.1:0".parse().ok();
    RouterConfig {
        http: any,
        grpc: any,
        cors_origins: Vec::new(),
        tls: None,
        worker_tls: None,
        limits: Limits { body_bytes_max: 64 << 10, ..Limits::default() },
        deadlines: Deadlines {
            connect: Duration::from_secs(1),
            hello: Duration::from_millis(500),
            heartbeat: Duration::from_millis(500),
            silence: Duration::from_millis(500),
            open: Duration::from_millis(800),
            ready: Duration::from_millis(800),
            loading: Duration::from_secs(10),
            queue: Duration::from_millis(800),
            first_token: Duration::from_secs(60),
            total: Duration::from_secs(60),
            describe: Duration::from_secs(5),
            headers: Duration::from_secs(5),
            body: Duration::from_secs(2),
            grace: Duration::ZERO,
            drain: Duration::from_secs(1),
        },
        aliases: Default::default(),
    }
}

impl Cluster {
    pub async fn start(config: RouterConfig, workers: usize) -> Self {
        let membership = InMemory::new();
        let (shutdown, receiver) = watch::channel(false);
        let router =
            Router::start(config, Arc::new(membership.clone()), receiver).await.expect("router");
        let mut cluster = Self { membership, shutdown, router, members: Vec::new() };
        for _ in 0..workers {
            cluster.join(State::Ready).await;
        }
        cluster.settle(workers).await;
        cluster
    }

    /// One ready worker, usual limits.
    pub async fn one() -> Self {
        Self::start(config(), 1).await
    }

    pub async fn join(&mut self, state: State) {
        self.join_as(state, |_| {}).await;
    }

    /// One that says of itself what `change` makes it say.
    pub async fn join_as(&mut self, state: State, change: impl FnOnce(&mut Instance)) {
        let (worker, address) = Worker::start().await;
        let mut instance = Instance {
            id: format!("worker-{}", self.members.len()),
            model: MODEL.to_owned(),
            fingerprint: "f".to_owned(),
            address,
            protocol: proto::WORKER_PROTOCOL,
            started: 0,
            state,
            context_max: 4096,
            vocab_size: 512,
            ranks: 1,
            blocks_total: 256,
            epoch: 0,
            reason: String::new(),
        };
        change(&mut instance);
        *worker.instance.lock().unwrap() = Some(instance.clone());
        let (sender, receiver) = watch::channel(instance);
        let registration = self.membership.announce(receiver).await.expect("announce");
        self.members.push(Member { worker, instance: sender, _registration: registration });
    }

    /// Waits until the router counts so many ready workers.
    pub async fn settle(&self, workers: usize) {
        for _ in 0..200 {
            let mut client = self.grpc().await;
            let models =
                client.list_models(proto::v1::ListModelsRequest {}).await.unwrap().into_inner();
            if models.models.first().map_or(0, |model| model.workers) as usize == workers {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("the router did not see {workers} workers");
    }

    pub fn worker(&self) -> &Worker {
        &self.members[0].worker
    }

    pub fn http(&self) -> Http {
        Http(self.router.http().unwrap())
    }

    pub async fn grpc(
        &self,
    ) -> proto::v1::inference_client::InferenceClient<tonic::transport::Channel> {
        let address = format!("http://{}", self.router.grpc().unwrap());
        proto::v1::inference_client::InferenceClient::connect(address).await.unwrap()
    }
}

/// Waits for something that must come soon.
pub async fn soon(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..400 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("still not so after 2 s: {what}");
}
