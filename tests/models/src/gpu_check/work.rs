//! What runs in a process of its own: a line's pieces, one line of JSON for each.
//!
//! A device that has failed once is of no more use to its process, so the process ends there; who
//! started it begins another behind the work that did it.

use crate::{
    device::{Card, Stopwatch, ceilings},
    lines::Line,
};
use checks::{
    Check,
    bench::{self, Bench, Layer, Outcome, Pace, Scale, Sized, Step},
};
use cuda::Cuda;
use kernels::KernelError;
use serde_json::{Value, json};
use std::{
    cell::RefCell,
    collections::BTreeSet,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    process::Command,
    time::{Duration, Instant},
};

/// A line is written in one piece, so that what a sanitizer writes does not cut it.
const ERROR_MAX: usize = 700;

/// Which of all the work.
pub struct Wanted<'a> {
    pub device: usize,
    pub patience: Duration,
    pub within: Duration,
    pub skip: usize,
    /// Part of the names.
    pub only: &'a str,
    pub scale: Scale,
}

/// How a process came to its end.
pub enum Done {
    /// All of it, or all that there was time for.
    All,
    /// The device does not work any more.
    Broken,
}

fn text(error: KernelError) -> String {
    error.to_string()
}

/// # Errors
/// Where there is no device to begin with.
pub fn run(line: Line, wanted: &Wanted<'_>) -> Result<Done, String> {
    if line == Line::Machine {
        return Ok(machine(wanted));
    }
    let card = Card::open(wanted.device, wanted.patience).map_err(text)?;
    let all = match wanted.scale {
        Scale::Full => checks::all(),
        Scale::Tiny => checks::elementwise::checks(),
    };
    let mut risks = match wanted.scale {
        Scale::Full => checks::risks(),
        Scale::Tiny => Vec::new(),
    };
    let done = match line {
        Line::Risks => {
            if wanted.scale == Scale::Tiny {
                risks = checks::every_rows::checks();
            }
            checked(&card, &risks, wanted)
        }
        Line::Checks => {
            let first: BTreeSet<&str> = risks.iter().map(|check| check.name).collect();
            let mut others: Vec<_> =
                all.into_iter().filter(|check| !first.contains(check.name)).collect();
            if wanted.scale == Scale::Full {
                others.extend(checks::sampling::long_checks());
                others.extend(models::checks());
            }
            checked(&card, &others, wanted)
        }
        Line::Ceilings => {
            let one = |(_, measure): &ceilings::Ceiling| measure(&card, wanted.scale);
            wanted.each(&card, &ceilings::ALL, |(name, _)| (*name).into(), one)
        }
        Line::Steps => steps(&card, wanted),
        Line::Benches => benches(&card, wanted).map_err(text)?,
        _ => checked(&card, &all, wanted),
    };
    let (_, led_around) = card.products();
    for detour in led_around {
        println!("{}", json!({ "facts": { (detour): "cuBLASLt refused it" } }));
    }
    Ok(done)
}

impl Wanted<'_> {
    /// Runs what is asked for and tells of it.
    fn each<T>(
        &self,
        card: &Card,
        work: &[T],
        name: impl Fn(&T) -> String,
        run: impl Fn(&T) -> Result<Value, String>,
    ) -> Done {
        self.pieces(work, name, run, &|| card.settle().map_err(text))
    }

    fn pieces<T>(
        &self,
        work: &[T],
        name: impl Fn(&T) -> String,
        run: impl Fn(&T) -> Result<Value, String>,
        settle: &dyn Fn() -> Result<(), String>,
    ) -> Done {
        let start = Instant::now();
        let asked = work.iter().map(|item| (name(item), item));
        let asked = asked.filter(|(name, _)| name.contains(self.only)).skip(self.skip);
        for (name, item) in asked {
            if start.elapsed() > self.within {
                println!("{}", json!({ "name": name, "skipped": true }));
                continue;
            }
            println!("{}", json!({ "begins": name }));
            let begun = Instant::now();
            let result = caught(|| run(item));
            let settled = settle();
            let broken = settled.is_err();
            let mut line = match result.and_then(|value| settled.map(|()| value)) {
                Ok(value) => value,
                Err(error) => json!({ "error": error.chars().take(ERROR_MAX).collect::<String>() }),
            };
            line["name"] = name.into();
            line["took"] = begun.elapsed().as_secs_f64().into();
            println!("{line}");
            if broken {
                return Done::Broken;
            }
        }
        println!("{}", json!({ "ends": true }));
        Done::All
    }
}

fn caught<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        Err(text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("panicked").into())
    })
}

