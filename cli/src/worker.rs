//! `lockstep worker`: one group of ranks, each a process of its own, or one machine's part of a
//! group over several.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, Result};
use clap::Args;
use cluster::{shutdown, telemetry};
use tokio::sync::watch;
use worker::{GroupConfig, NodeConfig, RankMode, Worker, WorkerHandle, run_node};

use crate::args::GroupArgs;
use crate::load;
use crate::mock::EngineArgs;
use crate::nodes::{Group, NodesArgs};
use crate::security::Clear;
use crate::serve::{CLUSTER_REMEDY, ClusterArgs, Listen, ServedArgs};

/// Flags of `worker`.
#[derive(Args)]
pub struct WorkerArgs {
    #[command(flatten)]
    group: GroupArgs,
    #[command(flatten)]
    etcd: ClusterArgs,
    #[command(flatten)]
    nodes: NodesArgs,
    /// Address that routers connect to; port 0 takes any [default: 127.0.0.1:0, with etcd on
    /// another machine this one's address towards it]
    #[arg(long, env = "LOCKSTEP_LISTEN")]
    listen: Option<SocketAddr>,
    #[command(flatten)]
    served: ServedArgs,
    #[command(flatten)]
    engine: EngineArgs,
    /// Seconds that running answers may take to finish after a signal
    #[arg(long, default_value_t = 30, env = "LOCKSTEP_DRAIN_SECONDS")]
    drain_seconds: u64,
}

pub fn main(args: WorkerArgs) -> Result<()> {
    crate::runtime()?.block_on(run(args))
}

async fn run(args: WorkerArgs) -> Result<()> {
    load::log_machine();
    let nodes = args.nodes.resolve(&args.etcd, args.group.ranks())?;
    let stop = shutdown::signals().context("cannot listen for signals")?;
    let mut early = stop.clone();
    if let Some(group) = nodes.as_ref().filter(|group| group.node > 0) {
        return follow(&args, group, stop).await;
    }
    if let Some(group) = nodes.as_ref().filter(|group| group.nodes.tls.is_none()) {
        let address = match group.nodes.listen {
            Some(address) => address,
            None => Listen::new("--rank-listen", None, &args.etcd)?.address,
        };
        let clear = Clear { flag: "--rank-listen", address, remedy: CLUSTER_REMEDY };
        clear.check(args.etcd.insecure)?;
    }
    let at = Listen::new("--listen", args.listen, &args.etcd)?;
    args.served.check(at, &args.etcd)?;
    let worker = tokio::select! {
        worker = start(args, at, nodes, stop) => worker?,
        () = shutdown::requested(&mut early) => {
            tracing::info!("stopped while starting");
            telemetry::exit(130);
        }
    };
    load::log_model(worker.info());
    telemetry::ready(&[("worker", worker.address()), ("model", worker.model_name())]);
    worker.join().await?;
    tracing::info!("stopped");
    Ok(())
}

/// A machine whose ranks another one leads.
async fn follow(args: &WorkerArgs, group: &Group, stop: watch::Receiver<bool>) -> Result<()> {
    let GroupConfig { model, rank_program, .. } =
        load::resolve(&args.group, RankMode::Processes).await?;
    let Group { node, nodes } = group;
    let count = nodes.ranks.len();
    telemetry::ready(&[("group", nodes.key.id().to_owned()), ("node", format!("{node}/{count}"))]);
    let config = NodeConfig {
        key: nodes.key.clone(),
        node: *node,
        nodes: count,
        model,
        version: nodes.version.clone(),
        drain_limit: Duration::from_secs(args.drain_seconds),
        rank_program,
        tls: nodes.tls.clone(),
    };
    run_node(config, stop).await?;
    tracing::info!("stopped");
    Ok(())
}

async fn start(
    args: WorkerArgs,
    at: Listen,
    nodes: Option<Group>,
    stop: watch::Receiver<bool>,
) -> Result<WorkerHandle> {
    let mock = args.engine.mock()?;
    // Without etcd it is for routers to know this address: see `router --workers`.
    let membership = args.etcd.connect_or_alone().await?;
    let mut group = load::resolve(&args.group, RankMode::Processes).await?;
    group.mock = mock;
    group.nodes = nodes.map(|group| group.nodes);
    let config = args.served.resolve(group, at, args.drain_seconds, args.etcd.tls.load()?);
    Ok(Worker::start(config, membership, Box::new(load::shown()), stop).await?)
}
