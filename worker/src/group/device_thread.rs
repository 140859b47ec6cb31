//! Rank 0 on a device that computes beside the host: a thread of its own drives the device, so that
//! the next plan is made and handed over while a step runs.
//!
//! A plan that is there goes to the device before the one in flight is waited for, where it may
//! follow it: the device goes from one step to the next without the host. Otherwise it waits for as
//! long as it takes to read one plan's samples and lay out the next plan's batch, not for the
//! scheduler, readers or new requests.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use collective::Collective;
use engine::plan::{Executor, ExecutorError, PLANS_IN_FLIGHT_MAX, StepOutput, StepPlan};
use kernels::Backend;
use model::{ModelError, Runner};

use crate::{WorkerError, panic_text};

/// Far more than two steps take: a device has deadlines of its own, and a worker gives up a group
/// whose loop stands still for `--step-limit-seconds`.
const STEP_DEADLINE: Duration = Duration::from_secs(3600);
/// Between two looks at whether the group is lost while a step runs.
const LOOK: Duration = Duration::from_millis(100);

type Output = Result<StepOutput, ExecutorError>;
type Thread<B, C> = JoinHandle<Option<Box<Runner<B, C>>>>;

/// Runs up to two plans, in order.
pub(super) struct DeviceThread<B: Backend, C: Collective<B>> {
    /// Closed to end the thread: after the step that it is in.
    channels: Option<(SyncSender<StepPlan>, Receiver<Output>)>,
    in_flight: usize,
    /// Its result is the runner, unless it panicked.
    thread: Option<Thread<B, C>>,
}

impl<B: Backend, C: Collective<B>> DeviceThread<B, C> {
    /// Fails when the system gives no thread.
    pub fn start(runner: Runner<B, C>) -> Result<Self, WorkerError> {
        let mut runner = Box::new(runner);
        let (plans, inbox) = sync_channel(PLANS_IN_FLIGHT_MAX);
        // One more: for the reason of the thread's end.
        let (outbox, outputs) = sync_channel(PLANS_IN_FLIGHT_MAX + 1);
        let body = move || {
            let ran = catch_unwind(AssertUnwindSafe(|| run_plans(&mut runner, &inbox, &outbox)));
            let Err(panic) = ran else { return Some(runner) };
            let reason = format!("rank 0 panicked: {}", panic_text(&*panic));
            // Nobody is left to hear it where the other end is gone.
            let _unheard = outbox.try_send(Err(ExecutorError(reason))).is_err();
            None
        };
        let thread = thread::Builder::new().name("rank-0".into()).spawn(body);
        let thread = thread.map_err(WorkerError::io("starting the device's thread"))?;
        Ok(Self { channels: Some((plans, outputs)), in_flight: 0, thread: Some(thread) })
    }

    fn ended() -> ExecutorError {
        ExecutorError("the device's thread has ended".into())
    }

    /// Ends the thread, after the step that it is in; its runner.
    ///
    /// Errors: it panicked.
    pub fn end(mut self) -> Result<Runner<B, C>, ExecutorError> {
        self.channels = None;
        let ended = self.thread.take().map(JoinHandle::join);
        let Some(Ok(Some(runner))) = ended else {
            return Err(ExecutorError("rank 0 panicked".into()));
        };
        Ok(*runner)
    }

