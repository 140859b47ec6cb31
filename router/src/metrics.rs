//! What the router counts, under `lockstep_router_`. Every label has few values: routes and codes
//! are fixed lists; neither models nor clients are labels.

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};
use proto::v1::Progress;
use std::{sync::Arc, time::Duration};

/// Seconds; from a cached prefix on a fast device to a long prefill on a CPU.
const FIRST_TOKEN_SECONDS: [f64; 14] =
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];
const NEXT_TOKEN_SECONDS: [f64; 12] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0];

/// Labels of a finished request.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct RequestLabels {
    route: &'static str,
    code: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct KindLabels {
    kind: &'static str,
}

/// Counters of one router.
pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    tokens: Family<KindLabels, Counter>,
    /// Choices being generated or waiting.
    pub in_flight: Gauge,
    /// Choices waiting because every worker is full.
    pub queued: Gauge,
    /// Choices that wait on a worker, and those being prefilled, as the workers tell.
    waiting: Gauge,
    prefilling: Gauge,
    first_token: Histogram,
    next_token: Histogram,
    /// Streams that broke after their start and went on elsewhere.
    pub resumes: Counter,
    /// Calls that a worker did not take: unreachable, failing or full.
    pub retries: Counter,
    /// Requests refused because everything is full.
    pub rejected: Counter,
}

impl Metrics {
    pub fn new() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("lockstep_router"),
            requests: Family::default(),
            tokens: Family::default(),
            in_flight: Gauge::default(),
            queued: Gauge::default(),
            waiting: Gauge::default(),
            prefilling: Gauge::default(),
            first_token: Histogram::new(FIRST_TOKEN_SECONDS),
            next_token: Histogram::new(NEXT_TOKEN_SECONDS),
            resumes: Counter::default(),
            retries: Counter::default(),
            rejected: Counter::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        let r = &mut self.registry;
        r.register("requests", "Finished requests by route and code", self.requests.clone());
        r.register("tokens", "Tokens by kind: prompt, cached, completion", self.tokens.clone());
        r.register("in_flight", "Choices generated or waiting now", self.in_flight.clone());
        r.register("queued", "Choices waiting for a place on a full worker", self.queued.clone());
        r.register("waiting", "Choices waiting in a worker's queue", self.waiting.clone());
        r.register("prefilling", "Choices whose prompt is computed", self.prefilling.clone());
        r.register(
            "first_token_seconds",
            "From a choice's start to its first token",
            self.first_token.clone(),
        );
        r.register(
            "next_token_seconds",
            "Between two messages of tokens of one choice",
            self.next_token.clone(),
        );
        r.register("resumes", "Broken streams that went on elsewhere", self.resumes.clone());
        r.register("retries", "Calls that a worker did not take", self.retries.clone());
        r.register("rejected", "Requests refused as overload", self.rejected.clone());
    }

    /// One request ended. `code` is an HTTP status or a gRPC code's name.
    pub fn finished(&self, route: &'static str, code: &'static str) {
        self.requests.get_or_create(&RequestLabels { route, code }).inc();
    }

    pub fn tokens(&self, kind: &'static str, count: u64) {
        self.tokens.get_or_create(&KindLabels { kind }).inc_by(count);
    }

    pub fn first_token(&self, after: Duration) {
        self.first_token.observe(after.as_secs_f64());
    }

    pub fn next_token(&self, after: Duration) {
        self.next_token.observe(after.as_secs_f64());
    }

    /// Everything in the OpenMetrics text format.
    pub fn encode(&self) -> Result<String, std::fmt::Error> {
        let mut out = String::new();
        encode(&mut out, &self.registry)?;
        Ok(out)
    }
}

/// Counts a choice by how far its worker says it is, until dropped.
pub(crate) struct StageGauge {
    metrics: Arc<Metrics>,
    counted: Option<Gauge>,
}

impl StageGauge {
    pub fn new(metrics: &Arc<Metrics>) -> Self {
        Self { metrics: metrics.clone(), counted: None }
    }

    /// Takes over what the latest message says; one without progress brings tokens.
    pub fn observe(&mut self, progress: Option<&Progress>) {
        let now = match progress {
            Some(Progress { running: false, .. }) => Some(&self.metrics.waiting),
            // The last known token is computed together with the next one.
            Some(p) if p.prefilled.saturating_add(1) < p.prompt => Some(&self.metrics.prefilling),
            _ => None,
        };
        let now = now.cloned();
        if let Some(gauge) = &now {
            gauge.inc();
        }
        if let Some(gauge) = std::mem::replace(&mut self.counted, now) {
            gauge.dec();
        }
    }
}

impl Drop for StageGauge {
    fn drop(&mut self) {
        self.observe(None);
    }
}

/// Counts a request by what became of it; dropped unset, the client left.
pub(crate) struct Outcome {
    metrics: Arc<Metrics>,
    route: &'static str,
    code: &'static str,
}

impl Outcome {
    /// `gone` is the code for a client that leaves before the end.
    pub fn new(metrics: &Arc<Metrics>, route: &'static str, gone: &'static str) -> Self {
        Self { metrics: metrics.clone(), route, code: gone }
    }

    pub fn set(&mut self, code: &'static str) {
        self.code = code;
    }
}

impl Drop for Outcome {
    fn drop(&mut self) {
        self.metrics.finished(self.route, self.code);
    }
}
