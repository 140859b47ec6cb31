//! What every rank does to take its place, and what the ranks other than 0 do from then on.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use collective::{Collective, CollectiveError, HostCollective};
use cpu::CpuConfig;
use engine::plan::StepPlan;
use kernels::Backend;
use model::{Checkpoint, ModelError, ModelShard, Numbers, Runner, RunnerOptions};
use serde::{Deserialize, Serialize};

use super::{Device, LoadProgress, devices::Devices, leader::Received};
use crate::WorkerError;

/// A slow disk may keep the ranks of a large model apart for this long.
pub(super) const LOAD_DEADLINE: Duration = Duration::from_secs(3600);

/// How much longer than a step may last a rank waits for what its leader says.
const CONTROL_SLACK: Duration = Duration::from_secs(10);

/// What a rank needs to know besides its place; a rank that is a process gets it from its leader.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct RankOptions {
    pub model: PathBuf,
    pub random: Option<Numbers>,
    pub device: Device,
    pub cpu: CpuConfig,
    pub runner: RunnerOptions,
    /// A step that takes longer has hung; `None` where nothing predicts it.
    pub step_deadline: Option<Duration>,
    /// As `GroupConfig::step_limit`.
    pub step_limit: Duration,
}

impl RankOptions {
    /// How long ranks wait for each other's data on the way of the host; `None`: as long as links
    /// do by themselves. A rank on a busy processor may be late by much and is not dead: signs of
    /// life tell that. Cards compute at a pace that is known, and use this way to meet alone.
    pub fn data_deadline(&self) -> Option<Duration> {
        (self.device == Device::Cpu).then_some(self.step_limit)
    }
}

/// The checkpoint at `path`, or its model with random numbers: the same on every rank.
pub(super) fn open(path: &Path, random: Option<Numbers>) -> Result<Checkpoint, ModelError> {
    const SEED: u64 = 1;
    match random {
        None => Checkpoint::open(path),
        Some(numbers) => Checkpoint::random(path, numbers, SEED),
    }
}

/// This rank with its share of the model: the one that is `held`, where it is the right one, or
/// loaded on its device.
pub(super) fn load<D: Devices, H: HostCollective>(
    devices: &D,
    data: H,
    (checkpoint, options): (&Checkpoint, &RankOptions),
    held: &mut Option<ModelShard<D::Backend>>,
    progress: LoadProgress<'_>,
) -> Result<Runner<D::Backend, D::Link<H>>, WorkerError> {
    let (place, context_max) = ((data.rank(), data.world_size()), options.runner.context_max);
    let elements_max = options.runner.step_tokens_max * checkpoint.config().hidden;
    let link =
        |device: &D::Backend| devices.link(device, data, options.step_deadline, elements_max);
    let (link, shard) = match held.take().filter(|shard| shard.fits(place, context_max)) {
        Some(shard) => {
            let link = link(shard.device());
            // Another rank may be what is wrong with the link.
            match link {
                Ok(link) => (link, shard),
                Err(error) => {
                    *held = Some(shard);
                    return Err(error);
                }
            }
        }
        None => {
            let device = devices.open(place.0, options.step_deadline)?;
            let link = link(&device)?;
            let shard = ModelShard::load(device, place, checkpoint, &options.runner, progress)?;
            (link, shard)
        }
    };
    Ok(Runner::new(shard, link, checkpoint.config(), options.runner)?)
}

/// Whether every other rank has what it needs; else why the first of them has not. `mine` is what
/// they hear of this one.
pub(super) fn agree<T>(
    control: &mut dyn HostCollective,
    mine: &Result<T, WorkerError>,
) -> Result<(), WorkerError> {
    let gone = |error: &WorkerError| {
        let WorkerError::Model(ModelError::Collective(error)) = error else { return false };
        matches!(error, CollectiveError::Gone { .. })
    };
    // Whoever lost the others does not know why.
    let reason = mine.as_ref().err().filter(|error| !gone(error)).map(ToString::to_string);
    let reasons = match control.all_gather_bytes(reason.unwrap_or_default().as_bytes()) {
        Ok(reasons) => reasons,
        // What is wrong with this rank says more.
        Err(_) if mine.is_err() => return Ok(()),
        Err(error) => return Err(ModelError::from(error).into()),
    };
    match reasons.iter().position(|reason| !reason.is_empty()) {
        Some(rank) if reasons[control.rank()].is_empty() => {
            let reason = String::from_utf8_lossy(&reasons[rank]);
            Err(WorkerError::Group(format!("rank {rank}: {reason}")))
        }
        _ => Ok(()),
    }
}

