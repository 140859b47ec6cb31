#![forbid(unsafe_code)]
//! The binary `lockstep`: flags to configuration, configuration to running parts.
//!
//! No logic of its own beyond that and the tools (`run`, `perplexity`, `chat`, `pull`, `bench`,
//! `plan`, `status`, `certs`).

mod address;
mod args;
mod bench;
mod certs;
mod chat;
mod client;
mod config;
mod deadlines;
mod direct;
mod drain;
mod generated;
mod load;
mod logits;
mod mock;
mod nodes;
mod perplexity;
mod plan;
mod progress;
mod pull;
mod rank;
mod router;
mod run;
mod sampling;
mod security;
mod serve;
mod source;
mod status;
#[cfg(test)]
mod tests;
mod up;
mod worker;

use std::{
    ffi::OsString,
    fmt::Display,
    io::{ErrorKind, Write, stdout},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use cluster::telemetry;

use args::LogArgs;

/// Serves Qwen models from one machine or a cluster of them.
#[derive(Parser)]
#[command(name = "lockstep", version = env!("LOCKSTEP_VERSION"), about)]
#[command(arg_required_else_help = true)]
struct Cli {
    /// A TOML file with values for flags, in a section for each command
    #[arg(long, global = true, value_name = "FILE", env = "LOCKSTEP_CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    log: LogArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Router and one worker group in one process
    Up(up::UpArgs),
    /// The stateless front: gRPC and OpenAI-compatible HTTP
    Router(router::RouterArgs),
    /// One worker group, each rank a process of its own
    Worker(worker::WorkerArgs),
    /// One rank of a worker group; started by `worker`
    #[command(hide = true)]
    Rank(rank::RankArgs),
    /// One generation without a server
    Run(run::RunArgs),
    /// Perplexity of a text, comparable with llama-perplexity
    Perplexity(perplexity::PerplexityArgs),
    /// A conversation with a running router
    Chat(chat::ChatArgs),
    /// Fetches a model
    Pull(pull::PullArgs),
    /// What a router knows of its workers, and why one gets no requests
    Status(status::StatusArgs),
    /// Ends a worker without losing an answer
    Drain(drain::DrainArgs),
    /// Load against a running router
    Bench(bench::BenchArgs),
    /// What a model takes of cards, and how fast it will be there; needs neither weights nor cards
    Plan(plan::PlanArgs),
    /// A private CA, and certificates of it for the processes of a cluster
    Certs(certs::CertsArgs),
    /// Prints the completions of a shell
    Completions(generated::CompletionsArgs),
    /// Writes the man pages to a folder
    Man(generated::ManArgs),
}

fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().collect();
    let outcome = match config::parse(&words) {
        Ok(cli) => dispatch(cli),
        Err(config::Fault::File(error)) => Err(error),
        Err(config::Fault::Usage(error)) => error.exit(),
    };
    // The whole chain on one line: what failed: why: why that.
    match outcome {
        Ok(()) => telemetry::flush(),
        Err(error) => {
            telemetry::fatal(format_args!("error: {error:#}"));
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn dispatch(cli: Cli) -> Result<()> {
    // Servers tell what they do; tools print their results and only complain besides.
    let filter = match cli.command {
        Command::Up(_) | Command::Router(_) | Command::Worker(_) | Command::Rank(_) => "info",
        _ => "warn",
    };
    telemetry::init(cli.log.format(), filter)?;
    if let Some(file) = &cli.config {
        tracing::info!(file = %file.display(), "configuration");
    }
    match cli.command {
        Command::Up(args) => up::main(args),
        Command::Router(args) => router::main(args),
        Command::Worker(args) => worker::main(args),
        Command::Rank(args) => rank::main(args),
        Command::Run(args) => run::main(args),
        Command::Perplexity(args) => perplexity::main(args),
        Command::Chat(args) => chat::main(args),
        Command::Pull(args) => pull::main(args),
        Command::Drain(args) => drain::main(args),
        Command::Status(args) => status::main(args),
        Command::Bench(args) => bench::main(args),
        Command::Plan(args) => plan::main(args),
        Command::Certs(args) => certs::main(args),
        Command::Completions(args) => generated::completions(args),
        Command::Man(args) => generated::man(args),
    }
}

/// Prints a result as a line. A reader that has left, as `head` does, is no fault.
fn print(line: impl Display) -> Result<()> {
    match writeln!(stdout(), "{line}") {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result.context("standard output"),
    }
}

/// The async runtime of the commands that talk over a network.
fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?)
}
