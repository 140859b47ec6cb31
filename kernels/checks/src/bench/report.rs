//! One report of one run on one device: as JSON for programs, as Markdown for people.

use super::{Bar, Bench, Outcome, Work};
use cuda::Driver;
use serde_json::{Value, json};
use std::fmt::Write;

/// Where and when.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct About {
    pub device: String,
    pub compute_capability: String,
    /// CUDA release that the driver speaks.
    pub driver: String,
    /// e.g. `2026-02-28`.
    pub date: String,
    /// What PyTorch says of itself, where there is one.
    pub peer: Option<String>,
}

/// All that a run has found out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    pub about: About,
    /// The device's own copy, bytes read and written per second.
    pub copy_rate: f64,
    /// The device's own bf16 product, FLOP/s.
    pub product_rate: f64,
    /// Name of each check, and what was wrong.
    pub checks: Vec<(String, Option<String>)>,
    /// Name of each sanitizer's tool, and what came of it: `Ok` says how much ran.
    pub sanitizer: Vec<(String, Result<String, String>)>,
    pub outcomes: Vec<Outcome>,
    /// Benches that did not run, and why.
    pub failed: Vec<(String, String)>,
}

impl Report {
    /// Whether all there is to know is known, nothing is wrong and every bar holds.
    pub fn holds(&self) -> bool {
        let bars = self.outcomes.iter().all(|o| o.holds(self.copy_rate) != Some(false));
        let sanitizer = self.sanitizer.iter().all(|(_, result)| result.is_ok());
        let all = [self.checks.len(), self.sanitizer.len(), self.outcomes.len()];
        let right = self.failed.is_empty() && self.checks.iter().all(|check| check.1.is_none());
        bars && sanitizer && right && !all.contains(&0)
    }

    /// What [`Self::json`] told after an earlier run, of these `benches` and of checks; `None`
    /// where it told of another device or day.
    pub fn kept<D: Driver>(&self, json: &Value, benches: &[Bench<D>]) -> Option<Self> {
        let About { device, date, .. } = &self.about;
        if json["device"] != **device || json["date"] != **date {
            return None;
        }
        let list = |key: &str| json[key].as_array().cloned().unwrap_or_default();
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let pair = |pair: &Value| Some((text(&pair[0])?, text(&pair[1])));
        let pair_of_texts = |pair: &Value| Some((text(&pair[0])?, text(&pair[1])?));
        let tool = |tool: &Value| {
            let (name, detail) = (text(&tool["tool"])?, text(&tool["detail"])?);
            Some((name, if tool["clean"] == true { Ok(detail) } else { Err(detail) }))
        };
        let figure = |figure: &Value| {
            let same =
                |bench: &&Bench<D>| figure["op"] == bench.op && figure["shape"] == bench.shape;
            let seconds = |key: &str| figure[key].as_f64();
            let mut outcome = benches.iter().find(same)?.outcome(seconds("seconds")?);
            outcome.baseline_seconds = seconds("baseline_seconds");
            outcome.peer_seconds = seconds("peer_seconds");
            Some(outcome)
        };
        Some(Self {
            about: About { peer: text(&json["peer"]), ..self.about.clone() },
            copy_rate: json["copy_bytes_per_second"].as_f64().unwrap_or(0.0),
            product_rate: json["product_flops_per_second"].as_f64().unwrap_or(0.0),
            checks: list("checks").iter().filter_map(pair).collect(),
            sanitizer: list("sanitizer").iter().filter_map(tool).collect(),
            outcomes: list("figures").iter().filter_map(figure).collect(),
            failed: list("failed").iter().filter_map(pair_of_texts).collect(),
        })
    }

    /// What the rate is a share of, and the share.
    fn share(&self, outcome: &Outcome) -> (&'static str, f64) {
        match outcome.work {
            Work::Bytes(_) => ("copy", outcome.rate() / self.copy_rate),
            Work::Flops(_) => ("product", outcome.rate() / self.product_rate),
        }
    }

    pub fn json(&self) -> Value {
        let About { device, compute_capability, driver, date, peer } = &self.about;
        let figures: Vec<Value> = self.outcomes.iter().map(|o| self.figure(o)).collect();
        let checks: Vec<Value> = self.checks.iter().map(|(n, e)| json!([n, e])).collect();
        let sanitizer = self.sanitizer.iter().map(|(tool, result)| match result {
            Ok(ran) => json!({ "tool": tool, "clean": true, "detail": ran }),
            Err(why) => json!({ "tool": tool, "clean": false, "detail": why }),
        });
        json!({
            "device": device,
            "compute_capability": compute_capability,
            "driver_cuda": driver,
            "date": date,
            "peer": peer,
            "copy_bytes_per_second": self.copy_rate,
            "product_flops_per_second": self.product_rate,
            "holds": self.holds(),
            "checks": checks,
            "sanitizer": sanitizer.collect::<Vec<_>>(),
            "figures": figures,
            "failed": self.failed,
        })
    }

    fn figure(&self, outcome: &Outcome) -> Value {
        let (of, share) = self.share(outcome);
        json!({
            "op": outcome.op,
            "shape": outcome.shape,
            "seconds": outcome.seconds,
            "rate": outcome.rate(),
            "ceiling": of,
            "share": share,
            "bar": bar(outcome.bar),
            "holds": outcome.holds(self.copy_rate),
            "baseline_seconds": outcome.baseline_seconds,
            "peer_seconds": outcome.peer_seconds,
        })
    }

