//! What both servers tell Prometheus in the same way: the formats, the build, the process.
//!
//! The text format (0.0.4) is the default; OpenMetrics is for those who ask for it.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, text::encode},
    metrics::{counter::ConstCounter, gauge::ConstGauge, info::Info},
    registry::Registry,
};

use crate::{process, telemetry};

const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A registry that holds `process_*`, and `build_info` and `log_lines_dropped` under `prefix`. The
/// server registers its own metrics, with that prefix in front of each name, in what `own` gives.
pub fn registry(prefix: &str, own: impl FnOnce(&mut Registry)) -> Registry {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Process));
    let inner = registry.sub_registry_with_prefix(prefix);
    let version = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
    inner.register("build", "The version of the program", version);
    inner.register_collector(Box::new(LogLines));
    own(inner);
    registry
}

/// The media type and the text for a client that sent this `Accept` header, if any.
///
/// # Errors
/// A metric of the caller's own making cannot be written.
pub fn exposition(
    registry: &Registry,
    accept: Option<&str>,
) -> Result<(&'static str, String), fmt::Error> {
    let mut text = String::new();
    encode(&mut text, registry)?;
    Ok(match accept.is_some_and(wants_open_metrics) {
        true => (OPEN_METRICS, text),
        false => (TEXT, to_text_format(&text)),
    })
}

/// Whether OpenMetrics is named, and not as the lesser of the two.
fn wants_open_metrics(accept: &str) -> bool {
    let quality = |media: &str| {
        let ranges = accept.split(',').map(str::trim);
        let named = ranges.filter(|range| {
            let name = range.split(';').next().unwrap_or_default();
            name.trim().eq_ignore_ascii_case(media)
        });
        let quality = |range: &str| {
            let value = range.split(';').find_map(|part| part.trim().strip_prefix("q="));
            value.map_or(1.0, |value| value.parse::<f32>().unwrap_or(0.0))
        };
        named.map(quality).fold(0.0, f32::max)
    };
    let wanted = quality("application/openmetrics-text");
    wanted > 0.0 && wanted >= quality("text/plain")
}

/// OpenMetrics as the older format has it: counters are declared by the names of their samples,
/// information is a gauge, and neither units nor the end are told.
fn to_text_format(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len() + 1024);
    // A metric's help comes before its type, and both need its name in this format.
    let mut help = None;
    for line in open_metrics.lines() {
        if let Some(declared) = line.strip_prefix("# HELP ") {
            help = declared.split_once(' ');
        } else if let Some((name, kind)) =
            line.strip_prefix("# TYPE ").and_then(|declared| declared.split_once(' '))
        {
            let (suffix, kind) = match kind {
                "counter" => ("_total", "counter"),
                "info" => ("_info", "gauge"),
                "unknown" => ("", "untyped"),
                kind => ("", kind),
            };
            if let Some((_, help)) = help.take() {
                text.push_str(&format!("# HELP {name}{suffix} {help}\n"));
            }
            text.push_str(&format!("# TYPE {name}{suffix} {kind}\n"));
        } else if !line.starts_with('#') {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

/// `log_lines_dropped_total`.
#[derive(Debug)]
struct LogLines;

impl Collector for LogLines {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let dropped = ConstCounter::new(telemetry::lines_dropped());
        let help = "Log lines lost because nobody read them";
        let kind = dropped.metric_type();
        dropped.encode(encoder.encode_descriptor("log_lines_dropped", help, None, kind)?)
    }
}

/// `process_*`, by the names that Prometheus' own clients use.
#[derive(Debug)]
struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Some(usage) = process::usage() else { return Ok(()) };
        let mut put = |name: &str, help: &str, metric: &dyn EncodeMetric| {
            let kind = metric.metric_type();
            metric.encode(encoder.encode_descriptor(name, help, None, kind)?)
        };
        let cpu = ConstCounter::new(usage.cpu_seconds);
        put("process_cpu_seconds", "User and system time of all threads", &cpu)?;
        let gauge = |value: f64| ConstGauge::new(value);
        let resident = gauge(usage.resident_bytes as f64);
        put("process_resident_memory_bytes", "Memory in RAM", &resident)?;
        let reserved = gauge(usage.virtual_bytes as f64);
        put("process_virtual_memory_bytes", "Address space in use", &reserved)?;
        put("process_threads", "Threads of the operating system", &gauge(usage.threads as f64))?;
        put("process_open_fds", "Open file descriptors", &gauge(usage.open_fds as f64))?;
        put("process_max_fds", "Limit of open file descriptors", &gauge(usage.max_fds as f64))?;
        let start = gauge(usage.start_seconds);
        put("process_start_time_seconds", "Unix time of the start", &start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::metrics::{counter::Counter, histogram::Histogram};

    fn some() -> Registry {
        registry("part", |own| {
            let requests: Counter = Counter::default();
            requests.inc();
            own.register("requests", "Requests answered", requests);
            own.register("wait_seconds", "Waits", Histogram::new([0.5]));
        })
    }

    #[test]
    fn the_text_format_declares_what_it_holds() {
        let (kind, text) = exposition(&some(), None).unwrap();
        assert_eq!(kind, TEXT);
        for wanted in [
            "# HELP part_requests_total Requests answered.\n# TYPE part_requests_total counter\n\
             part_requests_total 1\n",
            "# TYPE part_build_info gauge\npart_build_info{version=\"",
            "# TYPE part_log_lines_dropped_total counter\npart_log_lines_dropped_total 0\n",
            "# TYPE part_wait_seconds histogram\npart_wait_seconds_sum 0",
            "part_wait_seconds_bucket{le=\"+Inf\"} 0\n",
        ] {
            assert!(text.contains(wanted), "{wanted} in {text}");
        }
        assert!(!text.contains("# EOF") && !text.contains("# UNIT"), "{text}");
        if cfg!(target_os = "linux") {
            assert!(text.contains("# TYPE process_cpu_seconds_total counter\n"), "{text}");
        }
    }

    #[test]
    fn open_metrics_is_for_those_who_ask() {
        let prometheus = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.2,*/*";
        for (accept, wanted) in [
            (None, TEXT),
            (Some("*/*"), TEXT),
            (Some("text/plain"), TEXT),
            (Some("application/openmetrics-text;q=0"), TEXT),
            (Some("text/plain, application/openmetrics-text;q=0.3"), TEXT),
            (Some("application/openmetrics-text; version=1.0.0"), OPEN_METRICS),
            (Some(prometheus), OPEN_METRICS),
        ] {
            let (kind, text) = exposition(&some(), accept).unwrap();
            assert_eq!(kind, wanted, "{accept:?}");
            assert_eq!(text.ends_with("# EOF\n"), wanted == OPEN_METRICS, "{accept:?}");
        }
    }
}
