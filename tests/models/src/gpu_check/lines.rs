//! The lines of a report, each by processes of their own, told as soon as they are known.

use crate::{
    device::Card,
    peer,
    process::{self, Ended, Limits},
    sanitizer,
};
use checks::bench::{self, Bar, Bench, Report, Scale, StepOutcome};
use clap::ValueEnum;
use serde_json::Value;
use std::{
    env, fs,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

/// The bars in numbers of their own, not in shares of a ceiling, are this device's.
const BARS_DEVICE: &str = "H200";
/// For work of the host between two lines of a process: an oracle's, or a weight's.
const GRACE: Duration = Duration::from_secs(20);
/// A profile that is kept.
const PROFILE_BYTES_MAX: usize = 4 << 20;
/// The kernels of a step whose profile says most.
const PROFILED: &str = "regex:attention_decode|gemm|nvjet|xmma|linear|cutlass";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Line {
    /// nvidia-smi, library paths, every kernel loaded
    #[value(alias = "1")]
    Machine,
    /// The checks that are likeliest to fail
    #[value(alias = "2")]
    Risks,
    /// What the device can do at all
    #[value(alias = "3")]
    Ceilings,
    /// All other checks, whole models among them
    #[value(alias = "4")]
    Checks,
    /// Decode steps of models of 72B
    #[value(alias = "5")]
    Steps,
    /// Every kernel on shapes of large models
    #[value(alias = "6")]
    Benches,
    /// Nsight Compute on the heaviest kernels of a step
    #[value(alias = "7")]
    Profile,
    /// compute-sanitizer's memcheck and synccheck
    #[value(alias = "8")]
    Sanitizer,
    /// PyTorch on the benches' shapes
    #[value(alias = "9")]
    Peer,
}

impl Line {
    pub const ALL: [Self; 9] = [
        Self::Machine,
        Self::Risks,
        Self::Ceilings,
        Self::Checks,
        Self::Steps,
        Self::Benches,
        Self::Profile,
        Self::Sanitizer,
        Self::Peer,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Machine => "machine",
            Self::Risks => "risks",
            Self::Ceilings => "ceilings",
            Self::Checks => "checks",
            Self::Steps => "steps",
            Self::Benches => "benches",
            Self::Profile => "profile",
            Self::Sanitizer => "sanitizer",
            Self::Peer => "peer",
        }
    }

    /// Of a budget of 560, which leaves some for the ends of processes.
    pub fn seconds(self) -> u64 {
        match self {
            Self::Machine => 12,
            Self::Risks => 36,
            Self::Ceilings => 24,
            Self::Checks => 96,
            Self::Steps => 120,
            Self::Benches => 128,
            Self::Profile | Self::Sanitizer | Self::Peer => 48,
        }
    }

    /// Seconds that the device may take for a piece of work.
    fn patience(self, seconds: u64) -> u64 {
        let most = match self {
            Self::Machine | Self::Risks | Self::Ceilings => 5,
            _ => 30,
        };
        most.min((seconds / 4).max(5))
    }
}

/// What is to be run, and for how long.
pub struct Order {
    pub device: usize,
    /// Part of the names of pieces.
    pub only: String,
    pub scale: Scale,
    /// All processes of the line together.
    pub seconds: u64,
    pub out: PathBuf,
}

impl Order {
    pub fn limits(&self, patience: u64) -> Limits {
        let end = Instant::now() + Duration::from_secs(self.seconds);
        Limits { end, silence: Duration::from_secs(patience) + GRACE }
    }

    /// What a process of this program is told that leaves out the first `skip` pieces.
    pub fn pieces(&self, line: Line, patience: u64, end: Instant, skip: usize) -> Vec<String> {
        let left = end.saturating_duration_since(Instant::now());
        // What is begun in the last part of the time would hardly come to its end.
        let within = left.mul_f64(0.85).as_secs();
        let numbers = [
            ("--device", self.device as u64),
            ("--patience", patience),
            ("--within", within),
            ("--skip", skip as u64),
        ];
        let mut all = vec!["pieces".to_owned(), line.name().into()];
        all.extend(["--only".into(), self.only.clone()]);
        all.extend(numbers.iter().flat_map(|(name, n)| [(*name).to_owned(), n.to_string()]));
        all.extend((self.scale == Scale::Tiny).then(|| "--tiny".into()));
        all
    }
}

pub fn this() -> Result<PathBuf, String> {
    env::current_exe().map_err(|error| error.to_string())
}

/// Writes the report as it stands.
pub type Write<'a> = &'a dyn Fn(&Report) -> Result<(), String>;

/// # Errors
/// Why the line did not come to its end; what it found until then is in the report.
pub fn run(line: Line, order: &Order, report: &mut Report, write: Write<'_>) -> Result<(), String> {
    match line {
        Line::Profile => profile(order, report),
        Line::Sanitizer => sanitizer::run(order, report, write),
        Line::Peer => peer::ask(&benches(order, report), report, order.seconds),
        _ => pieces(line, order, report, write),
    }
}

/// All benches; bars in numbers are left to the device that they were set for.
fn benches(order: &Order, report: &Report) -> Vec<Bench<Card>> {
    let mut all = bench::all::<Card>(order.scale);
    if !report.about.device.contains(BARS_DEVICE) {
        for bench in &mut all {
            if matches!(bench.bar, Bar::Tflops(_) | Bar::Microseconds(_)) {
                bench.bar = Bar::None;
            }
        }
    }
    all
}

