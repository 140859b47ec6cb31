//! Loading a group with progress, and the facts about it that a bug report needs.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use cpu::Isa;
use model::Loaded;
use text::{Files, Language};
use worker::{Group, GroupConfig, GroupPlan, ModelInfo, RankMode};

use crate::args::GroupArgs;
use crate::progress::{ProgressReport, Unit};

/// A disk or a device that brings nothing for so long is told of.
const STALL: Duration = Duration::from_secs(30);

/// A callback that shows how far the weights are loaded, and at the end how fast they were.
pub fn shown() -> impl FnMut(Loaded) + Send + 'static {
    let mut progress: Option<ProgressReport> = None;
    let mut start = None;
    let (mut moved, mut last) = (Instant::now(), Loaded::default());
    move |loaded| {
        let Loaded { read, uploaded, total } = loaded;
        let start = *start.get_or_insert_with(Instant::now);
        if loaded != last {
            (moved, last) = (Instant::now(), loaded);
        } else if moved.elapsed() >= STALL {
            moved = Instant::now();
            let (read, uploaded, mib) = (read >> 20, uploaded >> 20, total >> 20);
            tracing::warn!(mib, read, uploaded, "no matrix came whole from the files for 30 s");
        }
        if uploaded >= total {
            if progress.take().is_some() {
                let (mib, seconds) = (total >> 20, start.elapsed().as_secs_f64());
                let mib_per_second = (mib as f64 / seconds) as u64;
                tracing::info!(mib, seconds, mib_per_second, "weights loaded");
            }
            return;
        }
        let report = || ProgressReport::new("loading", Unit::Bytes, total);
        progress.get_or_insert_with(report).set_ahead(uploaded, read);
    }
}

/// `GroupArgs::resolve` off the async threads: it may fetch a model, and reads its text files.
pub async fn resolve(args: &GroupArgs, rank_mode: RankMode) -> Result<GroupConfig> {
    let args = args.clone();
    let resolve = move || {
        let config = args.resolve(rank_mode)?;
        match (check_text(&config.model), config.random) {
            (Ok(()), _) => Ok(config),
            (Err(error), None) => Err(error),
            (Err(error), Some(_)) => {
                let why = format!("{error:#}");
                tracing::warn!(why, "no tokenizer: the worker takes token ids, routers no text");
                Ok(config)
            }
        }
    };
    tokio::task::spawn_blocking(resolve).await?
}

/// A model whose tokenizer or settings cannot be read is refused before its weights are loaded,
/// not at the first request.
fn check_text(model: &Path) -> Result<()> {
    language(model, &formats::text_files(model)?).map(|_| ())
}

/// What `files` of a model say, with a warning for each thing that is wrong with them.
fn language(model: &Path, files: &Files) -> Result<Language> {
    let language = Language::load(files)
        .with_context(|| format!("cannot read the model {}", model.display()))?;
    for warning in language.warnings() {
        tracing::warn!(model = %model.display(), "{warning}");
    }
    Ok(language)
}

/// Sizes a group, and reads how its model speaks, before anything is loaded.
pub fn plan(config: GroupConfig) -> Result<(GroupPlan, Language)> {
    let model = config.model.clone();
    let plan = GroupPlan::new(config)?;
    let language = language(&model, &plan.info().text_files)?;
    Ok((plan, language))
}

/// Loads a group in this process.
pub fn group(plan: GroupPlan) -> Result<Group> {
    let group = plan.start(&mut shown())?;
    log_model(&group.info);
    Ok(group)
}

/// One line for each fact about program and machine.
pub fn log_machine() {
    let (version, isa) = (env!("LOCKSTEP_VERSION"), Isa::detect().name());
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    tracing::info!(version, arch = std::env::consts::ARCH, best_isa = isa, cores, "lockstep");
}

/// One line for each fact about a group.
pub fn log_model(info: &ModelInfo) {
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
