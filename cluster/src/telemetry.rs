//! Log lines: for people on a terminal, or JSON for machines.
//!
//! Logs go to standard error; standard output has what a tool prints, and a server's ready line.
//! Nothing that writes a line here waits for its reader (see `lines`): a terminal that is held, a
//! pipe that nobody empties and a reader that is gone cost lines, never service.

mod format;
mod lines;

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    fmt::Display,
    io::{self, IsTerminal, Write},
    panic::PanicHookInfo,
    sync::{Arc, OnceLock},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Map, Value, json};
use tracing::Level;
use tracing_subscriber::{EnvFilter, fmt, fmt::format::JsonFields};

use lines::{Lines, duplicate};

/// The environment variable that holds the filter, e.g. `info,router=debug`.
pub const FILTER_VARIABLE: &str = "LOCKSTEP_LOG";
/// The environment variable that holds the format.
pub const FORMAT_VARIABLE: &str = "LOCKSTEP_LOG_FORMAT";
/// How long the end of the process waits for lines that are not written yet.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// How a log line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    #[default]
    Human,
    Json,
}

impl LogFormat {
    /// The value of the flag and of `LOCKSTEP_LOG_FORMAT`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Human => "human",
            Self::Json => "json",
        }
    }
}

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error(
        "{FILTER_VARIABLE}={filter:?} is no log filter: {reason}; try info or info,router=debug"
    )]
    Filter { filter: String, reason: String },
    #[error("logging is already set up: {0}")]
    Twice(String),
    #[error("no thread to write logs: {0}")]
    Thread(#[from] io::Error),
}

/// Where lines of this process go. A property of the process, like the log filter.
struct Outputs {
    format: LogFormat,
    stdout: Arc<Lines>,
    stderr: Arc<Lines>,
}

static OUTPUTS: OnceLock<Outputs> = OnceLock::new();

/// Sets up logging for the process, panics included. `default` is the filter where `LOCKSTEP_LOG`
/// is not set.
///
/// # Errors
/// The filter cannot be read, there is no thread, or logging was set up before.
pub fn init(format: LogFormat, default: &str) -> Result<(), TelemetryError> {
    let text = std::env::var(FILTER_VARIABLE).unwrap_or_else(|_| default.to_owned());
    let filter = parse(&text)?;
    let notice = move |lines: u64| {
        let message = "log lines were dropped: their reader was too slow";
        let fields = Map::from_iter([("lines".to_owned(), json!(lines))]);
        format::line(format, Level::WARN, message, fields).into_bytes()
    };
    let outputs = Outputs {
        format,
        stdout: Lines::start("stdout", duplicate(io::stdout()), Box::new(notice))?,
        stderr: Lines::start("stderr", duplicate(io::stderr()), Box::new(notice))?,
    };
    let stderr = Arc::clone(&outputs.stderr);
    if OUTPUTS.set(outputs).is_err() {
        return Err(TelemetryError::Twice("its writers run".into()));
    }
    std::panic::set_hook(Box::new(tell_panic));
    let lines = fmt().with_env_filter(filter).with_writer(move || Put(Arc::clone(&stderr)));
    let done = match format {
        LogFormat::Human => lines.with_ansi(io::stderr().is_terminal()).try_init(),
        LogFormat::Json => {
            lines.fmt_fields(JsonFields::new()).event_format(format::Json).try_init()
        }
    };
    done.map_err(|error| TelemetryError::Twice(error.to_string()))
}

/// What the process was told about its lines; for people before `init`.
pub fn format() -> LogFormat {
    OUTPUTS.get().map_or(LogFormat::default(), |outputs| outputs.format)
}

/// Log lines that were lost because nobody read them.
pub fn lines_dropped() -> u64 {
    OUTPUTS.get().map_or(0, |outputs| outputs.stdout.dropped() + outputs.stderr.dropped())
}

