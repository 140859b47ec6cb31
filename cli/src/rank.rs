//! `lockstep rank`: one rank of a group, started and watched by `lockstep worker`.

use std::{net::SocketAddr, path::PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use worker::{RANK_TOKEN_VARIABLE, RankConfig, run_rank};

/// Flags of `rank`. The group's secret comes in the environment, where other users cannot see it.
#[derive(Args)]
pub struct RankArgs {
    #[arg(long)]
    rank: usize,
    #[arg(long)]
    world_size: usize,
    #[arg(long)]
    leader: SocketAddr,
    /// Of the group
    #[arg(long)]
    epoch: u64,
    /// Where the checkpoint is on this machine, if not where the leader has it
    #[arg(long)]
    model: Option<PathBuf>,
}

pub fn main(args: RankArgs) -> Result<()> {
    let token = std::env::var(RANK_TOKEN_VARIABLE)
        .with_context(|| format!("{RANK_TOKEN_VARIABLE} is not set; `lockstep worker` sets it"))?;
    let RankArgs { rank, world_size, leader, epoch, model } = args;
    Ok(run_rank(RankConfig { rank, world_size, leader, epoch, token, model })?)
}
