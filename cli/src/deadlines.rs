//! Flags for how long routers and workers wait.

use std::time::Duration;

use clap::{Args, builder::RangedU64ValueParser};
use proto::WORKER_BEAT_MS;
use router::RouterConfig;

use crate::args;

/// A year: few enough to be added to any moment.
const SECONDS_MAX: u64 = 365 * 24 * 3600;

/// How long a router waits for what, and how much it lets wait. None of these ends work that
/// progresses.
#[derive(Args, Debug)]
pub struct DeadlineArgs {
    /// Seconds until a worker has accepted or refused a call
    #[arg(long, default_value_t = 10, value_parser = seconds(), env = "LOCKSTEP_CONNECT_SECONDS")]
    connect_seconds: u64,
    /// Seconds without a message after which a worker counts as broken; a sound one sends one every
    /// second
    #[arg(long, default_value_t = 10, value_parser = seconds(), env = "LOCKSTEP_SILENCE_SECONDS")]
    silence_seconds: u64,
    /// Seconds without a sign of life of a worker's process after which it gets nothing new, and
    /// what it has goes to another; a sound one gives one every 1.2 s, whatever it computes
    #[arg(
        long,
        default_value = "2.5",
        value_parser = heartbeat,
        env = "LOCKSTEP_HEARTBEAT_SECONDS"
    )]
    heartbeat_seconds: Duration,
    /// Seconds that a request waits for a worker to take it, while those that are ready fail
    #[arg(long, default_value_t = 30, value_parser = seconds(), env = "LOCKSTEP_OPEN_SECONDS")]
    open_seconds: u64,
    /// Seconds that a request waits for a ready worker, while none is there or on its way
    #[arg(long, default_value_t = 60, value_parser = seconds(), env = "LOCKSTEP_READY_SECONDS")]
    ready_seconds: u64,
    /// Seconds that a request waits for a ready worker while one loads, and that an answer which
    /// has begun waits for one to go on
    #[arg(long, default_value_t = 600, value_parser = seconds(), env = "LOCKSTEP_LOADING_SECONDS")]
    loading_seconds: u64,
    /// Requests that wait at the router while every worker's queue is full, at most
    #[arg(long, default_value_t = 1024, env = "LOCKSTEP_LINE")]
    line: usize,
    /// Seconds of that wait; who would have to wait longer is refused at once
    #[arg(long, default_value_t = 30, value_parser = seconds(), env = "LOCKSTEP_LINE_SECONDS")]
    line_seconds: u64,
    /// Seconds for a request's first token, whatever its client says
    #[arg(
        long,
        default_value_t = 1800,
        value_parser = seconds(),
        env = "LOCKSTEP_FIRST_TOKEN_SECONDS"
    )]
    first_token_seconds: u64,
    /// Seconds for a whole request, whatever its client says
    #[arg(long, default_value_t = 7200, value_parser = seconds(), env = "LOCKSTEP_TOTAL_SECONDS")]
    total_seconds: u64,
    /// Seconds for a model's tokenizer files to come from a worker
    #[arg(long, default_value_t = 60, value_parser = seconds(), env = "LOCKSTEP_DESCRIBE_SECONDS")]
    describe_seconds: u64,
    /// Seconds for a request's body to arrive
    #[arg(long, default_value_t = 60, value_parser = seconds(), env = "LOCKSTEP_BODY_SECONDS")]
    body_seconds: u64,
}

/// At least one second, at most a year.
pub fn seconds() -> RangedU64ValueParser {
    RangedU64ValueParser::new().range(1..=SECONDS_MAX)
}

/// Seconds in which a sound worker is heard of.
fn heartbeat(text: &str) -> Result<Duration, String> {
    let beat = Duration::from_millis(WORKER_BEAT_MS);
    match args::seconds(text)? {
        short if short <= beat => {
            let beat = beat.as_secs_f64();
            Err(format!("{text:?} is too short: a sound worker is heard of every {beat} s"))
        }
        seconds => Ok(seconds),
    }
}

impl DeadlineArgs {
    /// Writes them into a router's settings.
    pub fn apply(&self, config: &mut RouterConfig) {
        let deadlines = &mut config.deadlines;
        for (deadline, seconds) in [
            (&mut deadlines.connect, self.connect_seconds),
            (&mut deadlines.silence, self.silence_seconds),
            (&mut deadlines.open, self.open_seconds),
            (&mut deadlines.ready, self.ready_seconds),
            (&mut deadlines.loading, self.loading_seconds),
            (&mut deadlines.queue, self.line_seconds),
            (&mut deadlines.first_token, self.first_token_seconds),
            (&mut deadlines.total, self.total_seconds),
            (&mut deadlines.describe, self.describe_seconds),
            (&mut deadlines.body, self.body_seconds),
        ] {
            *deadline = Duration::from_secs(seconds);
        }
        deadlines.heartbeat = self.heartbeat_seconds;
        config.limits.queue_max = self.line;
    }
}
