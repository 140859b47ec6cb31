#![forbid(unsafe_code)]
//! `gpu-check`: every check on a real device, under compute-sanitizer too but for the long ones,
//! then every bench, then the same by PyTorch; one report as JSON and Markdown, written after each
//! step. Needs a CUDA device and its driver, nothing else.
//!
//! Parts can be run one by one: a report of the same device and day keeps what an earlier run
//! found out of the others.

mod device;
mod parts;
mod peer;
mod process;
mod work;

use checks::bench::{self, Bar, Bench, Report, Scale};
use clap::{Args, Parser, Subcommand, ValueEnum};
use device::Card;
use parts::Order;
use std::{fs, path::PathBuf, process::ExitCode, time::Duration};
use work::{Done, Wanted};

/// The bars in numbers of their own, not in shares of a ceiling, are this device's.
const BARS_DEVICE: &str = "H200";

#[derive(Parser)]
struct Cli {
    /// The device's number
    #[arg(long, default_value_t = 0, global = true)]
    device: usize,
    /// Nothing but checks and benches with this in their names; the report gets a name of its own
    #[arg(long, default_value = "", global = true)]
    only: String,
    /// Where the report goes
    #[arg(long, default_value = "docs/gpu")]
    out: PathBuf,
    /// The day, for the report
    #[arg(long, default_value = "undated")]
    date: String,
    /// What to run, in this order
    #[arg(long, value_delimiter = ',', default_value = "checks,sanitizer,benches,peer")]
    parts: Vec<Part>,
    /// Begins nothing of a part, or of one of the sanitizer's three tools, after so many seconds
    #[arg(long, default_value_t = 240)]
    seconds: u64,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    Checks,
    Sanitizer,
    Benches,
    Peer,
}

#[derive(Subcommand)]
enum Command {
    /// Runs checks in this process, one line of JSON each
    Checks {
        #[command(flatten)]
        piece: Piece,
        /// The long ones too
        #[arg(long)]
        long: bool,
    },
    /// Runs benches in this process, one line of JSON each
    Benches {
        #[command(flatten)]
        piece: Piece,
    },
}

#[derive(Args)]
struct Piece {
    /// Begins nothing after so many seconds
    #[arg(long, default_value_t = 240)]
    within: u64,
    /// Seconds that the device may take for a piece of work
    #[arg(long, default_value_t = 30)]
    patience: u64,
    /// So many of the first are left out
    #[arg(long, default_value_t = 0)]
    skip: usize,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match &cli.command {
        None => run(&cli),
        Some(Command::Checks { piece, long }) => {
            let mut checks = checks::all();
            if *long {
                checks.extend(checks::sampling::long_checks());
                checks.extend(models::checks());
            }
            alone(&cli, piece, |card, wanted| Ok(work::checks(card, &checks, wanted)))
        }
        Some(Command::Benches { piece }) => alone(&cli, piece, work::benches),
    };
    done.unwrap_or_else(|error| {
        eprintln!("gpu-check: {error}");
        ExitCode::from(2)
    })
}

fn alone(
    cli: &Cli,
    piece: &Piece,
    work: impl FnOnce(&Card, &Wanted<'_>) -> Result<Done, String>,
) -> Result<ExitCode, String> {
    let patience = Duration::from_secs(piece.patience);
    let card = Card::open(cli.device, patience).map_err(|error| error.to_string())?;
    let within = Duration::from_secs(piece.within);
    Ok(match work(&card, &Wanted { within, skip: piece.skip, only: &cli.only })? {
        Done::All => ExitCode::SUCCESS,
        Done::Broken => ExitCode::from(process::BROKEN),
    })
}

/// Everything asked for; success where all of the report holds.
fn run(cli: &Cli) -> Result<ExitCode, String> {
    let card = Card::open(cli.device, Duration::from_secs(30));
    let about = card.and_then(|card| card.about(&cli.date)).map_err(|error| error.to_string())?;
    let mut benches = bench::all::<Card>(Scale::Full);
    if !about.device.contains(BARS_DEVICE) {
        benches.iter_mut().for_each(|bench| bench.bar = elsewhere(bench.bar));
    }
    let blank = Report { about, ..Report::default() };
    let paths = Paths::new(cli, &blank.about.device);
    let mut report = paths.kept(&blank, &benches).unwrap_or(blank);
    let order = Order { device: cli.device, seconds: cli.seconds, only: cli.only.clone() };
    let told = |report: &Report| paths.write(report);
    let mut troubles = Vec::new();
    for part in &cli.parts {
        let done = match part {
            Part::Checks => parts::checks(&order, &mut report),
            Part::Sanitizer => parts::sanitizer(&order, &mut report, &told),
            Part::Benches => parts::benches(&order, &benches, &mut report, &told),
            Part::Peer => peer::ask(&benches, &mut report, cli.seconds),
        };
        told(&report)?;
        troubles.extend(done.err());
    }
    print!("{}", report.markdown());
    troubles.iter().for_each(|trouble| eprintln!("gpu-check: {trouble}"));
    let right = report.holds() && troubles.is_empty();
    Ok(if right { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A bar on a device that it was not set for.
fn elsewhere(bar: Bar) -> Bar {
    match bar {
        Bar::Tflops(_) | Bar::Microseconds(_) => Bar::None,
        bar => bar,
    }
}

/// Where a report lies.
struct Paths {
    folder: PathBuf,
    name: String,
    whole: bool,
}

impl Paths {
    fn new(cli: &Cli, device: &str) -> Self {
        let plain = |text: &str| -> String {
            let words = text.split(|c: char| !c.is_ascii_alphanumeric());
            words.filter(|word| !word.is_empty()).collect::<Vec<_>>().join("-").to_lowercase()
        };
        let whole = cli.only.is_empty();
        let only = if whole { String::new() } else { format!("-only-{}", plain(&cli.only)) };
        let name = format!("{}-{}{only}", plain(device), cli.date);
        Self { folder: cli.out.clone(), name, whole }
    }

    fn path(&self, ending: &str) -> PathBuf {
        self.folder.join(format!("{}.{ending}", self.name))
    }

    /// What an earlier run has found out.
    fn kept(&self, blank: &Report, benches: &[Bench<Card>]) -> Option<Report> {
        let text = fs::read_to_string(self.path("json")).ok().filter(|_| self.whole)?;
        blank.kept(&serde_json::from_str(&text).ok()?, benches)
    }

    fn write(&self, report: &Report) -> Result<(), String> {
        let failed = |path: &PathBuf, error| format!("{}: {error}", path.display());
        fs::create_dir_all(&self.folder).map_err(|error| failed(&self.folder, error))?;
        let json =
            serde_json::to_string_pretty(&report.json()).map_err(|error| error.to_string())?;
        for (ending, contents) in [("json", json + "\n"), ("md", report.markdown())] {
            // Whole at any moment: whoever stops this keeps the last one.
            let (path, new) = (self.path(ending), self.path(&format!("{ending}.new")));
            fs::write(&new, contents).map_err(|error| failed(&new, error))?;
            fs::rename(&new, &path).map_err(|error| failed(&path, error))?;
        }
        Ok(())
    }
}