/// What the machine is; the device is opened last.
fn machine(wanted: &Wanted<'_>) -> Done {
    type Look = fn(&Wanted<'_>) -> Result<Value, String>;
    let looks: [(&str, Look); 2] = [("nvidia-smi", |_| Ok(smi())), ("kernels loaded", opened)];
    let settle = || Ok(());
    // Who the device is is always told.
    let wanted = Wanted { only: "", ..*wanted };
    wanted.pieces(&looks, |(name, _)| (*name).into(), |(_, look)| look(&wanted), &settle)
}

fn smi() -> Value {
    const ASKED: &str = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,\
                         clocks.sm,power.limit,temperature.gpu,ecc.mode.current,mig.mode.current";
    let asked = format!("--query-gpu={ASKED}");
    // On a machine in trouble it may hang.
    let said =
        Command::new("timeout").args(["5", "nvidia-smi", &asked, "--format=csv,noheader"]).output();
    let said = match said {
        Ok(done) if done.status.success() => {
            String::from_utf8_lossy(&done.stdout).trim().replace('\n', "; ")
        }
        Ok(done) => format!("it does not answer ({})", done.status),
        Err(error) => error.to_string(),
    };
    json!({ "facts": { "nvidia-smi": said } })
}

/// Every kernel loaded, cuBLASLt opened, and where the libraries were found.
fn opened(wanted: &Wanted<'_>) -> Result<Value, String> {
    let begun = Instant::now();
    let card = Card::open(wanted.device, wanted.patience).map_err(text)?;
    let took = begun.elapsed().as_secs_f64();
    let (cublas, _) = card.products();
    let maps = fs::read_to_string("/proc/self/maps").map_err(|error| error.to_string())?;
    let path = |line: &str| line.split_whitespace().last().map(str::to_owned);
    let libraries: BTreeSet<String> = maps
        .lines()
        .filter(|line| line.contains("libcuda.so") || line.contains("libcublas"))
        .filter_map(path)
        .collect();
    let libraries = libraries.into_iter().collect::<Vec<_>>().join(", ");
    let loaded = format!("{} kernels, opened in {took:.2} s", card.kernels());
    Ok(json!({
        "about": card.about().map_err(text)?,
        "facts": { "libraries": libraries, "cuBLASLt": cublas, "loaded": loaded },
    }))
}

/// What was wrong with each check.
fn checked(card: &Card, checks: &[Check<Card>], wanted: &Wanted<'_>) -> Done {
    let make = |config| card.backend(config);
    let run = |check: &Check<Card>| (check.run)(&make).map(|()| json!({}));
    wanted.each(card, checks, |check| check.name.into(), run)
}

/// What each bench came to.
fn benches(card: &Card, wanted: &Wanted<'_>) -> Result<Done, KernelError> {
    let watch = Stopwatch::new(card, wanted.scale)?;
    let make = |config| card.backend(config);
    let run = |bench: &Bench<Card>| {
        let clock = |device: &_, run: &mut _| watch.time(device, run);
        let outcome = bench::measure(&make, bench, &clock, pace(wanted.scale)).map_err(text)?;
        let Outcome { seconds, baseline_seconds, .. } = outcome;
        Ok(json!({ "seconds": seconds, "baseline_seconds": baseline_seconds }))
    };
    Ok(wanted.each(card, &bench::all(wanted.scale), Bench::name, run))
}

pub fn pace(scale: Scale) -> Pace {
    match scale {
        Scale::Full => Pace { warm_up: Duration::from_millis(150), samples: 21 },
        Scale::Tiny => Pace { warm_up: Duration::ZERO, samples: 1 },
    }
}

/// A layer's weights are kept for all its steps.
fn steps(card: &Card, wanted: &Wanted<'_>) -> Done {
    type Held = (Sized, Cuda<Card>, Layer<Card>);
    let held: RefCell<Option<Held>> = RefCell::new(None);
    let measure = |step: &Step| -> Result<Value, KernelError> {
        let mut held = held.borrow_mut();
        if held.as_ref().is_none_or(|(of, ..)| *of != step.of) {
            // Before the next one, for which there may be no room beside it.
            *held = None;
            let device = card.backend(step.of.config());
            let layer = Layer::new(&device, &step.of)?;
            *held = Some((step.of, device, layer));
        }
        let Some((_, device, layer)) = &mut *held else { return Ok(json!({})) };
        let outcome = step.measure(device, layer, &|device, work| device.driver().time(work))?;
        Ok(json!({
            "layers": outcome.layers,
            "seconds": outcome.seconds,
            "apart_seconds": outcome.apart_seconds,
            "eager_seconds": outcome.eager_seconds,
            "kernels": outcome.kernels,
        }))
    };
    let run = |step: &Step| match measure(step) {
        Err(KernelError::Memory { .. }) => Ok(json!({})),
        outcome => outcome.map_err(text),
    };
    wanted.each(card, &bench::steps(wanted.scale), Step::name, run)
}
