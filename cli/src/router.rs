//! `lockstep router`: the front of a cluster.

use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use cluster::{shutdown, telemetry};
use router::Router;

use crate::load;
use crate::serve::{FrontArgs, WorkersArgs};

/// Flags of `router`.
#[derive(Args)]
pub struct RouterArgs {
    #[command(flatten)]
    front: FrontArgs,
    #[command(flatten)]
    workers: WorkersArgs,
    /// Seconds after a signal in which requests are still taken, while health says that the router
    /// ends: longer than load balancers take to notice
    #[arg(long, default_value_t = 5, env = "LOCKSTEP_GRACE_SECONDS")]
    grace_seconds: u64,
    /// Seconds that running answers may take to finish after that
    #[arg(long, default_value_t = 30, env = "LOCKSTEP_DRAIN_SECONDS")]
    drain_seconds: u64,
}

pub fn main(args: RouterArgs) -> Result<()> {
    crate::runtime()?.block_on(run(args))
}

async fn run(args: RouterArgs) -> Result<()> {
    load::log_machine();
    let mut stop = shutdown::signals().context("cannot listen for signals")?;
    let mut config = args.front.resolve(args.drain_seconds, &args.workers.etcd)?;
    let secure = config.tls.is_some();
    config.deadlines.grace = Duration::from_secs(args.grace_seconds);
    let membership = tokio::select! {
        membership = args.workers.connect() => membership?,
        () = shutdown::requested(&mut stop) => return Ok(()),
    };
    let router = Router::start(config, membership, stop.clone()).await?;
    if let (Some(http), Some(grpc)) = (router.http(), router.grpc()) {
        let scheme = if secure { "https" } else { "http" };
        let url = |address| format!("{scheme}://{address}");
        telemetry::ready(&[("http", url(http)), ("grpc", url(grpc))]);
    }
    shutdown::requested(&mut stop).await;
    router.join().await;
    tracing::info!("stopped");
    Ok(())
}
