//! `lockstep rank`: one rank of a group, started and watched by `lockstep worker`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use tls::{Cluster, Identity};
use worker::{RankConfig, run_rank};

/// Flags of `rank`. Where the group meets comes by standard input, with its secret.
#[derive(Args)]
pub struct RankArgs {
    #[arg(long)]
    rank: usize,
    #[arg(long)]
    world_size: usize,
    /// Where the checkpoint is on this machine, if not where the leader has it
    #[arg(long)]
    model: Option<PathBuf>,
    /// As those of `worker`, but without variables: a group on one machine needs none of them.
    #[arg(long, requires = "cluster_key", requires = "cluster_ca")]
    cluster_cert: Option<PathBuf>,
    #[arg(long)]
    cluster_key: Option<PathBuf>,
    #[arg(long)]
    cluster_ca: Option<PathBuf>,
}

pub fn main(args: RankArgs) -> Result<()> {
    let RankArgs { rank, world_size, model, cluster_cert, cluster_key, cluster_ca } = args;
    let tls = match (cluster_cert, cluster_key, cluster_ca) {
        (Some(cert), Some(key), Some(ca)) => Some(Cluster::load(Identity { cert, key }, ca)?),
        _ => None,
    };
    Ok(run_rank(RankConfig { rank, world_size, model, tls })?)
}
