//! Log lines: for people on a terminal, or JSON for machines.
//!
//! Everything goes to standard error, so that standard output stays what a tool prints.

use std::io::IsTerminal;

use tracing_subscriber::{EnvFilter, fmt};

/// The environment variable that holds the filter, e.g. `info,router=debug`.
pub const FILTER_VARIABLE: &str = "LOCKSTEP_LOG";

/// How a log line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    #[default]
    Human,
    Json,
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
}

/// Sets up logging for the process. `default` is the filter where `LOCKSTEP_LOG` is not set.
///
/// # Errors
/// The filter cannot be read, or logging was set up before.
pub fn init(format: LogFormat, default: &str) -> Result<(), TelemetryError> {
    let text = std::env::var(FILTER_VARIABLE).unwrap_or_else(|_| default.to_owned());
    let filter = parse(&text)?;
    let lines = fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let done = match format {
        LogFormat::Human => lines.with_ansi(std::io::stderr().is_terminal()).try_init(),
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
    };
    done.map_err(|error| TelemetryError::Twice(error.to_string()))
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
