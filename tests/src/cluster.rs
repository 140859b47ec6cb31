//! A router, and workers of a small model, which start in a moment.

use std::{path::Path, time::Duration};

use serde_json::Value;
use tempfile::TempDir;

use crate::{Answer, Log, Process, Round, etcd, exchange, wait_for};

const DEADLINE: Duration = Duration::from_secs(60);
/// The small model's name.
pub const MODEL: &str = "qwen2_gqa4_tied_sharded";
const PORTS: [&str; 4] = ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];

/// The router and where its registry is.
pub struct Cluster {
    endpoints: String,
    router: Process,
    log: Log,
    /// Where it is this cluster's own.
    _etcd: Option<(Process, TempDir)>,
}

impl Cluster {
    pub fn start(endpoints: &str) -> Self {
        let (router, log) = router(endpoints);
        Self { endpoints: endpoints.to_owned(), router, log, _etcd: None }
    }

    /// With a registry of its own; `None` where etcd is not installed.
    pub fn with_etcd() -> Option<Self> {
        let (process, endpoint, data) = etcd()?;
        Some(Self { _etcd: Some((process, data)), ..Self::start(&endpoint) })
    }

    /// Kills the router.
    pub fn lose_router(&mut self) {
        self.router.signal("KILL");
        self.router.wait(DEADLINE);
    }

    /// Another router, at other addresses, in place of the one before.
    pub fn start_router(&mut self) {
        (self.router, self.log) = router(&self.endpoints);
    }

    pub fn router(&self) -> &Process {
        &self.router
    }

    /// What the router has logged.
    pub fn log(&self) -> String {
        self.log.text()
    }

    pub fn http(&self) -> &str {
        self.router.address("http")
    }

    /// A worker of the small model; returns once it is ready.
    pub fn worker(&self, flags: &[&str]) -> Process {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/public").join(MODEL);
        let model = model.to_str().expect("a path in UTF-8");
        let own = ["worker", "--model", model, "--etcd", &self.endpoints, "--threads", "1"];
        Process::lockstep(&[&own, flags].concat())
    }

    /// What the router says of its workers.
    pub fn workers(&self) -> Vec<Value> {
        workers(self.http())
    }

    /// Waits until the router gives work to exactly these.
    pub fn expect(&self, workers: &[&Process]) {
        let mut wanted: Vec<&str> = workers.iter().map(|worker| address(worker)).collect();
        wanted.sort_unstable();
        let look = || {
            let usable = self.workers().into_iter().filter(|worker| worker["usable"] == true);
            let address = |worker: Value| worker["address"].as_str().unwrap_or_default().to_owned();
            let mut all: Vec<String> = usable.map(address).collect();
            all.sort_unstable();
            all
        };
        let same = |seen: &Vec<String>| {
            seen.len() == wanted.len()
                && seen.iter().zip(&wanted).all(|(seen, wanted)| seen.ends_with(wanted))
        };
        wait_for("the usable workers", DEADLINE, look, same);
    }
}

/// What a router says of its workers, of whatever model.
pub fn workers(http: &str) -> Vec<Value> {
    let status = exchange(http, "GET", "/status", b"").json();
    let models = status["models"].as_array().cloned().unwrap_or_default();
    models
        .iter()
        .flat_map(|model| model["workers"].as_array().cloned().unwrap_or_default())
        .collect()
}

fn router(endpoints: &str) -> (Process, Log) {
    Process::logged(&[&["router", "--etcd", endpoints], &PORTS[..]].concat())
}

/// One figure of a process, of whatever labels.
pub fn metric(address: &str, name: &str) -> f64 {
    let text = exchange(address, "GET", "/metrics", b"").body;
    // A sample's line is its name, labels where it has some, and the value.
    let value = text.lines().find_map(|line| {
        let rest = line.strip_prefix(name).filter(|rest| rest.starts_with(['{', ' ']))?;
        rest.rsplit(' ').next()?.parse().ok()
    });
    value.unwrap_or_else(|| panic!("no {name} in {text}"))
}

/// `host:port` of a worker.
pub fn address(worker: &Process) -> &str {
    worker.address("worker")
}

impl Round {
    /// Every answer came whole and as wanted.
    pub fn check(&self, what: &str, wanted: &[Answer]) {
        assert_eq!(self.answers.len(), wanted.len(), "{what}");
        for (at, (got, wanted)) in self.answers.iter().zip(wanted).enumerate() {
            assert_eq!(got, wanted, "{what}, stream {at}");
        }
    }
}
