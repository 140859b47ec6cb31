//! How far something is: a bar on a terminal, plain lines elsewhere.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use cluster::telemetry::{self, LogFormat};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// What is counted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    Bytes,
    Items,
}

/// Progress of one thing of known size, on standard error.
pub struct ProgressReport {
    bar: Option<ProgressBar>,
    what: String,
    unit: Unit,
    total: u64,
    done: u64,
    told: u64,
    start: Instant,
}

impl ProgressReport {
    pub fn new(what: impl Into<String>, unit: Unit, total: u64) -> Self {
        let what = what.into();
        // A bar is nothing that a machine could read.
        let people = std::io::stderr().is_terminal() && telemetry::format() == LogFormat::Human;
        let bar = people.then(|| bar(&what, unit, total));
        Self { bar, what, unit, total, done: 0, told: 0, start: Instant::now() }
    }

    /// `done` of the total, counted from the beginning.
    pub fn set(&mut self, done: u64) {
        self.set_ahead(done, done);
    }

    /// As [`Self::set`], where `read` of the total wait to be done, or are.
    pub fn set_ahead(&mut self, done: u64, read: u64) {
        self.done = done.min(self.total);
        if let Some(bar) = &self.bar {
            bar.set_position(self.done);
            return;
        }
        let tenths = self.done * 10 / self.total.max(1);
        if tenths > self.told {
            self.told = tenths;
            let (done, total) = (self.done, self.total);
            let (what, percent) = (&self.what, done * 100 / total.max(1));
            telemetry::say(match self.unit {
                Unit::Bytes => {
                    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
                    let rate = mib(done) / self.start.elapsed().as_secs_f64();
                    let ahead = match read.saturating_sub(done) {
                        0 => String::new(),
                        ahead => format!(", {:.0} MiB read ahead", mib(ahead)),
                    };
                    let (done, total) = (mib(done), mib(total));
                    format!(
                        "{what}: {done:.0} of {total:.0} MiB, {rate:.0} MiB/s{ahead} ({percent} %)"
                    )
                }
                Unit::Items => format!("{what}: {done} of {total} ({percent} %)"),
            });
        }
    }

    /// `more` in addition to what was done.
    pub fn add(&mut self, more: u64) {
        self.set(self.done + more);
    }
}

impl Drop for ProgressReport {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn bar(what: &str, unit: Unit, total: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    let template = match unit {
        Unit::Bytes => "{msg} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} ({eta})",
        Unit::Items => "{msg} [{wide_bar}] {pos}/{len} {per_sec} ({eta})",
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_message(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
