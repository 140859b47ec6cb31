//! `lockstep router`: the front of a cluster.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result};
use clap::Args;
use cluster::shutdown;
use router::{Router, RouterConfig};

use crate::args::{EtcdArgs, ListenArgs};
use crate::deadlines::DeadlineArgs;
use crate::load;

/// Flags of `router`.
#[derive(Args)]
pub struct RouterArgs {
    #[command(flatten)]
    listen: ListenArgs,
    #[command(flatten)]
    etcd: EtcdArgs,
    #[command(flatten)]
    deadlines: DeadlineArgs,
    /// Bytes of one request's body, at most
    #[arg(long, default_value_t = 4 << 20, env = "LOCKSTEP_BODY_BYTES")]
    body_bytes: usize,
    /// Seconds that running answers may take to finish after a signal
    #[arg(long, default_value_t = 30, env = "LOCKSTEP_DRAIN_SECONDS")]
    drain_seconds: u64,
}

pub fn main(args: RouterArgs) -> Result<()> {
    crate::runtime()?.block_on(run(args))
}

async fn run(args: RouterArgs) -> Result<()> {
    load::tell_machine();
    let mut stop = shutdown::signals().context("cannot listen for signals")?;
    let membership = Arc::new(args.etcd.connect().await?);
    let mut config = RouterConfig::new(Some(args.listen.http), Some(args.listen.grpc));
    args.deadlines.apply(&mut config);
    config.limits.body_bytes_max = args.body_bytes;
    config.deadlines.drain = Duration::from_secs(args.drain_seconds);
    let router = Router::start(config, membership, stop.clone()).await?;
    if let (Some(http), Some(grpc)) = (router.http(), router.grpc()) {
        crate::print(format_args!("ready http=http://{http} grpc=http://{grpc}"))?;
    }
    shutdown::requested(&mut stop).await;
    router.join().await;
    tracing::info!("stopped");
    Ok(())
}