    pub fn markdown(&self) -> String {
        let About { device, compute_capability, driver, date, peer } = &self.about;
        let peer = peer.as_deref().unwrap_or("no figures");
        let mut text = format!(
            "# {device}, {date}\n\nCompute capability {compute_capability}, driver for CUDA \
             {driver}. Copy {:.2} TB/s (bytes read and written), bf16 product {:.0} TFLOP/s, both \
             measured with the figures. PyTorch: {peer}.\n\n",
            self.copy_rate / 1e12,
            self.product_rate / 1e12
        );
        self.faults(&mut text);
        text += "| op | shape | µs | rate | of ceiling | bar | holds | PyTorch µs |\n\
                 |---|---|---:|---:|---:|---|---|---:|\n";
        for outcome in &self.outcomes {
            text += &self.row(outcome);
        }
        text
    }

    fn row(&self, outcome: &Outcome) -> String {
        let (of, share) = self.share(outcome);
        let rate = match outcome.work {
            Work::Bytes(_) => format!("{:.2} TB/s", outcome.rate() / 1e12),
            Work::Flops(_) => format!("{:.0} TFLOP/s", outcome.rate() / 1e12),
        };
        let holds = match outcome.holds(self.copy_rate) {
            Some(true) => "yes",
            Some(false) => "**no**",
            None => "",
        };
        let times = outcome.baseline_seconds.map(|base| base / outcome.seconds);
        let times = times.map_or(String::new(), |times| format!(", {times:.1} × the baseline"));
        let Outcome { op, shape, seconds, .. } = outcome;
        let beside = |s: f64| format!("{:.1}, {:.2} × ours", s * 1e6, s / seconds);
        let peer = outcome.peer_seconds.map_or(String::new(), beside);
        let (us, percent, bar) = (seconds * 1e6, 100.0 * share, bar(outcome.bar));
        format!(
            "| {op} | {shape} | {us:.1} | {rate} | {percent:.0} % of {of}{times} | {bar} \
             | {holds} | {peer} |\n"
        )
    }

    /// What was checked, and what was wrong with it.
    fn faults(&self, text: &mut String) {
        let wrong: Vec<_> = self.checks.iter().filter(|(_, error)| error.is_some()).collect();
        let (right, all) = (self.checks.len() - wrong.len(), self.checks.len());
        let mut line = |words: String| writeln!(text, "- {words}").unwrap_or_default();
        line(match all {
            0 => "**checks against the oracle**: not run".into(),
            _ => format!("{right} of {all} checks against the oracle hold"),
        });
        for (name, error) in wrong {
            line(format!("**{name}**: {}", error.as_deref().unwrap_or_default()));
        }
        if self.sanitizer.is_empty() {
            line("**compute-sanitizer**: not run".into());
        }
        for (tool, result) in &self.sanitizer {
            line(match result {
                Ok(ran) => format!("compute-sanitizer {tool}: clean, {ran}"),
                Err(why) => format!("**compute-sanitizer {tool}**: {why}"),
            });
        }
        for (bench, why) in &self.failed {
            line(format!("**{bench}** did not run: {why}"));
        }
        text.push('\n');
    }
}

fn bar(bar: Bar) -> String {
    match bar {
        Bar::OfCopy(share) => format!("≥ {:.0} % of copy", 100.0 * share),
        Bar::Tflops(least) => format!("≥ {least} TFLOP/s"),
        Bar::Microseconds(most) => format!("≤ {most} µs"),
        Bar::Times(least) => format!("≥ {least} × the baseline"),
        Bar::None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(bar: Bar, seconds: f64) -> Outcome {
        Outcome {
            op: "add",
            shape: "1 × 8".into(),
            work: Work::Bytes(80.0),
            bar,
            seconds,
            baseline_seconds: Some(4.0),
            peer_seconds: Some(2.0),
        }
    }

    #[test]
    fn bars_are_judged_against_the_run_s_own_ceiling() {
        let holds = |bar, seconds| outcome(bar, seconds).holds(100.0);
        assert_eq!(holds(Bar::OfCopy(0.85), 1.0), Some(false));
        assert_eq!(holds(Bar::OfCopy(0.80), 1.0), Some(true));
        assert_eq!(holds(Bar::Times(3.0), 1.0), Some(true));
        assert_eq!(holds(Bar::Times(5.0), 1.0), Some(false));
        assert_eq!(holds(Bar::Microseconds(100.0), 1e-4), Some(true));
        assert_eq!(holds(Bar::None, 1.0), None);
    }

    #[test]
    fn whatever_is_wrong_is_told_and_the_report_does_not_hold() {
        let report = Report {
            copy_rate: 100.0,
            product_rate: 1.0,
            checks: vec![("add".into(), None)],
            sanitizer: vec![("memcheck".into(), Ok("1 check".into()))],
            outcomes: vec![outcome(Bar::OfCopy(0.8), 1.0)],
            ..Report::default()
        };
        assert!(report.holds());
        let row = "80 % of copy, 4.0 × the baseline | ≥ 80 % of copy | yes | ";
        assert!(report.markdown().contains(row));
        assert!(report.markdown().contains("2000000.0, 2.00 × ours |"));
        let slow = vec![outcome(Bar::OfCopy(0.8), 2.0)];
        let slow = Report { outcomes: slow, ..report.clone() };
        assert!(!slow.holds() && slow.markdown().contains("**no**"));
        let wrong = vec![("rope".to_owned(), Some("element 3".to_owned()))];
        let wrong = Report { checks: wrong, ..report.clone() };
        assert!(!wrong.holds() && wrong.markdown().contains("**rope**: element 3"));
        let racy = vec![("racecheck".to_owned(), Err("a race".to_owned()))];
        let racy = Report { sanitizer: racy, ..report.clone() };
        assert!(!racy.holds() && racy.json()["sanitizer"][0]["clean"] == false);
        let unwatched = Report { sanitizer: Vec::new(), ..report };
        assert!(!unwatched.holds() && unwatched.markdown().contains("sanitizer**: not run"));
    }
}
