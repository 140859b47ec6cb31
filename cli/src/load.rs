//! Loading a group with progress, and the facts about it that a bug report needs.

use anyhow::Result;
use kernels::cpu::Isa;
use worker::{Group, GroupConfig, ModelInfo, RankMode};

use crate::args::GroupArgs;
use crate::progress::{Progress, Unit};

/// A callback that shows how far the weights are loaded.
pub fn shown() -> impl FnMut(u64, u64) + Send + 'static {
    let mut progress: Option<Progress> = None;
    move |done, total| {
        if done >= total {
            progress = None;
            return;
        }
        progress.get_or_insert_with(|| Progress::new("loading", Unit::Bytes, total)).set(done);
    }
}

/// `GroupArgs::resolve` off the async threads: it may fetch a model.
pub async fn resolve(args: &GroupArgs, rank_mode: RankMode) -> Result<GroupConfig> {
    let args = args.clone();
    tokio::task::spawn_blocking(move || args.resolve(rank_mode)).await?
}

/// Loads a group in this process.
pub fn group(config: GroupConfig) -> Result<Group> {
    let group = Group::start(config, &mut shown())?;
    tell(&group.info);
    Ok(group)
}

/// One line for each fact about program and machine.
pub fn tell_machine() {
    let (version, isa) = (env!("LOCKSTEP_VERSION"), Isa::detect().name());
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    tracing::info!(version, arch = std::env::consts::ARCH, best_isa = isa, cores, "lockstep");
}

/// One line for each fact about a group.
pub fn tell(info: &ModelInfo) {
    let ModelInfo { ranks, device, threads_per_rank, isa, precision, .. } = info;
    tracing::info!(
        name = info.name,
        vocabulary = info.vocab,
        weights_mib = info.weights_bytes >> 20,
        "model"
    );
    tracing::info!(ranks, device, threads_per_rank, isa, ?precision, "ranks");
    tracing::info!(
        blocks = info.blocks,
        tokens = info.blocks * engine::plan::BLOCK_TOKENS,
        mib = info.kv_bytes >> 20,
        context_max = info.context_max,
        "kv cache"
    );
    let (step_tokens_max, sequences_max) = (info.step_tokens_max, info.sequences_max);
    tracing::info!(step_tokens_max, sequences_max, "steps");
}
