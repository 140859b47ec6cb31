//! What the router counts, under `lockstep_router_`. Every label has few values: routes, codes and
//! reasons are fixed lists, models are those that workers served; clients are no labels.
//!
//! `docs/metrics.md` lists all of it for those who read the figures.

use crate::facts::Known;
use cluster::port::HandshakeFailures;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};
use proto::v1::Progress;
use std::{fmt, sync::Arc};
use tokio::time::Instant;

/// From a cached prefix on a fast device to a long prefill on a CPU.
const FIRST_TOKEN_SECONDS: [f64; 14] =
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];
const NEXT_TOKEN_SECONDS: [f64; 12] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0];
const REQUEST_SECONDS: [f64; 14] =
    [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1200.0];
const QUEUE_SECONDS: [f64; 12] =
    [0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 10.0, 30.0, 120.0];
/// From one token to the longest contexts.
const LENGTHS: [f64; 12] =
    [1.0, 4.0, 16.0, 64.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 16384.0, 65536.0, 262_144.0];

/// Labels of a finished request; the model is empty where none was found.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    route: String,
    code: String,
    model: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelLabels {
    model: String,
}

impl ModelLabels {
    fn new(model: &str) -> Self {
        Self { model: model.to_owned() }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TokenLabels {
    model: String,
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FinishLabels {
    model: String,
    reason: &'static str,
}

/// A histogram for each model.
type Histograms = Family<ModelLabels, Histogram, fn() -> Histogram>;

/// Counters of one router.
pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    tokens: Family<TokenLabels, Counter>,
    finished: Family<FinishLabels, Counter>,
    /// Choices being generated or waiting.
    pub in_flight: Gauge,
    /// Choices waiting because every worker is full.
    pub queued: Gauge,
    /// Choices that wait on a worker, and those being prefilled, as the workers tell.
    waiting: Gauge,
    prefilling: Gauge,
    times: Times,
    prompt_tokens: Histograms,
    completion_tokens: Histograms,
    /// Streams that broke after their start and went on elsewhere.
    pub resumes: Counter,
    /// Calls that a worker did not take: unreachable, failing or full.
    pub retries: Counter,
    /// Requests refused because everything is full.
    pub rejected: Counter,
    /// Connections that did not come about: TLS or the lack of it.
    pub handshake_failures: HandshakeFailures,
}

/// How long the parts of a request took.
struct Times {
    request: Histograms,
    queue: Histograms,
    prefill: Histograms,
    decode: Histograms,
    first_token: Histograms,
    next_token: Histograms,
}

/// One model's waits for tokens.
pub(crate) struct Waits {
    pub first_token: Histogram,
    pub next_token: Histogram,
}

/// One model's tokens.
pub(crate) struct Tokens {
    pub prompt: Counter,
    pub cached: Counter,
    pub completion: Counter,
}

/// A request at its end.
pub(crate) struct Ended<'a> {
    pub route: &'a str,
    /// An HTTP status or a gRPC code's name.
    pub code: &'a str,
    pub known: &'a Known,
    pub started: Instant,
    /// Answered to the end, without an error.
    pub whole: bool,
}

impl Metrics {
    pub fn new() -> Self {
        let mut metrics = Self {
            registry: Registry::default(),
            requests: Family::default(),
            tokens: Family::default(),
            finished: Family::default(),
            in_flight: Gauge::default(),
            queued: Gauge::default(),
            waiting: Gauge::default(),
            prefilling: Gauge::default(),
            times: Times {
                request: Family::new_with_constructor(|| Histogram::new(REQUEST_SECONDS)),
                queue: Family::new_with_constructor(|| Histogram::new(QUEUE_SECONDS)),
                prefill: Family::new_with_constructor(|| Histogram::new(FIRST_TOKEN_SECONDS)),
                decode: Family::new_with_constructor(|| Histogram::new(REQUEST_SECONDS)),
                first_token: Family::new_with_constructor(|| Histogram::new(FIRST_TOKEN_SECONDS)),
                next_token: Family::new_with_constructor(|| Histogram::new(NEXT_TOKEN_SECONDS)),
            },
            prompt_tokens: Family::new_with_constructor(|| Histogram::new(LENGTHS)),
            completion_tokens: Family::new_with_constructor(|| Histogram::new(LENGTHS)),
            resumes: Counter::default(),
            retries: Counter::default(),
            rejected: Counter::default(),
            handshake_failures: HandshakeFailures::default(),
        };
        metrics.registry = cluster::metrics::registry("lockstep_router", |own| {
            metrics.register_counts(own);
            metrics.register_histograms(own);
        });
        metrics
    }

