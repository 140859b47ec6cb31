//! `lockstep status`: what a router knows of its workers, and why one gets nothing.

use std::{fmt::Write, time::Duration};

use anyhow::{Context, Result, bail};
use clap::Args;
use http_body_util::BodyExt;
use router::{Status, WorkerStatus};
use tokio::time::timeout;

use crate::{address, client, security::ToolTlsArgs};

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
    #[command(flatten)]
    tls: ToolTlsArgs,
}

pub fn main(args: StatusArgs) -> Result<()> {
    let late = || format!("no answer of {} within {} s", args.router_http, DEADLINE.as_secs());
    let asked = async { timeout(DEADLINE, run(&args)).await };
    crate::runtime()?.block_on(asked).with_context(late)?
}

async fn run(args: &StatusArgs) -> Result<()> {
    let url = format!("{}/status", args.router_http);
    let nobody = || {
        format!("no router's HTTP interface at {}; name it with --router-http", args.router_http)
    };
    let client = client::http(&args.router_http, &args.tls)?;
    let answer = client.get(url.parse()?).await.with_context(nobody)?;
    let code = answer.status();
    let bytes = answer.into_body().collect().await.with_context(nobody)?.to_bytes();
    if !code.is_success() {
        bail!("{url} answers {code}: {}", String::from_utf8_lossy(&bytes).trim_end());
    }
    let text = String::from_utf8(bytes.into()).with_context(nobody)?;
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
