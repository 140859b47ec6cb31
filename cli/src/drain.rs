//! `lockstep drain`: a worker's end without a lost answer.

use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use cluster::Connector;
use proto::v1::{DrainRequest, WatchRequest, worker_client::WorkerClient};
use tonic::transport::Endpoint;

use crate::{address, security::ClusterTlsArgs};

const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
const PING: Duration = Duration::from_secs(10);

/// Flags of `drain`.
#[derive(Args)]
pub struct DrainArgs {
    /// The worker's address, as `lockstep status` shows it
    #[arg(value_parser = address::http)]
    worker: String,
    /// Seconds that what runs there may take [default: as the worker was told at its start]
    #[arg(long, env = "LOCKSTEP_DRAIN_SECONDS")]
    drain_seconds: Option<u32>,
    #[command(flatten)]
    tls: ClusterTlsArgs,
}

pub fn main(args: DrainArgs) -> Result<()> {
    crate::runtime()?.block_on(run(args))
}

async fn run(args: DrainArgs) -> Result<()> {
    let DrainArgs { worker, drain_seconds: seconds, tls } = args;
    let tls = tls.load()?.map(|tls| tls.client("h2"));
    let worker = address::secured(&worker, tls.is_some());
    let connector = Connector::new(tls, CONNECT_DEADLINE);
    let nobody = || format!("no worker answers at {worker}; `lockstep status` shows addresses");
    let endpoint = Endpoint::from_shared(worker.clone()).with_context(nobody)?;
    let endpoint = endpoint
        .connect_timeout(CONNECT_DEADLINE)
        .http2_keep_alive_interval(PING)
        .keep_alive_timeout(PING);
    let channel = endpoint.connect_with_connector(connector).await.with_context(nobody)?;
    let mut client = WorkerClient::new(channel);
    let mut reports = client.watch(WatchRequest {}).await.with_context(nobody)?.into_inner();
    let answer = client.drain(DrainRequest { seconds }).await.with_context(nobody)?.into_inner();
    crate::print(format_args!("{worker} takes nothing new; {} streams run", answer.streams))?;
    // The worker ends its connections last.
    while let Ok(Some(_)) = reports.message().await {}
    crate::print(format_args!("{worker} has ended"))
}
