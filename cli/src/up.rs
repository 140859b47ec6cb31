//! `lockstep up`: router and one worker group in one process.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, Result};
use clap::Args;
use cluster::{shutdown, telemetry};
use engine::plan::BLOCK_TOKENS;
use tokio::{net::TcpListener, sync::watch, time::timeout};
use worker::{ModelInfo, RankMode, Worker, WorkerHandle};

use crate::args::GroupArgs;
use crate::load;
use crate::serve::{ClusterArgs, FrontArgs, Listen, ServedArgs};

/// For router and worker of one process to meet.
const MEET_DEADLINE: Duration = Duration::from_secs(10);

/// Flags of `up`.
#[derive(Args, Debug)]
pub struct UpArgs {
    #[command(flatten)]
    group: GroupArgs,
    #[command(flatten)]
    front: FrontArgs,
    #[command(flatten)]
    served: ServedArgs,
    /// Address of the worker: its metrics, and what routers connect to; port 0 takes any [default:
    /// 127.0.0.1:0, with etcd on another machine this one's address towards it]
    #[arg(long, env = "LOCKSTEP_WORKER_LISTEN")]
    worker_listen: Option<SocketAddr>,
    #[command(flatten)]
    etcd: ClusterArgs,
    /// Seconds that running answers may take to finish after Ctrl-C
    #[arg(long, default_value_t = 5, env = "LOCKSTEP_DRAIN_SECONDS")]
    drain_seconds: u64,
}

pub fn main(args: UpArgs) -> Result<()> {
    crate::runtime()?.block_on(run(args))
}

async fn run(args: UpArgs) -> Result<()> {
    load::log_machine();
    let mut stop = shutdown::signals().context("cannot listen for signals")?;
    tokio::select! {
        up = start(&args, stop.clone()) => serve(up?, stop).await,
        // Until requests are taken there is nothing to drain.
        () = shutdown::requested(&mut stop) => {
            tracing::info!("stopped while starting");
            telemetry::exit(130);
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
    let at = Listen::new("--worker-listen", args.worker_listen, &args.etcd)?;
    args.served.check(at, &args.etcd)?;
    let front = args.front.resolve(args.drain_seconds, &args.etcd)?;
    // A taken port is told before minutes are spent on loading.
    let (http, grpc) = (args.front.http, args.front.grpc);
    for (flag, address) in [("--http", http), ("--grpc", grpc), (at.flag, at.address)] {
        ensure_free(flag, address).await?;
    }
    let membership = args.etcd.connect_or_alone().await?;
    let group = load::resolve(&args.group, RankMode::Threads).await?;
    let config = args.served.resolve(group, at, args.drain_seconds, args.etcd.tls.load()?);
    let (sender, ended) = watch::channel(*stop.borrow());
    let progress = Box::new(load::shown());
    let worker = Worker::start(config, membership.clone(), progress, ended.clone()).await?;
    load::log_model(worker.info());
    let scheme = if front.tls.is_some() { "https" } else { "http" };
    let router = router::Router::start(front, membership, ended).await?;
    // Both are here: only a machine that is very busy takes longer.
    if timeout(MEET_DEADLINE, router.served()).await.is_err() {
        tracing::warn!("the router has not met its worker yet; `lockstep status` tells why");
    }
    telemetry::ready(&facts(scheme, &router, &worker));
    Ok(Up { worker, router, stop: sender })
}

async fn ensure_free(flag: &str, address: SocketAddr) -> Result<()> {
    let remedy = || format!("cannot listen on {address}; choose another with {flag}, or port 0");
    TcpListener::bind(address).await.map(drop).with_context(remedy)
}

/// Where to go, and what is there.
fn facts(
    scheme: &str,
    router: &router::RouterHandle,
    worker: &WorkerHandle,
) -> Vec<(&'static str, String)> {
    let address = |address: Option<SocketAddr>| match address {
        Some(address) => format!("{scheme}://{address}"),
        None => "off".to_owned(),
    };
    let ModelInfo { ranks, blocks, context_max, .. } = worker.info();
    vec![
        ("http", address(router.http())),
        ("grpc", address(router.grpc())),
        ("worker", worker.address()),
        ("model", worker.model_name()),
        ("ranks", ranks.to_string()),
        ("kv", format!("{} tokens ({blocks} blocks)", blocks * BLOCK_TOKENS)),
        ("context", context_max.to_string()),
    ]
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
