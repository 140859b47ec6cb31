//! The parts of a report, each by processes of their own, told as soon as they are known.

use crate::process::{self, Limits, Line};
use checks::bench::{Bench, Report};
use serde_json::Value;
use std::{
    env,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

const TOOLS: [&str; 3] = ["memcheck", "racecheck", "synccheck"];
/// What compute-sanitizer ends with where it has found something.
const FOUND: &str = "9";
/// Seconds that a piece of work may take on the device, and under a sanitizer.
const PATIENCE: u64 = 30;
const PATIENCE_WATCHED: u64 = 300;
/// For work that was begun in time.
const GRACE: Duration = Duration::from_secs(60);
/// Lines of a sanitizer that a report tells.
const SAID_MAX: usize = 24;

/// What is to be run, and for how long.
pub struct Order {
    pub device: usize,
    /// Nothing of a part, or of a tool's, is begun after so many seconds.
    pub seconds: u64,
    /// Part of the names of checks and benches.
    pub only: String,
}

impl Order {
    /// A process of this program that leaves out the first `skip` pieces.
    fn command(&self, what: &str, patience: u64, until: Instant, skip: usize) -> Vec<String> {
        let left = until.saturating_duration_since(Instant::now()).as_secs();
        let numbers = [
            ("--device", self.device as u64),
            ("--patience", patience),
            ("--within", left),
            ("--skip", skip as u64),
        ];
        let mut all = vec![what.to_owned(), "--only".into(), self.only.clone()];
        all.extend(numbers.iter().flat_map(|(name, n)| [(*name).to_owned(), n.to_string()]));
        all
    }

    fn limits(&self, patience: u64) -> (Instant, Limits) {
        let until = Instant::now() + Duration::from_secs(self.seconds);
        let silence = Duration::from_secs(patience) + GRACE;
        (until, Limits { end: until + GRACE, silence })
    }
}

fn this() -> Result<PathBuf, String> {
    env::current_exe().map_err(|error| error.to_string())
}

/// Every check, the long ones too.
pub fn checks(order: &Order, report: &mut Report) -> Result<(), String> {
    report.checks.clear();
    let (until, limits) = order.limits(PATIENCE);
    let this = this()?;
    let command = |skip| {
        let mut command = Command::new(&this);
        command.args(order.command("checks", PATIENCE, until, skip)).arg("--long");
        command
    };
    let odd = process::every(command, limits, |line| match line {
        Line::Done { name, error, value } => {
            eprintln!("{name}: {}, {} s", error.as_deref().unwrap_or("right"), value["took"]);
            report.checks.push((name.clone(), error.clone()));
        }
        Line::Skipped(name) => {
            report.checks.push((name.clone(), Some("there was no time for it".into())));
        }
        _ => {}
    })?;
    let odd = odd.map(|how| ("the end of the process".to_owned(), Some(how)));
    report.checks.extend(odd);
    Ok(())
}

/// The checks that are not long under every tool; `told` after each.
pub fn sanitizer(
    order: &Order,
    report: &mut Report,
    told: &dyn Fn(&Report) -> Result<(), String>,
) -> Result<(), String> {
    report.sanitizer.clear();
    for tool in TOOLS {
        let result = watched(order, tool);
        eprintln!("{tool}: {}", result.as_ref().unwrap_or_else(|error| error));
        report.sanitizer.push((tool.to_owned(), result));
        told(report)?;
    }
    Ok(())
}

fn watched(order: &Order, tool: &str) -> Result<String, String> {
    let program = find().ok_or(
        "compute-sanitizer is not installed: put it on PATH or name its toolkit in CUDA_HOME",
    )?;
    let this = this()?;
    let (until, limits) = order.limits(PATIENCE_WATCHED);
    let command = |skip| {
        let mut command = Command::new(&program);
        command.args(["--tool", tool, "--error-exitcode", FOUND, "--print-limit", "20"]);
        command.arg(&this).args(order.command("checks", PATIENCE_WATCHED, until, skip));
        command
    };
    let (mut ran, mut skipped, mut wrong, mut said) = (0, 0, Vec::new(), Vec::new());
    let odd = process::every(command, limits, |line| match line {
        Line::Done { name, error, value } => {
            eprintln!("{tool}: {name}: {:?}, {} s", error, value["took"]);
            ran += 1;
            wrong.extend(error.as_ref().map(|error| format!("{name}: {error}")));
        }
        Line::Skipped(_) => skipped += 1,
        Line::Other(line) if line.starts_with("=====") => {
            eprintln!("{line}");
            if said.len() < SAID_MAX {
                said.push(line.trim_start_matches('=').trim().to_owned());
            }
        }
        _ => {}
    })
    .map_err(|error| format!("{error}; {}", said.join(" / ")))?;
    let clean = format!(
        "{ran} checks{}",
        match skipped {
            0 => String::new(),
            skipped => format!(", no time for {skipped} more"),
        }
    );
    if wrong.is_empty() && odd.is_none() && ran > 0 {
        return Ok(clean);
    }
    let odd = odd.unwrap_or_default();
    Err(format!("{clean}; {odd}; {}; {}", wrong.join("; "), said.join(" / ")))
}

/// On PATH, or in the toolkit that CUDA_HOME names, or where toolkits are installed.
fn find() -> Option<PathBuf> {
    let mut folders: Vec<PathBuf> =
        env::split_paths(&env::var_os("PATH").unwrap_or_default()).collect();
    let homes = [env::var_os("CUDA_HOME").map(PathBuf::from), Some("/usr/local/cuda".into())];
    for home in homes.into_iter().flatten() {
        folders.extend([home.join("bin"), home.join("compute-sanitizer")]);
    }
    let programs = folders.into_iter().map(|folder| folder.join("compute-sanitizer"));
    programs.into_iter().find(|program| program.is_file())
}

/// The ceilings and every bench; `told` after each.
pub fn benches<D: cuda::Driver>(
    order: &Order,
    benches: &[Bench<D>],
    report: &mut Report,
    told: &dyn Fn(&Report) -> Result<(), String>,
) -> Result<(), String> {
    (report.outcomes, report.failed, report.about.peer) = (Vec::new(), Vec::new(), None);
    let (until, limits) = order.limits(PATIENCE);
    let this = this()?;
    let command = |skip| {
        let mut command = Command::new(&this);
        command.args(order.command("benches", PATIENCE, until, skip));
        command
    };
    let mut written = Ok(());
    let odd = process::every(command, limits, |line| {
        match line {
            Line::Done { name, error: None, value } => {
                let bench = benches.iter().find(|bench| bench.name() == *name);
                let outcome = bench.zip(value["seconds"].as_f64()).map(|(bench, seconds)| {
                    let mut outcome = bench.outcome(seconds);
                    outcome.baseline_seconds = value["baseline_seconds"].as_f64();
                    outcome
                });
                report.outcomes.extend(outcome);
                eprintln!("{name}: {:.1} µs", 1e6 * value["seconds"].as_f64().unwrap_or(f64::NAN));
            }
            Line::Done { name, error: Some(error), .. } => {
                eprintln!("{name}: {error}");
                report.failed.push((name.clone(), error.clone()));
            }
            Line::Skipped(name) => {
                report.failed.push((name.clone(), "there was no time for it".into()));
            }
            Line::Told(ceilings) => {
                let rate = |key: &str| ceilings.get(key).and_then(Value::as_f64);
                report.copy_rate = rate("copy_rate").unwrap_or(report.copy_rate);
                report.product_rate = rate("product_rate").unwrap_or(report.product_rate);
                let error = ceilings["no_ceiling"].as_str();
                report.failed.extend(error.map(|e| ("the ceiling of products".into(), e.into())));
            }
            Line::Begins(_) | Line::Ends | Line::Other(_) => return,
        }
        if written.is_ok() {
            written = told(report);
        }
    })?;
    report.failed.extend(odd.map(|how| ("the end of the process".to_owned(), how)));
    written
}
