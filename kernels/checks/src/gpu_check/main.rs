#![forbid(unsafe_code)]
//! `gpu-check`: every check on a real device, under compute-sanitizer too but for the long ones,
//! then every bench; one report as JSON and Markdown. Needs a CUDA device and its driver, nothing
//! else.

mod device;
mod peer;
mod sanitizer;

use checks::bench::{self, Bar, Bench, Report, Scale};
use clap::{Parser, Subcommand};
use kernels::{KernelError, cuda::Gpu};
use std::{fs, path::PathBuf, process::ExitCode, time::Duration};

/// Timed runs of each bench.
const SAMPLES: usize = 15;
/// Seconds of checks without a sanitizer, and under each of its tools.
const CHECKS_SECONDS: u64 = 240;
const SANITIZER_SECONDS: u64 = 120;
/// The bars in numbers of their own, not in shares of a ceiling, are this device's.
const BARS_DEVICE: &str = "H200";

#[derive(Parser)]
struct Args {
    /// The device's number
    #[arg(long, default_value_t = 0, global = true)]
    device: usize,
    /// Where the report goes
    #[arg(long, default_value = "docs/gpu")]
    out: PathBuf,
    /// The day, for the report
    #[arg(long, default_value = "undated")]
    date: String,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Runs checks alone, one line of JSON each
    Checks {
        /// Begins no check after so many seconds
        #[arg(long)]
        within: u64,
        /// Seconds that the device may take for a piece of work
        #[arg(long, default_value_t = 30)]
        patience: u64,
        /// The long ones too
        #[arg(long)]
        long: bool,
    },
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match args.command {
        Some(Command::Checks { within, patience, long }) => {
            let mut checks = checks::all();
            if long {
                checks.extend(checks::long());
            }
            let seconds = Duration::from_secs;
            device::checks(args.device, &checks, (seconds(within), seconds(patience)))
        }
        None => run(&args),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("gpu-check: {error}");
            ExitCode::from(2)
        }
    }
}

/// Everything; whether all of it holds.
fn run(args: &Args) -> Result<bool, String> {
    let gpu = device::open(args.device, Duration::from_secs(30)).map_err(text)?;
    let mut report = Report { about: device::about(&gpu, &args.date)?, ..Report::default() };
    // Checks run in a process of their own: a fault there takes no bench with it.
    report.checks = sanitizer::plain(args.device, CHECKS_SECONDS)?;
    report.sanitizer = sanitizer::all(args.device, SANITIZER_SECONDS);
    (report.copy_rate, report.product_rate) = ceilings(&gpu, args.device)?;
    drop(gpu);
    let mut benches = bench::all(Scale::Full);
    if !report.about.device.contains(BARS_DEVICE) {
        benches.iter_mut().for_each(|bench| bench.bar = elsewhere(bench.bar));
    }
    measure(&mut report, args.device, &benches)?;
    match peer::ask(&benches) {
        Ok(answer) => {
            report.about.peer = Some(answer.name.clone());
            answer.fill(&benches, &mut report.outcomes);
        }
        Err(why) => eprintln!("no figures of PyTorch: {why}"),
    }
    write(args, &report)?;
    Ok(report.holds())
}

fn text(error: KernelError) -> String {
    error.to_string()
}

/// A bar on a device that it was not set for.
fn elsewhere(bar: Bar) -> Bar {
    match bar {
        Bar::Tflops(_) | Bar::Microseconds(_) => Bar::None,
        bar => bar,
    }
}

fn ceilings(gpu: &Gpu, ordinal: usize) -> Result<(f64, f64), String> {
    let copy = device::copy_rate(gpu).map_err(text)?;
    let product = bench::ceiling(Scale::Full);
    let make = device::maker(ordinal);
    let clock = device::clock(ordinal).map_err(text)?;
    let outcome = bench::measure(&make, &product, &clock, SAMPLES).map_err(text)?;
    Ok((copy, outcome.rate()))
}

fn measure(report: &mut Report, ordinal: usize, benches: &[Bench<Gpu>]) -> Result<(), String> {
    let make = device::maker(ordinal);
    let clock = device::clock(ordinal).map_err(text)?;
    for bench in benches {
        eprintln!("{} {}", bench.op, bench.shape);
        match bench::measure(&make, bench, &clock, SAMPLES) {
            Ok(outcome) => report.outcomes.push(outcome),
            Err(error) => {
                let name = format!("{} {}", bench.op, bench.shape);
                report.failed.push((name, error.to_string()));
            }
        }
    }
    Ok(())
}

fn write(args: &Args, report: &Report) -> Result<(), String> {
    let failed = |path: &PathBuf, error| format!("{}: {error}", path.display());
    fs::create_dir_all(&args.out).map_err(|error| failed(&args.out, error))?;
    let device = report.about.device.to_lowercase();
    let device: Vec<&str> = device.split(|c: char| !c.is_ascii_alphanumeric()).collect();
    let name = format!("{}-{}", device.join("-"), args.date);
    let json = serde_json::to_string_pretty(&report.json()).map_err(|error| error.to_string())?;
    for (ending, contents) in [("json", json + "\n"), ("md", report.markdown())] {
        let path = args.out.join(format!("{name}.{ending}"));
        fs::write(&path, contents).map_err(|error| failed(&path, error))?;
        println!("{}", path.display());
    }
    Ok(())
}
