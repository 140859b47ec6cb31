//! One report of one run on one device: as JSON for programs, as Markdown for people. Whole at any
//! moment: what has not run yet says so.

use super::{Bar, Outcome, StepOutcome, Work};
use serde_json::{Value, json};
use std::{collections::BTreeMap, fmt::Write};

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

/// How far a line of the report has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum End {
    #[default]
    Waiting,
    Running,
    /// All of it was run, with whatever result.
    Done,
    /// Why not all of it.
    Cut(String),
}

/// A line of the report.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Told {
    pub name: String,
    /// Seconds that it may take, and has taken.
    pub may: u64,
    pub took: f64,
    pub end: End,
}

/// Failures that are asked for one by one.
const NEXT_MAX: usize = 8;

/// All that a run has found out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    pub about: About,
    pub lines: Vec<Told>,
    /// What the machine is, in words.
    pub facts: Vec<(String, String)>,
    /// What the device can do at all, by name: `copy_bytes_per_second` (read and written),
    /// `read_bytes_per_second`, `bf16_flops_per_second` and others.
    pub ceilings: BTreeMap<String, f64>,
    /// Name of each check, and what was wrong.
    pub checks: Vec<(String, Option<String>)>,
    /// Name of each sanitizer's tool, and what came of it: `Ok` says how much ran.
    pub sanitizer: Vec<(String, Result<String, String>)>,
    pub steps: Vec<(String, StepOutcome)>,
    pub outcomes: Vec<Outcome>,
    /// Measurements that did not run, and why.
    pub failed: Vec<(String, String)>,
}

impl Report {
    /// Whether all that was asked for is known, nothing is wrong and every bar holds.
    pub fn holds(&self) -> bool {
        let bars = self.outcomes.iter().all(|o| o.holds(self.copy_rate()) != Some(false));
        let sanitizer = self.sanitizer.iter().all(|(_, result)| result.is_ok());
        let lines = self.lines.iter().all(|line| line.end == End::Done);
        let right = self.failed.is_empty() && self.checks.iter().all(|check| check.1.is_none());
        bars && sanitizer && lines && right
    }

    fn ceiling(&self, name: &str) -> f64 {
        self.ceilings.get(name).copied().unwrap_or(f64::NAN)
    }

    /// The device's own copy, bytes read and written per second.
    fn copy_rate(&self) -> f64 {
        self.ceiling("copy_bytes_per_second")
    }