/// Says on standard output that a server takes requests, and where: `ready name=value …`.
pub fn ready(facts: &[(&str, String)]) {
    let line = match format() {
        LogFormat::Human => {
            let facts = facts.iter().map(|(name, value)| format!(" {name}={value}"));
            format!("ready{}\n", facts.collect::<String>())
        }
        LogFormat::Json => {
            let fields = facts.iter().map(|(name, value)| ((*name).to_owned(), json!(value)));
            format::line(LogFormat::Json, Level::INFO, "ready", fields.collect())
        }
    };
    match OUTPUTS.get() {
        Some(outputs) => outputs.stdout.put_always(line.as_bytes()),
        None => print!("{line}"),
    }
}

/// A plain line for people on standard error; as JSON a line like every other.
pub fn say(text: impl Display) {
    let line = plain(Level::INFO, &text.to_string());
    with_stderr(|stderr| stderr.put(line.as_bytes()), &line);
}

/// A line on standard error that is written however many others wait, where anybody reads at all.
/// Waits for that, but not long: the process is about to end.
pub fn fatal(text: impl Display) {
    let line = plain(Level::ERROR, &text.to_string());
    with_stderr(|stderr| stderr.put_always(line.as_bytes()), &line);
    flush();
}

/// Passes on what a rank's process wrote on its standard error, marked with the rank. Returns what
/// it says to people.
pub fn forward(rank: usize, text: &str) -> String {
    let said = format::message(text);
    let line = match (format(), &said) {
        (LogFormat::Human, _) => format!("[rank {rank}] {text}\n"),
        // An object already: the rank becomes its first field.
        (LogFormat::Json, Some(_)) => format!("{{\"rank\":{rank},{}\n", &text.trim_start()[1..]),
        (LogFormat::Json, None) => {
            let fields = Map::<String, Value>::from_iter([("rank".to_owned(), json!(rank))]);
            format::line(LogFormat::Json, Level::INFO, text, fields)
        }
    };
    with_stderr(|stderr| stderr.put(line.as_bytes()), &line);
    said.unwrap_or_else(|| text.to_owned())
}

/// Waits until all lines are written, a second at most. For the end of the process.
pub fn flush() {
    let deadline = Instant::now() + FLUSH_LIMIT;
    if let Some(outputs) = OUTPUTS.get() {
        outputs.stdout.flush(deadline);
        outputs.stderr.flush(deadline);
    }
}

/// Ends the process, its last lines written where anybody reads them.
pub fn exit(code: i32) -> ! {
    flush();
    std::process::exit(code)
}

fn plain(level: Level, text: &str) -> String {
    match format() {
        LogFormat::Human => format!("{text}\n"),
        LogFormat::Json => format::line(LogFormat::Json, level, text, Map::new()),
    }
}

fn with_stderr(put: impl FnOnce(&Lines), line: &str) {
    match OUTPUTS.get() {
        Some(outputs) => put(&outputs.stderr),
        None => eprint!("{line}"),
    }
}

/// As the standard hook, but without waiting for a reader.
fn tell_panic(info: &PanicHookInfo<'_>) {
    let thread = thread::current();
    let name = thread.name().unwrap_or("unnamed");
    let mut text = format!("thread '{name}' {info}");
    let trace = Backtrace::capture();
    if trace.status() == BacktraceStatus::Captured {
        text.push_str(&format!("\n{trace}"));
    }
    let line = plain(Level::ERROR, &text);
    with_stderr(|stderr| stderr.put_always(line.as_bytes()), &line);
    // The main thread's panic ends the process.
    if name == "main" {
        flush();
    }
}

/// One event's line: the formatter hands it over in one piece.
struct Put(Arc<Lines>);

impl Write for Put {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.put(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn parse(filter: &str) -> Result<EnvFilter, TelemetryError> {
    EnvFilter::try_new(filter).map_err(|error| TelemetryError::Filter {
        filter: filter.to_owned(),
        reason: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_filter_is_named_with_the_remedy() {
        assert!(parse("info,router=debug").is_ok());
        let error = parse("router=loud").unwrap_err().to_string();
        assert!(error.contains("LOCKSTEP_LOG=\"router=loud\"") && error.contains("try info"));
    }
}
