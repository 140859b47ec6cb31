//! `lockstep rank`: one rank of a group, started and watched by `lockstep worker`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
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
}

pub fn main(args: RankArgs) -> Result<()> {
    let RankArgs { rank, world_size, model } = args;
    Ok(run_rank(RankConfig { rank, world_size, model })?)
}
