//! Ranks as processes of their own.

use std::net::SocketAddr;

use engine::plan::Executor;

use super::{Progress, sizing::Sizing};
use crate::WorkerError;

/// The environment variable that brings a rank its group's secret.
pub const RANK_TOKEN_VARIABLE: &str = "LOCKSTEP_RANK_TOKEN";

/// The place of one rank that is a process.
#[derive(Clone, Debug)]
pub struct RankConfig {
    /// At least 1: rank 0 is the leader.
    pub rank: usize,
    pub world_size: usize,
    /// Where rank 0 listens.
    pub leader: SocketAddr,
    /// The group's secret.
    pub token: String,
}

/// Serves as one rank until the leader says stop or is gone. What to load, the leader says.
pub fn run_rank(config: RankConfig) -> Result<(), WorkerError> {
    let reason = format!("leader {}: processes are not joined yet", config.leader);
    Err(WorkerError::Rank { rank: config.rank, reason })
}

/// Starts and watches the other ranks; this process is rank 0.
pub(super) fn start(
    sizing: &Sizing,
    _progress: Progress<'_>,
) -> Result<Box<dyn Executor>, WorkerError> {
    let reason = "processes are not joined yet".into();
    Err(WorkerError::Rank { rank: sizing.config.ranks, reason })
}