    /// As `finish`; fails as soon as `lost` says that a rank is: its device would wait in vain.
    pub fn finish_unless(&mut self, lost: impl Fn() -> bool) -> Result<StepOutput, ExecutorError> {
        if self.in_flight == 0 {
            return Err(ExecutorError("no plan was launched".into()));
        }
        let (_, outputs) = self.channels.as_ref().ok_or_else(Self::ended)?;
        self.in_flight -= 1;
        let deadline = Instant::now() + STEP_DEADLINE;
        loop {
            match outputs.recv_timeout(LOOK) {
                Ok(output) => return output,
                Err(RecvTimeoutError::Disconnected) => return Err(Self::ended()),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if lost() {
                return Err(ExecutorError("a step was given up".into()));
            }
            if Instant::now() >= deadline {
                let limit = STEP_DEADLINE.as_secs();
                return Err(ExecutorError(format!("a step has not ended after {limit} s")));
            }
        }
    }
}

/// Until the plans end, one fails, or nobody wants outputs any more.
fn run_plans<B: Backend, C: Collective<B>>(
    runner: &mut Runner<B, C>,
    plans: &Receiver<StepPlan>,
    outputs: &SyncSender<Output>,
) {
    while let Some(plan) = next_plan(runner, plans) {
        let step = match plan {
            Some(plan) => begin(runner, &plan),
            None => runner.finish().map(Some),
        };
        let step = step.map_err(|error| ExecutorError(error.to_string())).transpose();
        let Some(output) = step else { continue };
        let failed = output.is_err();
        if outputs.send(output).is_err() || failed {
            return;
        }
    }
}

/// A plan to begin with, or none where the oldest in flight is to be finished first; `None` once
/// all are done and no more will come.
fn next_plan<B: Backend, C: Collective<B>>(
    runner: &Runner<B, C>,
    plans: &Receiver<StepPlan>,
) -> Option<Option<StepPlan>> {
    match runner.in_flight() {
        0 => plans.recv().ok().map(Some),
        1..PLANS_IN_FLIGHT_MAX => Some(plans.try_recv().ok()),
        _ => Some(None),
    }
}

/// Begins with `plan`, and finishes the one before where `plan` cannot follow it.
fn begin<B: Backend, C: Collective<B>>(
    runner: &mut Runner<B, C>,
    plan: &StepPlan,
) -> Result<Option<StepOutput>, ModelError> {
    let before = match runner.in_flight() > 0 && !runner.follows(plan) {
        true => Some(runner.finish()?),
        false => None,
    };
    runner.launch(plan)?;
    Ok(before)
}

impl<B: Backend, C: Collective<B>> Executor for DeviceThread<B, C> {
    fn depth(&self) -> usize {
        PLANS_IN_FLIGHT_MAX
    }

    fn launch(&mut self, plan: StepPlan) -> Result<(), ExecutorError> {
        if self.in_flight >= PLANS_IN_FLIGHT_MAX {
            return Err(ExecutorError(format!("{} plans are in flight", self.in_flight)));
        }
        let (plans, _) = self.channels.as_ref().ok_or_else(Self::ended)?;
        self.in_flight += 1;
        // Where the thread has ended, `finish` has the reason.
        let _told_by_finish = plans.send(plan).is_err();
        Ok(())
    }

    fn finish(&mut self) -> Result<StepOutput, ExecutorError> {
        self.finish_unless(|| false)
    }

