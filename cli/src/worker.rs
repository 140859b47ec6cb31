//! `lockstep worker`: one group of ranks, each a process of its own.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail};
use clap::Args;
use cluster::shutdown;
use tokio::sync::watch;
use worker::{RankMode, Worker, WorkerConfig, WorkerHandle};

use crate::args::{EtcdArgs, GroupArgs};
use crate::deadlines::StepLimitArgs;
use crate::load;

/// Flags of `worker`.
#[derive(Args)]
pub struct WorkerArgs {
    #[command(flatten)]
    group: GroupArgs,
    #[command(flatten)]
    etcd: EtcdArgs,
    #[command(flatten)]
    step_limit: StepLimitArgs,
    /// Address that routers connect to; port 0 takes any
    #[arg(long, default_value = "127.0.0.1:0", env = "LOCKSTEP_LISTEN")]
    listen: SocketAddr,
    /// The same address as routers see it, e.g. http://10.0.0.7:7001
    #[arg(long, env = "LOCKSTEP_ADVERTISE")]
    advertise: Option<String>,
    /// The name that clients ask for [default: the checkpoint's]
    #[arg(long, env = "LOCKSTEP_NAME")]
    name: Option<String>,
    /// Requests that wait for a place before others are refused
    #[arg(long, default_value_t = 256, env = "LOCKSTEP_QUEUE")]
    queue: usize,
    /// Seconds that running answers may take to finish after a signal
    #[arg(long, default_value_t = 30, env = "LOCKSTEP_DRAIN_SECONDS")]
    drain_seconds: u64,
}

pub fn main(args: WorkerArgs) -> Result<()> {
    crate::runtime()?.block_on(run(args))
}

async fn run(args: WorkerArgs) -> Result<()> {
    load::tell_machine();
    if args.listen.ip().is_unspecified() && args.advertise.is_none() {
        let wanted = "say with --advertise http://HOST:PORT how routers reach it";
        bail!("--listen {} is no address to connect to; {wanted}", args.listen);
    }
    let stop = shutdown::signals().context("cannot listen for signals")?;
    let mut early = stop.clone();
    let worker = tokio::select! {
        worker = start(args, stop) => worker?,
        () = shutdown::requested(&mut early) => {
            tracing::info!("stopped while starting");
            std::process::exit(130);
        }
    };
    load::tell(worker.info());
    let (addr, model) = (worker.addr(), &worker.info().name);
    crate::print(format_args!("ready worker=http://{addr} model={model}"))?;
    worker.join().await?;
    tracing::info!("stopped");
    Ok(())
}

async fn start(args: WorkerArgs, stop: watch::Receiver<bool>) -> Result<WorkerHandle> {
    let membership = Arc::new(args.etcd.connect().await?);
    let group = load::resolve(&args.group, RankMode::Processes).await?;
    let mut config = WorkerConfig::new(group);
    config.listen = args.listen;
    config.advertise = args.advertise;
    config.model_name = args.name;
    config.waiting_max = args.queue;
    config.drain_limit = Duration::from_secs(args.drain_seconds);
    config.step_limit = args.step_limit.get();
    Ok(Worker::start(config, membership, Box::new(load::shown()), stop).await?)
}
