//! The worker's figures for Prometheus, under `lockstep_worker_`: every name is declared and
//! described here, and listed in `docs/metrics.md`. A worker serves one model: each figure has it.

use std::{borrow::Cow, fmt, sync::atomic::AtomicU64, time::Duration};

use cluster::port::HandshakeFailures;
use engine::Stats;
use prometheus_client::{
    metrics::{
        counter::Counter,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

/// One worker's metrics. The engine loop writes, anybody reads.
pub struct Metrics {
    registry: Registry,
    gauges: Gauges,
    counters: Counters,
    group_failures: Counter,
    step: Histogram,
    /// Connections that did not come about: TLS or the lack of it.
    handshake_failures: HandshakeFailures,
}

/// What is so now.
#[derive(Default)]
struct Gauges {
    running: Gauge,
    waiting: Gauge,
    blocks_free: Gauge,
    blocks_cached: Gauge,
    blocks_capacity: Gauge,
    kv_usage: Gauge<f64, AtomicU64>,
}

/// What has happened since the start.
#[derive(Default)]
struct Counters {
    prefill_tokens: Counter,
    decode_tokens: Counter,
    prompt_tokens: Counter,
    prefix_hit_tokens: Counter,
    preemptions: Counter,
    finished: Counter,
    cancelled: Counter,
    failed: Counter,
    rejected: Counter,
}

impl Metrics {
    /// The figures of a worker that serves `model`.
    pub fn new(model: &str) -> Self {
        let gauges = Gauges::default();
        let counters = Counters::default();
        let group_failures = Counter::default();
        // 0.25 ms to 131 s: a decode of a tiny model to a prefill of a large one.
        let step = Histogram::new(exponential_buckets(0.00025, 2.0, 20));
        let handshake_failures = HandshakeFailures::default();
        let registry = cluster::metrics::registry("lockstep_worker", |own| {
            let label = (Cow::Borrowed("model"), Cow::Owned(model.to_owned()));
            let own = own.sub_registry_with_label(label);
            gauges.register(own);
            counters.register(own);
            own.register("group_failures", "Losses of the whole group", group_failures.clone());
            own.register("step_seconds", "Time of one step of the group", step.clone());
            let failures = handshake_failures.clone();
            own.register("tls_handshake_failures", "Connections refused, by reason", failures);
        });
        Self { registry, gauges, counters, group_failures, step, handshake_failures }
    }

    /// Everything, in the format that this `Accept` header asks for: its media type and the text.
    ///
    /// # Errors
    /// A figure cannot be written: a fault of the program.
    pub fn exposition(&self, accept: Option<&str>) -> Result<(&'static str, String), fmt::Error> {
        cluster::metrics::exposition(&self.registry, accept)
    }

    pub(crate) fn handshake_failures(&self) -> &HandshakeFailures {
        &self.handshake_failures
    }

    pub(crate) fn step(&self, duration: Duration) {
        self.step.observe(duration.as_secs_f64());
    }

    pub(crate) fn group_failed(&self) {
        self.group_failures.inc();
    }

    pub(crate) fn rejected(&self) {
        self.counters.rejected.inc();
    }

    /// Takes over the engine's figures, given those seen last.
    pub(crate) fn observe(&self, last: &Stats, now: &Stats) {
        let Gauges { running, waiting, blocks_free, blocks_cached, blocks_capacity, kv_usage } =
            &self.gauges;
        for (gauge, value) in [
            (running, now.running),
            (waiting, now.waiting),
            (blocks_free, now.blocks_free),
            (blocks_cached, now.blocks_cached),
            (blocks_capacity, now.blocks_total),
        ] {
            gauge.set(value as i64);
        }
        let held = now.blocks_total.saturating_sub(now.blocks_free);
        kv_usage.set(held as f64 / now.blocks_total.max(1) as f64);
        let counters = &self.counters;
        for (counter, now, last) in [
            (&counters.prefill_tokens, now.prefill_tokens, last.prefill_tokens),
            (&counters.decode_tokens, now.decode_tokens, last.decode_tokens),
            (&counters.prompt_tokens, now.prompt_tokens, last.prompt_tokens),
            (&counters.prefix_hit_tokens, now.prefix_hit_tokens, last.prefix_hit_tokens),
            (&counters.preemptions, now.preemptions, last.preemptions),
            (&counters.finished, now.finished, last.finished),
            (&counters.cancelled, now.cancelled, last.cancelled),
            (&counters.failed, now.failed, last.failed),
        ] {
            counter.inc_by(now.saturating_sub(last));
        }
    }
}

impl Gauges {
    fn register(&self, r: &mut Registry) {
        for (name, help, gauge) in [
            ("sequences_running", "Sequences in the batch", &self.running),
            ("sequences_waiting", "Sequences waiting for a place in the batch", &self.waiting),
            ("blocks_free", "KV blocks that no running sequence holds", &self.blocks_free),
            ("blocks_cached", "Free KV blocks that hold a reusable prefix", &self.blocks_cached),
            ("blocks_capacity", "KV blocks in the pool", &self.blocks_capacity),
        ] {
            r.register(name, help, gauge.clone());
        }
        let help = "The share of KV blocks that running sequences hold, 0 to 1";
        r.register("kv_usage_ratio", help, self.kv_usage.clone());
    }
}

impl Counters {
    fn register(&self, r: &mut Registry) {
        for (name, help, counter) in [
            ("prefill_tokens", "Tokens computed in prefill chunks", &self.prefill_tokens),
            ("decode_tokens", "Tokens computed one at a time", &self.decode_tokens),
            ("prompt_tokens", "Prompt tokens of admitted requests", &self.prompt_tokens),
            ("prefix_hit_tokens", "Prompt tokens found in the cache", &self.prefix_hit_tokens),
            ("preemptions", "Sequences that gave their blocks back", &self.preemptions),
            ("requests_finished", "Requests answered to their end", &self.finished),
            ("requests_cancelled", "Requests whose reader left", &self.cancelled),
            ("requests_failed", "Requests that failed alone", &self.failed),
            ("requests_rejected", "Requests refused on arrival", &self.rejected),
        ] {
            r.register(name, help, counter.clone());
        }
    }
}