/// This rank, once every rank has loaded; else `held` has what it has loaded.
pub(super) fn all_loaded<B: Backend, C: Collective<B>>(
    control: &mut dyn HostCollective,
    loaded: Result<Runner<B, C>, WorkerError>,
    held: &mut Option<ModelShard<B>>,
) -> Result<Runner<B, C>, WorkerError> {
    match (agree(control, &loaded), loaded) {
        (Ok(()), loaded) => loaded,
        (Err(error), Ok(runner)) => {
            *held = Some(runner.leave()?);
            Err(error)
        }
        (Err(error), Err(_)) => Err(error),
    }
}

/// The checkpoint at `path`, which must be that of rank 0, whose facts are `wanted`.
pub(super) fn open_same(
    path: &Path,
    random: Option<Numbers>,
    wanted: &BTreeMap<String, String>,
) -> Result<Checkpoint, WorkerError> {
    let checkpoint = open(path, random)?;
    let found = checkpoint.facts()?;
    let names = wanted.keys().chain(found.keys());
    let Some(name) = names.into_iter().find(|name| wanted.get(*name) != found.get(*name)) else {
        return Ok(checkpoint);
    };
    let told = |facts: &BTreeMap<String, String>| match facts.get(name) {
        Some(fact) => fact.clone(),
        None => "missing".to_owned(),
    };
    Err(WorkerError::Config(format!(
        "{} is another model than rank 0's: {name} is {} here and {} there; give every node the \
         same",
        path.display(),
        told(&found),
        told(wanted)
    )))
}

/// Runs what the leader says until it says stop. It says something twice a second while nothing
/// runs, and nothing while it waits for a step, which lasts for up to `step_limit`.
pub(super) fn follow<B: Backend, C: Collective<B>>(
    runner: &mut Runner<B, C>,
    control: &mut dyn HostCollective,
    step_limit: Duration,
) -> Result<(), WorkerError> {
    let mut message = Vec::new();
    // Whoever leads ends a step that is too long before its ranks do.
    let deadline = step_limit.saturating_add(CONTROL_SLACK);
    loop {
        control.broadcast(&mut message, deadline).map_err(ModelError::from)?;
        let received = postcard::from_bytes(&message);
        let received = received
            .map_err(|error| WorkerError::Group(format!("a plan cannot be decoded: {error}")))?;
        match received {
            Received::Step(plan) => run(runner, &plan)?,
            Received::KeepAlive => finish(runner, 0)?,
            Received::Stop => return Ok(()),
        }
    }
}

/// Begins with `plan`, and finishes what it does not follow.
fn run<B: Backend, C: Collective<B>>(
    runner: &mut Runner<B, C>,
    plan: &StepPlan,
) -> Result<(), WorkerError> {
    if !runner.follows(plan) {
        finish(runner, 0)?;
    }
    runner.launch(plan)?;
    finish(runner, usize::from(runner.runs_ahead()))
}

/// Finishes all but the newest `left`.
fn finish<B: Backend, C: Collective<B>>(
    runner: &mut Runner<B, C>,
    left: usize,
) -> Result<(), WorkerError> {
    while runner.in_flight() > left {
        runner.finish()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::NcclUse;
    use cpu::{Isa, Precision};
    use cuda::{CudaConfig, KvFormat, PrefillKernel, WeightFormat};

    /// Nothing of what the leader decided is lost on the way to a rank.
    #[test]
    fn options_arrive_as_they_were_sent() {
        let config = CudaConfig {
            kv_format: KvFormat::Fp8,
            prefill: PrefillKernel::Mma,
            weights: WeightFormat::Fp8,
            overlap: false,
        };
        let runner =
            RunnerOptions { blocks: 1, step_tokens_max: 2, sequences_max: 3, context_max: 4 };
        let cards = |nccl| Device::Cuda { first: 5, config, share: true, nccl };
        for device in [Device::Cpu, cards(NcclUse::Off), cards(NcclUse::At("a/b".into()))] {
            for isa in Isa::ALL {
                for precision in [Precision::Fast, Precision::Exact] {
                    let cpu = CpuConfig { threads: 6, precision, isa };
                    let sent = RankOptions {
                        model: "a b".into(),
                        random: Some(Numbers::INT4),
                        device: device.clone(),
                        cpu,
                        runner,
                        step_deadline: Some(Duration::from_millis(1250)),
                        step_limit: Duration::from_secs(7),
                    };
                    let bytes = postcard::to_stdvec(&sent).unwrap();
                    let got: RankOptions = postcard::from_bytes(&bytes).unwrap();
                    assert_eq!(format!("{got:?}"), format!("{sent:?}"));
                }
            }
        }
    }
}