    fn register_counts(&self, r: &mut Registry) {
        r.register("requests", "Requests that ended, by route and code", self.requests.clone());
        r.register("tokens", "Tokens by kind: prompt, cached, completion", self.tokens.clone());
        r.register(
            "choices_finished",
            "Choices that finished, by reason: stop, length",
            self.finished.clone(),
        );
        r.register("in_flight", "Choices generated or waiting now", self.in_flight.clone());
        r.register("queued", "Choices waiting for a place on a full worker", self.queued.clone());
        r.register("waiting", "Choices waiting in a worker's queue", self.waiting.clone());
        r.register("prefilling", "Choices whose prompt is computed", self.prefilling.clone());
        r.register("resumes", "Broken streams that went on elsewhere", self.resumes.clone());
        r.register("retries", "Calls that a worker did not take", self.retries.clone());
        let failures = self.handshake_failures.clone();
        r.register("tls_handshake_failures", "Connections refused, by reason", failures);
        r.register("rejected", "Requests refused as overload", self.rejected.clone());
    }

    fn register_histograms(&self, r: &mut Registry) {
        let times = &self.times;
        for (name, help, histograms) in [
            (
                "request_seconds",
                "From a request's arrival to the end of its whole answer",
                &times.request,
            ),
            (
                "queue_seconds",
                "From a request's tokens to the moment when workers had taken all its choices",
                &times.queue,
            ),
            ("prefill_seconds", "From there to the request's first token", &times.prefill),
            ("decode_seconds", "From the first token to the end of the answer", &times.decode),
            ("first_token_seconds", "From a choice's start to its first token", &times.first_token),
            (
                "next_token_seconds",
                "Between two messages of tokens of one choice",
                &times.next_token,
            ),
            ("prompt_tokens", "Tokens of a request's prompts", &self.prompt_tokens),
            ("completion_tokens", "Tokens of a request's whole answer", &self.completion_tokens),
        ] {
            r.register(name, help, histograms.clone());
        }
    }

    /// Where a model's waits for tokens are noted.
    pub fn waits(&self, model: &str) -> Waits {
        let labels = ModelLabels::new(model);
        Waits {
            first_token: self.times.first_token.get_or_create_owned(&labels),
            next_token: self.times.next_token.get_or_create_owned(&labels),
        }
    }

    /// Where a model's tokens are counted.
    pub fn tokens(&self, model: &str) -> Tokens {
        let of =
            |kind| self.tokens.get_or_create_owned(&TokenLabels { model: model.to_owned(), kind });
        Tokens { prompt: of("prompt"), cached: of("cached"), completion: of("completion") }
    }

    /// One request ended.
    pub fn ended(&self, ended: &Ended<'_>) {
        let Ended { route, code, known, started, whole } = ended;
        let model = known.model.clone().unwrap_or_default();
        let labels = RequestLabels {
            route: (*route).to_owned(),
            code: (*code).to_owned(),
            model: model.clone(),
        };
        self.requests.get_or_create(&labels).inc();
        for &reason in &known.finishes {
            self.finished.get_or_create(&FinishLabels { model: model.clone(), reason }).inc();
        }
        // What never reached a worker says nothing about how long work takes.
        let (Some(taken), Some(queued)) = (known.taken, known.queued) else { return };
        let labels = ModelLabels { model };
        let observe = |histograms: &Histograms, value: f64| {
            histograms.get_or_create(&labels).observe(value);
        };
        observe(&self.times.queue, queued.as_secs_f64());
        observe(&self.prompt_tokens, known.prompt_tokens as f64);
        if let Some(first) = known.first_token {
            observe(&self.times.prefill, first.duration_since(taken).as_secs_f64());
        }
        if *whole {
            observe(&self.times.request, started.elapsed().as_secs_f64());
            observe(&self.completion_tokens, known.completion_tokens as f64);
            if let Some(first) = known.first_token {
                observe(&self.times.decode, first.elapsed().as_secs_f64());
            }
        }
    }

    /// Everything, in the format that this `Accept` header asks for: its media type and the text.
    pub fn exposition(&self, accept: Option<&str>) -> Result<(&'static str, String), fmt::Error> {
        cluster::metrics::exposition(&self.registry, accept)
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
