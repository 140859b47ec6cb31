//! `lockstep up`: router and one worker group in one process.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use clap::Args;
use cluster::{InMemory, Membership, shutdown};
use engine::plan::BLOCK_TOKENS;
use tokio::{net::TcpListener, sync::watch};
use worker::{ModelInfo, RankMode, Worker, WorkerConfig, WorkerHandle};

use crate::args::{EtcdArgs, GroupArgs, ListenArgs};
use crate::deadlines::{DeadlineArgs, StepLimitArgs};
use crate::load;

/// Flags of `up`.
#[derive(Args)]
pub struct UpArgs {
    #[command(flatten)]
    group: GroupArgs,
    #[command(flatten)]
    listen: ListenArgs,
    #[command(flatten)]
    etcd: EtcdArgs,
    #[command(flatten)]
    deadlines: DeadlineArgs,
    #[command(flatten)]
    step_limit: StepLimitArgs,
    /// Seconds that running answers may take to finish after Ctrl-C
    #[arg(long, default_value_t = 5, env = "LOCKSTEP_DRAIN_SECONDS")]
    drain_seconds: u64,
}

pub fn main(args: UpArgs) -> Result<()> {
    crate::runtime()?.block_on(run(args))
}

async fn run(args: UpArgs) -> Result<()> {
    load::tell_machine();
    let mut stop = shutdown::signals().context("cannot listen for signals")?;
    tokio::select! {
        up = start(&args, stop.clone()) => serve(up?, stop).await,
        // Until requests are taken there is nothing to drain.
        () = shutdown::requested(&mut stop) => {
            tracing::info!("stopped while starting");
            std::process::exit(130);
        }
    }
}

struct Up {
    worker: WorkerHandle,
    router: router::RouterHandle,
    /// Turned when both are to end.
    stop: watch::Sender<bool>,
}

async fn start(args: &UpArgs, stop: watch::Receiver<bool>) -> Result<Up> {
    // A taken port is told before minutes are spent on loading.
    for (flag, address) in [("--http", args.listen.http), ("--grpc", args.listen.grpc)] {
        ensure_free(flag, address).await?;
    }
    let membership: Arc<dyn Membership> = match args.etcd.etcd.is_empty() {
        true => Arc::new(InMemory::new()),
        false => Arc::new(args.etcd.connect().await?),
    };
    let group = load::resolve(&args.group, RankMode::Threads).await?;
    let mut config = WorkerConfig::new(group);
    config.drain_limit = Duration::from_secs(args.drain_seconds);
    config.step_limit = args.step_limit.get();
    let (sender, ended) = watch::channel(*stop.borrow());
    let progress = Box::new(load::shown());
    let worker = Worker::start(config, membership.clone(), progress, ended.clone()).await?;
    load::tell(worker.info());
    let mut config = router::RouterConfig::new(Some(args.listen.http), Some(args.listen.grpc));
    args.deadlines.apply(&mut config);
    config.deadlines.drain = Duration::from_secs(args.drain_seconds);
    let router = router::Router::start(config, membership, ended).await?;
    crate::print(ready(&router, &worker))?;
    Ok(Up { worker, router, stop: sender })
}

async fn ensure_free(flag: &str, address: SocketAddr) -> Result<()> {
    let remedy = || format!("cannot listen on {address}; choose another with {flag}, or port 0");
    TcpListener::bind(address).await.map(drop).with_context(remedy)
}

/// The one line that says where to go.
fn ready(router: &router::RouterHandle, worker: &WorkerHandle) -> String {
    let address = |scheme: &str, address: Option<SocketAddr>| match address {
        Some(address) => format!("{scheme}://{address}"),
        None => "off".to_owned(),
    };
    let (http, grpc) = (address("http", router.http()), address("http", router.grpc()));
    let ModelInfo { name, ranks, blocks, context_max, .. } = worker.info();
    let worker = worker.addr();
    let tokens = blocks * BLOCK_TOKENS;
    format!(
        "ready http={http} grpc={grpc} worker=http://{worker} model={name} ranks={ranks} \
         kv={tokens} tokens ({blocks} blocks) context={context_max}"
    )
}

async fn serve(up: Up, mut stop: watch::Receiver<bool>) -> Result<()> {
    let Up { worker, router, stop: end } = up;
    let mut ended = tokio::spawn(worker.join());
    let early = tokio::select! {
        outcome = &mut ended => Some(outcome),
        () = shutdown::requested(&mut stop) => None,
    };
    end.send_replace(true);
    router.join().await;
    let outcome = match early {
        Some(outcome) => outcome,
        None => ended.await,
    };
    outcome.context("the worker's task broke")??;
    tracing::info!("stopped");
    Ok(())
}