    /// Others are told by whoever has them.
    fn idle(&mut self) -> Result<(), ExecutorError> {
        Ok(())
    }
}

impl<B: Backend, C: Collective<B>> Drop for DeviceThread<B, C> {
    fn drop(&mut self) {
        self.channels = None;
        if let Some(thread) = self.thread.take() {
            // A panic was caught and told inside.
            let _told = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::VecDeque, path::PathBuf};

    use collective::{HostCollective, Staged, Threads};
    use cpu::{Cpu, CpuConfig, Isa, Precision};
    use engine::{
        Request, Scheduler, SchedulerConfig,
        plan::{SamplingParams, TokenLogprob, Tokens},
    };
    use model::{Checkpoint, RunnerOptions};

    use super::*;
    use crate::group::{
        failures::RankFailures,
        leader::{Followers, Leader, Ranks},
    };

    const OPTIONS: RunnerOptions =
        RunnerOptions { blocks: 24, step_tokens_max: 40, sequences_max: 4, context_max: 240 };

    struct Nobody;

    impl Followers for Nobody {
        fn expect_end(&mut self) {}
        fn shutdown(&mut self, _told: bool) {}
    }

    /// A group of one rank, on a thread beside this one or not.
    fn executor(beside: bool) -> Box<dyn Executor> {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/public");
        let checkpoint = Checkpoint::open(&root.join("qwen2_gqa2_hd128")).unwrap();
        let config = CpuConfig { threads: 1, precision: Precision::Exact, isa: Isa::detect() };
        let device = Cpu::new(config).unwrap();
        let rank = Staged::new(Threads::group(1).remove(0));
        let runner = Runner::load(device, rank, &checkpoint, OPTIONS, &mut |_| {}).unwrap();
        let control = Threads::group(1).remove(0);
        assert_eq!(control.world_size(), 1);
        let ranks = Ranks { failures: RankFailures::default(), followers: Nobody };
        Box::new(Leader::new(runner, control, ranks, (beside, Duration::from_secs(60))).unwrap())
    }

    /// Runs some requests; what each was answered, and how many tokens were planned unknown.
    fn answers(executor: &mut dyn Executor, blocks: u32) -> (Vec<Vec<TokenLogprob>>, usize) {
        let mut scheduler = Scheduler::new(SchedulerConfig {
            blocks,
            step_tokens_max: 40,
            step_target: None,
            sequences_max: 4,
            waiting_max: 16,
            context_max: 240,
            prefix_reuse_max: None,
        });
        for number in 0..8u32 {
            let params = SamplingParams {
                temperature: 0.8,
                repetition_penalty: 1.2,
                seed: u64::from(number),
                logprobs: Some(2),
                ..SamplingParams::GREEDY
            };
            // Four of one prompt; a stop for some.
            let prompt = 33 + 9 * number.saturating_sub(3);
            let request = Request {
                prompt: (0..prompt).map(|at| (at * 31 + prompt) % 300).collect(),
                generated: Vec::new(),
                params,
                max_tokens: 40,
                stop_ids: (0..8).map(|stop| stop * 40 + number).collect(),
                score_prompt: number == 5,
            };
            scheduler.submit(request).unwrap();
        }
        let (mut merged, mut unknown) = (vec![Vec::new(); 8], 0);
        let mut in_flight = VecDeque::new();
        loop {
            while in_flight.len() < executor.depth()
                && let Some(plan) = scheduler.schedule()
            {
                let chunks = plan.chunks.iter();
                unknown += chunks.filter(|chunk| chunk.tokens == Tokens::LastSampled).count();
                in_flight.push_back(plan.number);
                executor.launch(plan).unwrap();
            }
            let Some(number) = in_flight.pop_front() else { break };
            let output = executor.finish().unwrap();
            assert_eq!(output.number, number);
            for update in scheduler.commit(output).unwrap() {
                let of: &mut Vec<TokenLogprob> = &mut merged[update.sequence as usize];
                of.extend(update.scores.into_iter().chain(update.tokens));
            }
        }
        assert!(scheduler.is_idle());
        assert_eq!(scheduler.stats().preemptions > 0, blocks < 12);
        (merged, unknown)
    }

    #[test]
    fn two_plans_in_flight_answer_with_the_same_bits_as_one() {
        for blocks in [24, 6] {
            let (one, none) = answers(&mut *executor(false), blocks);
            let (two, some) = answers(&mut *executor(true), blocks);
            assert_eq!(one, two, "{blocks} blocks");
            assert!(none == 0 && some > 50, "{none} and {some} tokens planned unknown");
        }
    }

    #[test]
    fn a_refused_plan_ends_the_group_with_its_reason() {
        for beside in [false, true] {
            let mut executor = executor(beside);
            assert!(executor.finish().is_err(), "nothing was launched");
            let lost = StepPlan { number: 7, ..StepPlan::default() };
            for _ in 0..executor.depth() {
                executor.launch(lost.clone()).unwrap();
            }
            assert!(executor.launch(lost).is_err(), "more than its depth");
            let ExecutorError(reason) = executor.finish().unwrap_err();
            assert!(reason.contains("plan 0 comes next"), "{reason}");
            if beside {
                assert!(executor.finish().unwrap_err().0.contains("has ended"));
            }
        }
    }
}
