//! Ranks as threads of this process.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread::{self, JoinHandle},
};

use collective::{HostCollective, Threads};
use engine::plan::Executor;

use super::{
    LoadProgress,
    devices::Devices,
    failures::RankFailures,
    follower::{LOAD_DEADLINE, RankOptions, all_loaded, follow, load},
    leader::{Followers, Leader, Ranks},
    sizing::Sizing,
};
use crate::{WorkerError, panic_text};
use model::Checkpoint;

/// The follower threads of a group.
struct RankThreads(Vec<JoinHandle<()>>);

impl Followers for RankThreads {
    fn expect_end(&mut self) {}

    fn shutdown(&mut self, _told: bool) {
        for thread in self.0.drain(..) {
            // A panic was caught and reported inside.
            let _reported = thread.join();
        }
    }
}

/// Loads all ranks; this thread's is rank 0.
pub(super) fn start<D: Devices>(
    sizing: &Sizing,
    devices: D,
    progress: LoadProgress<'_>,
) -> Result<Box<dyn Executor>, WorkerError> {
    let failures = RankFailures::default();
    let ranks = sizing.config.ranks;
    let options = &sizing.options;
    // Loading takes as long as it takes; later, broadcasts bring their own deadline.
    let mut controls = Threads::group_with_deadline(ranks, LOAD_DEADLINE).into_iter();
    let datas = match options.data_deadline() {
        Some(deadline) => Threads::group_with_deadline(ranks, deadline),
        None => Threads::group(ranks),
    };
    let mut datas = datas.into_iter();
    let (Some(mut control), Some(data)) = (controls.next(), datas.next()) else {
        return Err(WorkerError::Config("a group needs at least one rank".into()));
    };
    let mut followers = RankThreads(Vec::new());
    for (control, data) in controls.zip(datas) {
        let rank = control.rank();
        let (failures, checkpoint) = (failures.clone(), Arc::clone(&sizing.checkpoint));
        let (devices, options) = (devices.clone(), options.clone());
        let body = move || {
            let ranked = || follow_as_thread(&devices, (control, data), &checkpoint, &options);
            match catch_unwind(AssertUnwindSafe(ranked)) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => failures.report(rank, error.to_string()),
                Err(panic) => failures.report(rank, panic_text(&*panic)),
            }
        };
        let thread = thread::Builder::new().name(format!("rank-{rank}")).spawn(body);
        followers.0.push(thread.map_err(WorkerError::io("starting a rank's thread"))?);
    }
    let loaded = load(&devices, data, (&sizing.checkpoint, options), &mut None, progress);
    let runner = all_loaded(&mut control, loaded, &mut None);
    let runner = runner.map_err(|error| failures.or_cause(error))?;
    let ways = (devices.compute_beside_the_host(), options.step_limit);
    Ok(Box::new(Leader::new(runner, control, Ranks { failures, followers }, ways)?))
}

fn follow_as_thread<D: Devices>(
    devices: &D,
    (mut control, data): (Threads, Threads),
    checkpoint: &Checkpoint,
    options: &RankOptions,
) -> Result<(), WorkerError> {
    let loaded = load(devices, data, (checkpoint, options), &mut None, &mut |_| {});
    let mut runner = all_loaded(&mut control, loaded, &mut None)?;
    follow(&mut runner, &mut control, options.step_limit)
}
