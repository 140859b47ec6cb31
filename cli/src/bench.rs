//! `lockstep bench`: load against a running router, and what it measured.
//!
//! Closed loop (so many clients at once) or open loop (so many arrivals a second, whatever the
//! router does). Prompts are token ids, so that their length is exact; everything is bounded.

mod load;
mod report;
mod request;

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::{address, security::ToolTlsArgs};
use load::Load;
use request::{Prompts, Target};

/// Flags of `bench`.
#[derive(Args)]
pub struct BenchArgs {
    /// The router: http://HOST:PORT of its HTTP, or grpc://HOST:PORT of its gRPC interface
    #[arg(long, value_parser = address::http_or_grpc, default_value = "http://127.0.0.1:8000",
        env = "LOCKSTEP_URL")]
    url: String,
    /// The name of the model to ask for [default: the first that the router lists]
    #[arg(long, env = "LOCKSTEP_NAME")]
    model: Option<String>,
    /// Requests in all
    #[arg(long, default_value_t = 64, env = "LOCKSTEP_REQUESTS")]
    requests: usize,
    /// Requests in flight at once, at most
    #[arg(long, default_value_t = 8, env = "LOCKSTEP_CONCURRENCY")]
    concurrency: usize,
    /// Arrivals a second, at random moments [default: as fast as answers come]
    #[arg(long, env = "LOCKSTEP_RATE")]
    rate: Option<f64>,
    /// Tokens of a prompt, the shared ones included
    #[arg(long, default_value_t = 128, env = "LOCKSTEP_PROMPT_TOKENS")]
    prompt_tokens: usize,
    /// Tokens of an answer
    #[arg(long, default_value_t = 64, env = "LOCKSTEP_OUTPUT_TOKENS")]
    output_tokens: u32,
    /// Tokens at the beginning that prompts share
    #[arg(long, default_value_t = 0, env = "LOCKSTEP_SHARED_TOKENS")]
    shared_tokens: usize,
    /// How many different shared beginnings there are
    #[arg(long, default_value_t = 1, env = "LOCKSTEP_SHARED_GROUPS")]
    shared_groups: usize,
    /// Prompts are drawn from ids below this
    #[arg(long, default_value_t = 30_000, env = "LOCKSTEP_VOCAB")]
    vocab: u32,
    /// Same seed, same prompts and arrivals
    #[arg(long, default_value_t = 0, env = "LOCKSTEP_SEED")]
    seed: u64,
    /// Seconds that one request may take
    #[arg(long, default_value_t = 600, env = "LOCKSTEP_DEADLINE_SECONDS")]
    deadline_seconds: u64,
    /// Saves the figures as JSON
    #[arg(long, env = "LOCKSTEP_JSON_OUT")]
    json_out: Option<PathBuf>,
    #[command(flatten)]
    tls: ToolTlsArgs,
}

/// Answer tokens of a whole run, at most: each leaves one figure in memory.
const TOKENS_MAX: usize = 50_000_000;

impl BenchArgs {
    fn check(&self) -> Result<()> {
        let within = |flag: &str, value: usize, most: usize| match value {
            1.. if value <= most => Ok(()),
            _ => bail!("{flag} {value} is out of range; it must be from 1 to {most}"),
        };
        within("--requests", self.requests, 1_000_000)?;
        within("--concurrency", self.concurrency, 4096)?;
        within("--prompt-tokens", self.prompt_tokens, 1_000_000)?;
        within("--output-tokens", self.output_tokens as usize, 1_000_000)?;
        within("--shared-groups", self.shared_groups, 1_000_000)?;
        within("--vocab", self.vocab as usize, 1 << 24)?;
        within("--deadline-seconds", self.deadline_seconds as usize, 86_400)?;
        if self.shared_tokens > self.prompt_tokens {
            let (shared, all) = (self.shared_tokens, self.prompt_tokens);
            bail!("--shared-tokens {shared} is more than the --prompt-tokens {all}");
        }
        if self.requests * self.output_tokens as usize > TOKENS_MAX {
            bail!("more than {TOKENS_MAX} tokens of answers; lower --requests or --output-tokens");
        }
        if self.rate.is_some_and(|rate| !(rate > 0.0 && rate <= 100_000.0)) {
            bail!("--rate must be above 0 and at most 100000 a second");
        }
        Ok(())
    }
}

pub fn main(args: BenchArgs) -> Result<()> {
    args.check()?;
    crate::runtime()?.block_on(run(args))
}

async fn run(args: BenchArgs) -> Result<()> {
    let target = Target::open(&args.url, args.model.clone(), &args.tls).await?;
    let prompts = Prompts {
        tokens: args.prompt_tokens,
        shared: args.shared_tokens,
        groups: args.shared_groups as u64,
        vocab: args.vocab,
        seed: args.seed,
    };
    let load = Load {
        target: Arc::new(target),
        prompts,
        requests: args.requests,
        concurrency: args.concurrency,
        rate: args.rate,
        output_tokens: args.output_tokens,
        deadline: Duration::from_secs(args.deadline_seconds),
    };
    let measured = load.run().await?;
    let report = report::Report::new(&load, &measured);
    crate::print(&report)?;
    if let Some(path) = &args.json_out {
        let json = serde_json::to_string_pretty(&report)?;
        std::fs::write(path, json + "\n")
            .with_context(|| format!("cannot write --json-out {}", path.display()))?;
    }
    if report.succeeded == 0 {
        bail!("no request succeeded: {}", report.errors.join("; "));
    }
    Ok(())
}
