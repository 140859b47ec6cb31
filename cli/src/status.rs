//! `lockstep status`: what a router knows of its workers, and why one gets nothing.

use std::{fmt::Write, time::Duration};

use anyhow::{Context, Result};
use clap::Args;
use router::{Status, WorkerStatus};
use ureq::Agent;

use crate::address;

const DEADLINE: Duration = Duration::from_secs(10);
/// Digits of a fingerprint that people compare.
const FINGERPRINT_DIGITS: usize = 8;

/// Flags of `status`.
#[derive(Args)]
pub struct StatusArgs {
    /// The router's HTTP address
    #[arg(long, value_parser = address::http, default_value = "http://127.0.0.1:8000",
        env = "LOCKSTEP_ROUTER_HTTP")]
    router_http: String,
    /// Prints one JSON object
    #[arg(long, env = "LOCKSTEP_JSON")]
    json: bool,
}

pub fn main(args: StatusArgs) -> Result<()> {
    let agent: Agent = Agent::config_builder().timeout_global(Some(DEADLINE)).build().into();
    let url = format!("{}/status", args.router_http);
    let nobody = || {
        format!("no router's HTTP interface at {}; name it with --router-http", args.router_http)
    };
    let mut answer = agent.get(&url).call().with_context(nobody)?;
    let text = answer.body_mut().read_to_string().with_context(nobody)?;
    if args.json {
        return crate::print(text);
    }
    let status = serde_json::from_str(&text)
        .with_context(|| format!("{url} is no router of this version"))?;
    crate::print(shown(&args.router_http, &status).trim_end())
}

/// A line for the router, one for each model, one for each worker.
fn shown(address: &str, status: &Status) -> String {
    let Status { version, draining, in_flight, queued, models } = status;
    let drains = if *draining { ", draining" } else { "" };
    let mut text =
        format!("router {version} at {address}: {in_flight} in flight, {queued} in line{drains}\n");
    if models.is_empty() {
        text += "no worker in the roster\n";
    }
    for model in models {
        let usable = model.workers.iter().filter(|worker| worker.usable).count();
        let print = &model.fingerprint[..FINGERPRINT_DIGITS.min(model.fingerprint.len())];
        let note = if model.serving { "" } else { "; new requests go to another version" };
        let (name, all) = (&model.name, model.workers.len());
        // Writing to a string does not fail.
        let _ = writeln!(text, "{name} ({print}): {usable} of {all} workers usable{note}");
        for worker in &model.workers {
            let state = format!("{:?}", worker.state).to_lowercase();
            let load = format!(
                "{} running, {} waiting of {} places, {} tokens to prefill, {} of {} blocks free",
                worker.running,
                worker.waiting,
                worker.places,
                worker.prefill_tokens,
                worker.blocks_free,
                worker.blocks_total
            );
            let news = worker.reason.as_ref().map_or(load, |reason| format!("not used: {reason}"));
            let WorkerStatus { address, id, ranks, epoch, .. } = worker;
            let epoch = if *epoch > 0 { format!(" in epoch {epoch}") } else { String::new() };
            let _ = writeln!(text, "  {address} {id} {ranks} ranks{epoch}, {state}: {news}");
        }
    }
    text
}
