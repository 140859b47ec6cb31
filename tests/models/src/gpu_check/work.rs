//! What runs in a process of its own: checks and benches, one line of JSON for each.
//!
//! A device that has failed once is of no more use to its process, so the process ends there; who
//! started it begins another behind the work that did it.

use crate::device::{Card, Stopwatch};
use checks::{
    Check,
    bench::{self, Bench, Outcome, Pace, Scale},
};
use serde_json::{Value, json};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, Instant},
};

const PACE: Pace = Pace { warm_up: Duration::from_millis(150), samples: 21 };

/// A line is written in one piece, so that what a sanitizer writes does not cut it.
const ERROR_MAX: usize = 700;

/// Which of all the work.
pub struct Wanted<'a> {
    pub within: Duration,
    pub skip: usize,
    /// Part of the names.
    pub only: &'a str,
}

/// How a process came to its end.
pub enum Done {
    /// All of it, or all that there was time for.
    All,
    /// The device does not work any more.
    Broken,
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
            let settled = card.settle().map_err(|error| error.to_string());
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

/// What was wrong with each check.
pub fn checks(card: &Card, checks: &[Check<Card>], wanted: &Wanted<'_>) -> Done {
    let make = |config| card.backend(config);
    let run = |check: &Check<Card>| (check.run)(&make).map(|()| json!({}));
    wanted.each(card, checks, |check| check.name.into(), run)
}

/// The device's ceilings, and what each bench came to.
pub fn benches(card: &Card, wanted: &Wanted<'_>) -> Result<Done, String> {
    let text = |error: kernels::KernelError| error.to_string();
    let watch = Stopwatch::new(card).map_err(text)?;
    let make = |config| card.backend(config);
    let measure = |bench: &Bench<Card>| -> Result<Outcome, String> {
        let clock = |device: &_, run: &mut _| watch.time(device, run);
        bench::measure(&make, bench, &clock, PACE).map_err(text)
    };
    if wanted.skip == 0 {
        println!("{}", json!({ "copy_rate": card.copy_rate().map_err(text)? }));
        println!(
            "{}",
            match caught(|| measure(&bench::ceiling(Scale::Full))) {
                Ok(outcome) => json!({ "product_rate": outcome.rate() }),
                Err(error) => json!({ "no_ceiling": error }),
            }
        );
    }
    let run = |bench: &Bench<Card>| {
        let outcome = measure(bench)?;
        let Outcome { seconds, baseline_seconds, .. } = outcome;
        Ok(json!({ "seconds": seconds, "baseline_seconds": baseline_seconds }))
    };
    Ok(wanted.each(card, &bench::all(Scale::Full), Bench::name, run))
}
