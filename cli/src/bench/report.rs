//! Figures of a run: a table for people, JSON for machines.

use std::{
    collections::BTreeMap,
    fmt::{self, Display, Formatter},
    time::Duration,
};

use serde::Serialize;

use super::load::{Load, Measured};

/// Kinds of errors that are told apart, at most.
const ERRORS_MAX: usize = 5;

/// Milliseconds.
#[derive(Serialize, Debug, PartialEq)]
pub struct Spread {
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

impl Spread {
    /// `None` of nothing.
    fn of(values: impl Iterator<Item = Duration>) -> Option<Self> {
        let mut sorted: Vec<f64> = values.map(|value| value.as_secs_f64() * 1e3).collect();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.last().copied()?;
        // The nearest rank: the smallest value that so many of all do not exceed.
        let rank = |share: f64| sorted[((share * sorted.len() as f64).ceil() as usize).max(1) - 1];
        Some(Self {
            mean: sorted.iter().sum::<f64>() / sorted.len() as f64,
            p50: rank(0.5),
            p90: rank(0.9),
            p99: rank(0.99),
            max: last,
        })
    }
}

#[derive(Serialize)]
pub struct Report {
    pub model: String,
    pub concurrency: usize,
    pub rate: Option<f64>,
    pub prompt_tokens: usize,
    pub shared_tokens: usize,
    pub output_tokens_asked: u32,
    pub complete: bool,
    pub succeeded: usize,
    pub failed: usize,
    pub errors: Vec<String>,
    pub seconds: f64,
    pub requests_per_second: f64,
    pub output_tokens: u64,
    pub output_tokens_per_second: f64,
    pub prompt_tokens_per_second: f64,
    pub cached_prompt_tokens: u64,
    pub first_token_ms: Option<Spread>,
    /// Between messages that brought tokens.
    pub inter_token_ms: Option<Spread>,
    /// (whole − first) / (tokens − 1), of each request.
    pub time_per_output_token_ms: Option<Spread>,
    pub request_ms: Option<Spread>,
}

impl Report {
    pub fn new(load: &Load, measured: &Measured) -> Self {
        let (samples, seconds) = (&measured.samples, measured.wall.as_secs_f64().max(1e-9));
        let output_tokens: u64 = samples.iter().map(|sample| sample.tokens).sum();
        let prompts = samples.len() * load.prompts.tokens;
        let per_token = samples
            .iter()
            .filter(|sample| sample.tokens > 1)
            .map(|sample| (sample.whole - sample.first).div_f64((sample.tokens - 1) as f64));
        Self {
            model: load.target.model.clone(),
            concurrency: load.concurrency,
            rate: load.rate,
            prompt_tokens: load.prompts.tokens,
            shared_tokens: load.prompts.shared,
            output_tokens_asked: load.output_tokens,
            complete: measured.complete,
            succeeded: samples.len(),
            failed: measured.errors.len(),
            errors: kinds(&measured.errors),
            seconds,
            requests_per_second: samples.len() as f64 / seconds,
            output_tokens,
            output_tokens_per_second: output_tokens as f64 / seconds,
            prompt_tokens_per_second: prompts as f64 / seconds,
            cached_prompt_tokens: samples.iter().map(|sample| sample.cached_tokens).sum(),
            first_token_ms: Spread::of(samples.iter().map(|sample| sample.first)),
            inter_token_ms: Spread::of(samples.iter().flat_map(|sample| sample.gaps.clone())),
            time_per_output_token_ms: Spread::of(per_token),
            request_ms: Spread::of(samples.iter().map(|sample| sample.whole)),
        }
    }
}

/// The most frequent messages, with how often each came.
fn kinds(errors: &[String]) -> Vec<String> {
    let mut counts = BTreeMap::new();
    for error in errors {
        *counts.entry(error).or_insert(0) += 1;
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
    counts.into_iter().take(ERRORS_MAX).map(|(what, count)| format!("{count} × {what}")).collect()
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let early = if self.complete { "" } else { " (ended early)" };
        writeln!(f, "model              {}", self.model)?;
        writeln!(
            f,
            "requests           {} ok, {} failed in {:.1} s{early}, {:.2} /s",
            self.succeeded, self.failed, self.seconds, self.requests_per_second
        )?;
        writeln!(
            f,
            "tokens             {:.1} /s out, {:.1} /s in, {} of the prompts' from the cache",
            self.output_tokens_per_second, self.prompt_tokens_per_second, self.cached_prompt_tokens
        )?;
        let heads = ["mean", "p50", "p90", "p99", "max"];
        write!(f, "{:<18}", "milliseconds")?;
        heads.iter().try_for_each(|head| write!(f, "{head:>10}"))?;
        for (what, spread) in [
            ("first token", &self.first_token_ms),
            ("between tokens", &self.inter_token_ms),
            ("per output token", &self.time_per_output_token_ms),
            ("whole request", &self.request_ms),
        ] {
            let Some(Spread { mean, p50, p90, p99, max }) = spread else { continue };
            write!(f, "\n{what:<18}{mean:>10.1}{p50:>10.1}{p90:>10.1}{p99:>10.1}{max:>10.1}")?;
        }
        self.errors.iter().try_for_each(|error| write!(f, "\nerror: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let of = |count: u64| Spread::of((1..=count).map(Duration::from_millis)).unwrap();
        let spread = of(100);
        assert_eq!((spread.p50, spread.p90, spread.p99, spread.max), (50.0, 90.0, 99.0, 100.0));
        assert_eq!(of(1), Spread { mean: 1.0, p50: 1.0, p90: 1.0, p99: 1.0, max: 1.0 });
        assert_eq!(Spread::of([].into_iter()), None);
    }

    #[test]
    fn errors_are_counted_by_kind() {
        let errors: Vec<_> = ["b", "a", "b"].map(str::to_owned).into();
        assert_eq!(kinds(&errors), ["2 × b", "1 × a"]);
    }
}