fn pieces(line: Line, order: &Order, report: &mut Report, write: Write<'_>) -> Result<(), String> {
    let patience = line.patience(order.seconds);
    let (limits, this) = (order.limits(patience), this()?);
    let command = |skip| {
        let mut command = Command::new(&this);
        command.args(order.pieces(line, patience, limits.end, skip));
        command
    };
    let benches = benches(order, report);
    let (mut written, mut skipped) = (Ok(()), 0);
    let odd = process::every(command, limits, |said| {
        match said {
            process::Line::Done { name, error, value } => {
                eprintln!(
                    "{}: {name}: {}, {:.2} s",
                    line.name(),
                    error.as_deref().unwrap_or("done"),
                    value["took"].as_f64().unwrap_or(f64::NAN)
                );
                take(line, report, &benches, (name, error.as_ref(), value));
            }
            process::Line::Skipped(name) => {
                skipped += 1;
                eprintln!("{}: {name}: no time left", line.name());
            }
            process::Line::Told(value) => tell(report, value),
            _ => return,
        }
        if written.is_ok() {
            written = write(report);
        }
    })?;
    written?;
    match (odd, skipped) {
        (Some(how), _) => Err(how),
        (None, 0) => Ok(()),
        (None, skipped) => Err(format!("no time for {skipped} pieces")),
    }
}

/// What a piece came to.
fn take(
    line: Line,
    report: &mut Report,
    benches: &[Bench<Card>],
    (name, error, value): (&str, Option<&String>, &Value),
) {
    let checks = matches!(line, Line::Risks | Line::Checks);
    match error {
        _ if checks => report.checks.push((name.to_owned(), error.cloned())),
        Some(error) => report.failed.push((name.to_owned(), error.clone())),
        None if line == Line::Benches => {
            let bench = benches.iter().find(|bench| bench.name() == name);
            report.outcomes.extend(bench.zip(value["seconds"].as_f64()).map(|(bench, seconds)| {
                let mut outcome = bench.outcome(seconds);
                outcome.baseline_seconds = value["baseline_seconds"].as_f64();
                outcome
            }));
        }
        None if line == Line::Steps => match step(value) {
            Some(step) => report.steps.push((name.to_owned(), step)),
            None => report.facts.push((name.to_owned(), "does not fit into memory".into())),
        },
        None => tell(report, value),
    }
}

fn step(value: &Value) -> Option<StepOutcome> {
    let kernel = |kernel: &Value| {
        let name = kernel[0].as_str()?.to_owned();
        Some((name, kernel[1].as_f64()?, kernel[2].as_f64()?))
    };
    Some(StepOutcome {
        layers: value["layers"].as_u64()? as usize,
        seconds: value["seconds"].as_f64()?,
        apart_seconds: value["apart_seconds"].as_f64()?,
        eager_seconds: value["eager_seconds"].as_f64()?,
        kernels: value["kernels"].as_array()?.iter().map(kernel).collect::<Option<_>>()?,
    })
}

/// Facts and ceilings, and who the device is.
fn tell(report: &mut Report, value: &Value) {
    let object = |key: &str| value[key].as_object().into_iter().flatten();
    for (name, value) in object("facts") {
        let fact = (name.clone(), value.as_str().unwrap_or_default().to_owned());
        if !report.facts.contains(&fact) {
            report.facts.push(fact);
        }
    }
    for (name, value) in object("ceilings") {
        report.ceilings.extend(value.as_f64().map(|value| (name.clone(), value)));
    }
    let text = |key: &str| value["about"][key].as_str().map(str::to_owned);
    if let Some(device) = text("device") {
        report.about.device = device;
        report.about.compute_capability = text("compute_capability").unwrap_or_default();
        report.about.driver = text("driver").unwrap_or_default();
    }
}

/// One step under Nsight Compute, whose words go to a file beside the report.
fn profile(order: &Order, report: &mut Report) -> Result<(), String> {
    let program = sanitizer::find("ncu").ok_or("ncu is not installed")?;
    let steps = bench::steps(order.scale);
    // As a server is when it is busy: grouped queries, fp8, many sequences.
    let step = steps.iter().rev().find(|step| step.name().contains("fp8")).ok_or("no step")?;
    let limits = order.limits(order.seconds);
    let order = Order { only: step.name(), out: order.out.clone(), ..*order };
    let mut command = Command::new(program);
    command
        .args(["--clock-control", "none", "--launch-count", "12", "--kernel-name", PROFILED])
        .args(["--section", "SpeedOfLight", "--section", "MemoryWorkloadAnalysis"])
        .args(["--section", "WarpStateStats"])
        .arg(this()?)
        .args(order.pieces(Line::Steps, 30, limits.end, 0));
    let mut text = String::new();
    let ended = process::run(&mut command, "", limits, |line| {
        if text.len() < PROFILE_BYTES_MAX {
            text += line;
            text.push('\n');
        }
    })?;
    fs::create_dir_all(&order.out).map_err(|error| error.to_string())?;
    let path = order.out.join("ncu.txt");
    fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?;
    report.facts.push(("profile".into(), format!("of {}, in ncu.txt", step.name())));
    match ended {
        Ended::By(status) if status.success() => Ok(()),
        Ended::By(status) => Err(format!("ncu ended ({status})")),
        Ended::Killed(why) => Err(format!("ncu was ended: {why}")),
    }
}