    /// What the rate is a share of, and the share.
    fn share(&self, outcome: &Outcome) -> (&'static str, f64) {
        match outcome.work {
            Work::Bytes(_) => ("copy", outcome.rate() / self.copy_rate()),
            Work::Flops(_) => ("product", outcome.rate() / self.ceiling("bf16_flops_per_second")),
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
            "lines": self.lines.iter().map(line).collect::<Vec<_>>(),
            "next": self.next(),
            "facts": self.facts,
            "ceilings": self.ceilings,
            "holds": self.holds(),
            "checks": checks,
            "sanitizer": sanitizer.collect::<Vec<_>>(),
            "steps": self.steps.iter().map(|(n, s)| self.step(n, s)).collect::<Vec<_>>(),
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
            "holds": outcome.holds(self.copy_rate()),
            "baseline_seconds": outcome.baseline_seconds,
            "peer_seconds": outcome.peer_seconds,
        })
    }

    /// Its share of what reading its bytes takes at best.
    fn of_floor(&self, step: &StepOutcome) -> f64 {
        step.bytes() / self.ceiling("read_bytes_per_second") / step.seconds
    }

    fn step(&self, name: &str, step: &StepOutcome) -> Value {
        let kernel = |kernel: &(String, f64, f64)| {
            let (name, seconds, bytes) = kernel;
            json!({ "kernel": name, "seconds": seconds, "bytes": bytes })
        };
        json!({
            "name": name,
            "layers": step.layers,
            "seconds": step.seconds,
            "apart_seconds": step.apart_seconds,
            "eager_seconds": step.eager_seconds,
            "bytes": step.bytes(),
            "of_read_floor": self.of_floor(step),
            "kernels": step.kernels.iter().map(kernel).collect::<Vec<_>>(),
        })
    }

    /// What to do with this report, the most pressing first.
    pub fn next(&self) -> Vec<String> {
        let mut all = Vec::new();
        let wrong = self.checks.iter().filter(|(_, error)| error.is_some()).map(|(name, _)| name);
        let failed = self.failed.iter().map(|(name, _)| name);
        for name in wrong.chain(failed).take(NEXT_MAX) {
            all.push(format!(
                "CUDA_LAUNCH_BLOCKING=1 ./dev gpu-check --budget 60 --only \"{name}\": it failed"
            ));
        }
        let cut: Vec<&str> = self
            .lines
            .iter()
            .filter(|line| line.end != End::Done)
            .map(|line| line.name.as_str())
            .collect();
        if !cut.is_empty() {
            let names = cut.join(",");
            all.push(format!("./dev gpu-check --lines {names}: they did not come to their end"));
        }
        if all.is_empty() {
            all.push(
                "a served run with 64 clients: every line came to its end, no check fails".into(),
            );
        }
        all.push("commit this report with the card's name and the day".into());
        all
    }

    pub fn markdown(&self) -> String {
        let About { device, compute_capability, driver, date, peer } = &self.about;
        let peer = peer.as_deref().unwrap_or("no figures");
        let mut text = format!(
            "# {device}, {date}\n\nCompute capability {compute_capability}, driver for CUDA \
             {driver}. PyTorch: {peer}. A figure is a share of a ceiling measured in the same \
             run.\n\nNext:\n"
        );
        for next in self.next() {
            text += &format!("1. {next}\n");
        }
        text += "\n| line | may take s | took s | how it ended |\n|---|---:|---:|---|\n";
        for Told { name, may, took, end } in &self.lines {
            let end = match end {
                End::Waiting => "not begun",
                End::Running => "**running**",
                End::Done => "done",
                End::Cut(why) => why,
            };
            text += &format!("| {name} | {may} | {took:.1} | {end} |\n");
        }
        text.push('\n');
        self.facts.iter().for_each(|(name, value)| text += &format!("- {name}: {value}\n"));
        self.ceilings.iter().for_each(|(name, value)| text += &format!("- {name}: {value:.4e}\n"));
        self.faults(&mut text);
        self.step_tables(&mut text);
        text += "| op | shape | µs | rate | of ceiling | bar | holds | PyTorch µs |\n\
                 |---|---|---:|---:|---:|---|---|---:|\n";
        for outcome in &self.outcomes {
            text += &self.row(outcome);
        }
        text
    }

    /// Steps, and what each kernel has of them.
    fn step_tables(&self, text: &mut String) {
        if self.steps.is_empty() {
            return;
        }
        *text += "Steps are captured, and their kernels overlap; \"apart\" they do not, and \
                  \"eager\" they are launched one by one.\n\n\
                  | step | layers | ms | apart | eager | GB | of the read floor | \
                  each kernel: µs (GB/s) |\n\
                  |---|---:|---:|---:|---:|---:|---:|---|\n";
        for (name, step) in &self.steps {
            let kernel = |(name, seconds, bytes): &(String, f64, f64)| {
                format!("{name} {:.1} ({:.0})", seconds * 1e6, bytes / seconds / 1e9)
            };
            let kernels: Vec<String> = step.kernels.iter().map(kernel).collect();
            *text += &format!(
                "| {name} | {} | {:.3} | {:.3} | {:.3} | {:.2} | {} | {} |\n",
                step.layers,
                step.seconds * 1e3,
                step.apart_seconds * 1e3,
                step.eager_seconds * 1e3,
                step.bytes() / 1e9,
                percent(self.of_floor(step)),
                kernels.join(", "),
            );
        }
        text.push('\n');
    }

    fn row(&self, outcome: &Outcome) -> String {
        let (of, share) = self.share(outcome);
        let rate = match outcome.work {
            Work::Bytes(_) => format!("{:.2} TB/s", outcome.rate() / 1e12),
            Work::Flops(_) => format!("{:.0} TFLOP/s", outcome.rate() / 1e12),
        };
        let holds = match outcome.holds(self.copy_rate()) {
            Some(true) => "yes",
            Some(false) => "**no**",
            None => "",
        };
        let times = outcome.baseline_seconds.map(|base| base / outcome.seconds);
        let times = times.map_or(String::new(), |times| format!(", {times:.1} × the baseline"));
        let Outcome { op, shape, seconds, .. } = outcome;
        let beside = |s: f64| format!("{:.1}, {:.2} × ours", s * 1e6, s / seconds);
        let peer = outcome.peer_seconds.map_or(String::new(), beside);
        let (us, share, bar) = (seconds * 1e6, percent(share), bar(outcome.bar));
        format!(
            "| {op} | {shape} | {us:.1} | {rate} | {share} of {of}{times} | {bar} \
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

/// Of a ceiling, where it is known.
fn percent(share: f64) -> String {
    if share.is_finite() { format!("{:.0} %", 100.0 * share) } else { "unknown share".into() }
}

fn line(told: &Told) -> Value {
    let end = match &told.end {
        End::Waiting => "not begun",
        End::Running => "running",
        End::Done => "done",
        End::Cut(why) => why,
    };
    json!({ "line": told.name, "may": told.may, "took": told.took, "end": end })
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
        let ceilings = [("copy_bytes_per_second", 100.0), ("read_bytes_per_second", 50.0)];
        let ceilings = ceilings.map(|(name, rate)| (name.to_owned(), rate)).into();
        let told = |end| vec![Told { name: "benches".into(), end, ..Told::default() }];
        let step = StepOutcome {
            layers: 2,
            seconds: 1.0,
            apart_seconds: 1.25,
            eager_seconds: 1.5,
            kernels: vec![("qkv".into(), 0.4, 10.0)],
        };
        let report = Report {
            ceilings,
            lines: told(End::Done),
            checks: vec![("add".into(), None)],
            sanitizer: vec![("memcheck".into(), Ok("1 check".into()))],
            steps: vec![("Qwen, 1 × 8".into(), step)],
            outcomes: vec![outcome(Bar::OfCopy(0.8), 1.0)],
            ..Report::default()
        };
        assert!(report.holds() && report.next()[0].contains("served run"));
        let row = "80 % of copy, 4.0 × the baseline | ≥ 80 % of copy | yes | ";
        assert!(report.markdown().contains(row));
        assert!(report.markdown().contains("2000000.0, 2.00 × ours |"));
        // 20 bytes at 50 a second are 0.4 of its second.
        assert!(
            report
                .markdown()
                .contains("| Qwen, 1 × 8 | 2 | 1000.000 | 1250.000 | 1500.000 | 0.00 | 40 % |")
        );
        let slow = vec![outcome(Bar::OfCopy(0.8), 2.0)];
        let slow = Report { outcomes: slow, ..report.clone() };
        assert!(!slow.holds() && slow.markdown().contains("**no**"));
        let wrong = vec![("rope".to_owned(), Some("element 3".to_owned()))];
        let wrong = Report { checks: wrong, ..report.clone() };
        assert!(!wrong.holds() && wrong.markdown().contains("**rope**: element 3"));
        assert!(wrong.next()[0].contains("--only \"rope\""));
        let racy = vec![("racecheck".to_owned(), Err("a race".to_owned()))];
        let racy = Report { sanitizer: racy, ..report.clone() };
        assert!(!racy.holds() && racy.json()["sanitizer"][0]["clean"] == false);
        let cut = Report { lines: told(End::Cut("its time was over".into())), ..report.clone() };
        assert!(!cut.holds() && cut.next()[0].contains("--lines benches"));
        assert!(cut.json()["lines"][0]["end"] == "its time was over");
        let blind = Report { ceilings: BTreeMap::new(), ..report };
        assert!(!blind.holds() && blind.markdown().contains("unknown share of copy"));
    }
}
