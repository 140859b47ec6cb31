#![forbid(unsafe_code)]
//! The binary `lockstep`: flags to configuration, configuration to running parts.
//!
//! No logic of its own beyond that and the tools (`run`, `perplexity`, `chat`, `pull`, `bench`).

mod args;
mod bench;
mod chat;
mod client;
mod deadlines;
mod direct;
mod load;
mod logits;
mod perplexity;
mod progress;
mod pull;
mod rank;
mod router;
mod run;
mod sampling;
mod source;
mod up;
mod worker;

use std::{
    fmt::Display,
    io::{ErrorKind, Write, stdout},
    process::ExitCode,
};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use cluster::telemetry;

use args::LogArgs;

/// Serves Qwen models from one machine or a cluster of them.
#[derive(Parser)]
#[command(version, about, arg_required_else_help = true)]
struct Cli {
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
    /// Load against a running router
    Bench(bench::BenchArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match dispatch(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The whole chain on one line: what failed: why: why that.
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(cli: Cli) -> Result<()> {
    // Servers tell what they do; tools print their results and only complain besides.
    let filter = match cli.command {
        Command::Up(_) | Command::Router(_) | Command::Worker(_) | Command::Rank(_) => "info",
        _ => "warn",
    };
    telemetry::init(cli.log.format(), filter)?;
    match cli.command {
        Command::Up(args) => up::main(args),
        Command::Router(args) => router::main(args),
        Command::Worker(args) => worker::main(args),
        Command::Rank(args) => rank::main(args),
        Command::Run(args) => run::main(args),
        Command::Perplexity(args) => perplexity::main(args),
        Command::Chat(args) => chat::main(args),
        Command::Pull(args) => pull::main(args),
        Command::Bench(args) => bench::main(args),
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

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn every_flag_has_its_environment_variable() {
        let command = Cli::command();
        command.clone().debug_assert();
        for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
            for flag in sub.get_arguments().filter(|flag| !flag.is_positional()) {
                let id = flag.get_id().as_str();
                if ["help", "version"].contains(&id) {
                    continue;
                }
                let twin = flag.get_env().and_then(|name| name.to_str());
                let wanted = format!("LOCKSTEP_{}", id.to_uppercase());
                assert_eq!(twin, Some(wanted.as_str()), "{} --{id}", sub.get_name());
            }
        }
    }
}
