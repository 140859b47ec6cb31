//! The worker's figures for Prometheus: every name is declared and described here.

use std::time::Duration;

use engine::Stats;
use prometheus_client::{
    encoding::text::encode,
    metrics::{
        counter::Counter,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

/// One worker's metrics. The engine loop writes, anybody encodes.
pub struct Metrics {
    registry: Registry,
    running: Gauge,
    waiting: Gauge,
    blocks_free: Gauge,
    blocks_cached: Gauge,
    blocks_capacity: Gauge,
    prefill_tokens: Counter,
    decode_tokens: Counter,
    prompt_tokens: Counter,
    prefix_hit_tokens: Counter,
    preemptions: Counter,
    finished: Counter,
    cancelled: Counter,
    failed: Counter,
    rejected: Counter,
    group_failures: Counter,
    step: Histogram,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("lockstep_worker");
        let mut gauge = |name: &str, help: &str| {
            let gauge: Gauge = Gauge::default();
            registry.register(name, help, gauge.clone());
            gauge
        };
        let running = gauge("sequences_running", "Sequences in the batch");
        let waiting = gauge("sequences_waiting", "Sequences waiting for a place in the batch");
        let blocks_free = gauge("blocks_free", "KV blocks that no running sequence holds");
        let blocks_cached = gauge("blocks_cached", "Free KV blocks that hold a reusable prefix");
        let blocks_capacity = gauge("blocks_capacity", "KV blocks in the pool");
        let mut counter = |name: &str, help: &str| {
            let counter: Counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let prefill_tokens = counter("prefill_tokens", "Tokens computed in prefill chunks");
        let decode_tokens = counter("decode_tokens", "Tokens computed one at a time");
        let prompt_tokens = counter("prompt_tokens", "Prompt tokens of admitted requests");
        let prefix_hit_tokens = counter("prefix_hit_tokens", "Prompt tokens found in the cache");
        let preemptions = counter("preemptions", "Sequences that gave their blocks back");
        let finished = counter("requests_finished", "Requests answered to their end");
        let cancelled = counter("requests_cancelled", "Requests whose reader left");
        let failed = counter("requests_failed", "Requests that failed alone");
        let rejected = counter("requests_rejected", "Requests refused on arrival");
        let group_failures = counter("group_failures", "Losses of the whole group");
        // 0.25 ms to 131 s: a decode of a tiny model to a prefill of a large one.
        let step = Histogram::new(exponential_buckets(0.00025, 2.0, 20));
        registry.register("step_seconds", "Time of one step of the group", step.clone());
        Self {
            registry,
            running,
            waiting,
            blocks_free,
            blocks_cached,
            blocks_capacity,
            prefill_tokens,
            decode_tokens,
            prompt_tokens,
            prefix_hit_tokens,
            preemptions,
            finished,
            cancelled,
            failed,
            rejected,
            group_failures,
            step,
        }
    }

    /// The text exposition format.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        if let Err(error) = encode(&mut text, &self.registry) {
            tracing::warn!(%error, "metrics cannot be encoded");
        }
        text
    }

    pub(crate) fn step(&self, duration: Duration) {
        self.step.observe(duration.as_secs_f64());
    }

    pub(crate) fn group_failed(&self) {
        self.group_failures.inc();
    }

    pub(crate) fn rejected(&self) {
        self.rejected.inc();
    }

    /// Takes over the engine's figures, given those seen last.
    pub(crate) fn observe(&self, last: &Stats, now: &Stats) {
        for (gauge, value) in [
            (&self.running, now.running),
            (&self.waiting, now.waiting),
            (&self.blocks_free, now.blocks_free),
            (&self.blocks_cached, now.blocks_cached),
            (&self.blocks_capacity, now.blocks_total),
        ] {
            gauge.set(value as i64);
        }
        for (counter, now, last) in [
            (&self.prefill_tokens, now.prefill_tokens, last.prefill_tokens),
            (&self.decode_tokens, now.decode_tokens, last.decode_tokens),
            (&self.prompt_tokens, now.prompt_tokens, last.prompt_tokens),
            (&self.prefix_hit_tokens, now.prefix_hit_tokens, last.prefix_hit_tokens),
            (&self.preemptions, now.preemptions, last.preemptions),
            (&self.finished, now.finished, last.finished),
            (&self.cancelled, now.cancelled, last.cancelled),
            (&self.failed, now.failed, last.failed),
        ] {
            counter.inc_by(now.saturating_sub(last));
        }
    }
}
