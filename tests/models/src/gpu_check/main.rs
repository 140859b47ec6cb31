#![forbid(unsafe_code)]
//! `gpu-check`: what one call on a borrowed device is to find out, in the order of what it is
//! worth: the machine, the checks that are likeliest to fail, the device's ceilings, every check,
//! decode steps of large models, every bench, profiles, compute-sanitizer, and PyTorch on the same
//! shapes.
//!
//! Each line has a share of the budget and processes of its own: a kernel that faults or hangs
//! costs its piece, and a line its own time at most. The report is whole at any moment.

mod device;
mod lines;
mod peer;
mod process;
mod sanitizer;
mod work;

use checks::bench::{About, End, Report, Scale, Told};
use clap::{Args, Parser, Subcommand};
use lines::{Line, Order};
use std::{
    fs,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

#[derive(Parser)]
struct Cli {
    /// The device's number
    #[arg(long, default_value_t = 0, global = true)]
    device: usize,
    /// Nothing but pieces with this in their names; the report gets a name of its own
    #[arg(long, default_value = "", global = true)]
    only: String,
    /// Shapes that just run every line, for a device in software
    #[arg(long, global = true)]
    tiny: bool,
    /// Where the report goes
    #[arg(long, default_value = "docs/gpu")]
    out: PathBuf,
    /// The day, for the report
    #[arg(long, default_value = "undated")]
    date: String,
    /// Seconds that all lines together may take; each has its share
    #[arg(long, default_value_t = 560)]
    budget: u64,
    /// Which lines, by name or number [default: all, in their order]
    #[arg(long, value_delimiter = ',')]
    lines: Vec<Line>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Runs a line's pieces in this process, one line of JSON each
    Pieces(Pieces),
}

#[derive(Args)]
struct Pieces {
    line: Line,
    /// Begins nothing after so many seconds
    #[arg(long)]
    within: u64,
    /// Seconds that the device may take for a piece of work
    #[arg(long)]
    patience: u64,
    /// So many of the first are left out
    #[arg(long, default_value_t = 0)]
    skip: usize,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match &cli.command {
        None => run(&cli),
        Some(Command::Pieces(pieces)) => pieces_of(&cli, pieces),
    };
    done.unwrap_or_else(|error| {
        eprintln!("gpu-check: {error}");
        ExitCode::from(2)
    })
}

fn scale(cli: &Cli) -> Scale {
    if cli.tiny { Scale::Tiny } else { Scale::Full }
}

fn pieces_of(cli: &Cli, pieces: &Pieces) -> Result<ExitCode, String> {
    let wanted = work::Wanted {
        device: cli.device,
        patience: Duration::from_secs(pieces.patience),
        within: Duration::from_secs(pieces.within),
        skip: pieces.skip,
        only: &cli.only,
        scale: scale(cli),
    };
    let done = work::run(pieces.line, &wanted);
    // What the report should say, beside what the process ends with.
    if let Err(error) = &done {
        println!("{}", serde_json::json!({ "facts": { "no device": error } }));
    }
    Ok(match done? {
        work::Done::All => ExitCode::SUCCESS,
        work::Done::Broken => ExitCode::from(process::BROKEN),
    })
}

/// Every line asked for; success where all of the report holds.
fn run(cli: &Cli) -> Result<ExitCode, String> {
    let asked = if cli.lines.is_empty() { Line::ALL.to_vec() } else { cli.lines.clone() };
    // Who the device is belongs into every report.
    let lines: Vec<Line> =
        Line::ALL.into_iter().filter(|l| *l == Line::Machine || asked.contains(l)).collect();
    let all: u64 = lines.iter().map(|line| line.seconds()).sum();
    // A device takes some seconds to open. Of one piece alone, nobody knows in which line it is.
    let share = |line: &Line| match cli.only.as_str() {
        "" => (cli.budget * line.seconds() / all).max(10),
        _ => cli.budget,
    };
    let told = |line: &Line| Told { name: line.name().into(), may: share(line), ..Told::default() };
    let about = About { date: cli.date.clone(), ..About::default() };
    let mut report = Report { about, lines: lines.iter().map(told).collect(), ..Report::default() };
    for (at, line) in lines.iter().enumerate() {
        report.lines[at].end = End::Running;
        let order = Order {
            device: cli.device,
            only: cli.only.clone(),
            scale: scale(cli),
            seconds: share(line),
            out: cli.out.clone(),
        };
        let begun = Instant::now();
        // Its name has the device's in it, which the first line finds out.
        let told = |report: &Report| match report.about.device.as_str() {
            "" => Ok(()),
            _ => write(cli, report),
        };
        let done = lines::run(*line, &order, &mut report, &told);
        report.lines[at].took = begun.elapsed().as_secs_f64();
        report.lines[at].end = match done {
            Ok(()) => End::Done,
            Err(why) => {
                eprintln!("gpu-check: {}: {why}", line.name());
                End::Cut(why)
            }
        };
        write(cli, &report)?;
    }
    print!("{}", report.markdown());
    Ok(if report.holds() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Where the report lies, without its ending.
fn name(cli: &Cli, report: &Report) -> String {
    let plain = |text: &str| -> String {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric());
        words.filter(|word| !word.is_empty()).collect::<Vec<_>>().join("-").to_lowercase()
    };
    let device = match report.about.device.as_str() {
        "" => "no-device".into(),
        device => plain(device),
    };
    let only =
        if cli.only.is_empty() { String::new() } else { format!("-only-{}", plain(&cli.only)) };
    let names: Vec<&str> = cli.lines.iter().map(|line| line.name()).collect();
    let lines = if names.is_empty() { String::new() } else { format!("-{}", names.join("-")) };
    format!("{device}-{}{lines}{only}", cli.date)
}

fn write(cli: &Cli, report: &Report) -> Result<(), String> {
    let failed = |path: &PathBuf, error| format!("{}: {error}", path.display());
    fs::create_dir_all(&cli.out).map_err(|error| failed(&cli.out, error))?;
    let name = name(cli, report);
    let json = serde_json::to_string_pretty(&report.json()).map_err(|error| error.to_string())?;
    for (ending, contents) in [("json", json + "\n"), ("md", report.markdown())] {
        // Whole at any moment: whoever stops this keeps the last one.
        let path = cli.out.join(format!("{name}.{ending}"));
        let new = cli.out.join(format!("{name}.{ending}.new"));
        fs::write(&new, contents).map_err(|error| failed(&new, error))?;
        fs::rename(&new, &path).map_err(|error| failed(&path, error))?;
    }
    Ok(())
}
