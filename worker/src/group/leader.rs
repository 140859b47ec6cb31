//! Rank 0: sends each plan to the other ranks, and runs its own share.
//!
//! One message a step and no reply: what a step produces comes out of the exchange between the
//! ranks. While nothing runs, an empty message says that the leader lives. The other ranks have a
//! plan from its launch on. Where devices compute beside the host, two are in flight, and a thread
//! drives rank 0's; elsewhere one is, and rank 0's share runs in `finish`.

use std::time::Duration;

use collective::{Collective, HostCollective};
use engine::plan::{Executor, ExecutorError, StepOutput, StepPlan};
use kernels::Backend;
use model::{ModelShard, Runner};
use serde::{Deserialize, Serialize};

use super::{
    device_thread::DeviceThread,
    failures::{REASON_PATIENCE, RankFailures},
};
use crate::WorkerError;

const NOW: Duration = Duration::ZERO;

/// A message of the leader. Plans lose on the way what rank 0 alone needs.
#[derive(Serialize)]
pub(super) enum Order<'a> {
    Step(&'a StepPlan),
    KeepAlive,
    Stop,
}

/// An `Order` as a follower receives it: owned.
#[derive(Deserialize)]
pub(super) enum Received {
    Step(StepPlan),
    KeepAlive,
    Stop,
}

/// The other ranks as the leader started them.
pub(super) trait Followers: Send {
    /// `Stop` comes next: a rank that ends from now on has not failed.
    fn expect_end(&mut self);
    /// Returns once they have ended. They were sent `Stop`, or that was not possible.
    fn shutdown(&mut self, told: bool);
}

/// Rank 0's own share.
enum Share<B: Backend, C: Collective<B>> {
    /// Runs in `finish`, and what was launched.
    Here(Box<Runner<B, C>>, Option<StepPlan>),
    Beside(DeviceThread<B, C>),
}

/// Rank 0 of a group whose other ranks were started; ends them with it.
pub(super) struct Leader<B: Backend, C: Collective<B>> {
    /// `None` once the group ends.
    share: Option<Share<B, C>>,
    /// `None` when there are no others.
    control: Option<Box<dyn HostCollective>>,
    failures: RankFailures,
    /// `None` once they are another leader's.
    followers: Option<Box<dyn Followers>>,
    /// As `GroupConfig::step_limit`: so far followers may lag.
    step_limit: Duration,
    message: Vec<u8>,
}

/// What a group has beside the runner and the link of its rank 0.
pub(super) struct Ranks<F> {
    pub failures: RankFailures,
    pub followers: F,
}

impl<B: Backend, C: Collective<B>> Leader<B, C> {
    /// `beside`: devices compute while the host does something else.
    pub fn new(
        runner: Runner<B, C>,
        control: impl HostCollective,
        ranks: Ranks<impl Followers + 'static>,
        (beside, step_limit): (bool, Duration),
    ) -> Result<Self, WorkerError> {
        let others = control.world_size() > 1;
        let share = match beside {
            true => Share::Beside(DeviceThread::start(runner)?),
            false => Share::Here(Box::new(runner), None),
        };
        Ok(Self {
            share: Some(share),
            control: others.then(|| Box::new(control) as Box<dyn HostCollective>),
            failures: ranks.failures,
            followers: Some(Box::new(ranks.followers)),
            step_limit,
            message: Vec::new(),
        })
    }

    /// Leaves a group that has failed, and the other ranks to whoever leads them next. What rank 0
    /// has loaded, and the rank that is lost, with the reason.
    ///
    /// # Errors
    /// No other rank is lost: it is rank 0 that failed.
    pub fn leave(mut self) -> Result<(ModelShard<B>, String), ExecutorError> {
        let Some(reason) = self.failures.describe(REASON_PATIENCE) else {
            return Err(ExecutorError("rank 0 itself has failed".into()));
        };
        // Nobody waits any more: not the ranks that live, and not the device's thread.
        self.failures.cut_links();
        self.control = None;
        self.followers = None;
        let runner = match self.share.take().ok_or_else(ended)? {
            Share::Here(runner, _) => *runner,
            Share::Beside(thread) => thread.end()?,
        };
        let model = runner.leave().map_err(|error| ExecutorError(error.to_string()))?;
        Ok((model, reason))
    }

    fn send(&mut self, order: &Order<'_>) -> Result<(), ExecutorError> {
        let Some(control) = &mut self.control else { return Ok(()) };
        if let Some(reason) = self.failures.describe(NOW) {
            return Err(ExecutorError(reason));
        }
        self.message.clear();
        let message = postcard::to_extend(order, std::mem::take(&mut self.message));
        self.message =
            message.map_err(|error| ExecutorError(format!("a plan cannot be encoded: {error}")))?;
        let sent = control.broadcast(&mut self.message, self.step_limit);
        sent.map_err(|error| self.explain(error.to_string()))
    }

    /// The reason behind a failed exchange, where a rank's end is behind it.
    fn explain(&self, error: String) -> ExecutorError {
        let reason = match self.control {
            Some(_) => self.failures.describe(REASON_PATIENCE),
            None => None,
        };
        ExecutorError(match reason {
            Some(reason) => format!("{error} ({reason})"),
            None => error,
        })
    }
}

fn ended() -> ExecutorError {
    ExecutorError("the group has ended".into())
}

impl<B: Backend, C: Collective<B>> Executor for Leader<B, C> {
    fn depth(&self) -> usize {
        match &self.share {
            Some(Share::Beside(thread)) => thread.depth(),
            _ => 1,
        }
    }

    fn launch(&mut self, plan: StepPlan) -> Result<(), ExecutorError> {
        if let Some(Share::Here(_, Some(_))) = &self.share {
            return Err(ExecutorError("a second plan was launched; finish the first".into()));
        }
        self.send(&Order::Step(&plan))?;
        match self.share.as_mut().ok_or_else(ended)? {
            Share::Beside(thread) => thread.launch(plan),
            Share::Here(_, launched) => {
                *launched = Some(plan);
                Ok(())
            }
        }
    }

    fn finish(&mut self) -> Result<StepOutput, ExecutorError> {
        let failures = &self.failures;
        let output = match self.share.as_mut().ok_or_else(ended)? {
            Share::Beside(thread) => {
                let lost = || failures.describe(NOW).is_some();
                thread.finish_unless(lost).map_err(|error| error.0)
            }
            Share::Here(runner, launched) => match launched.take() {
                Some(plan) => runner.step(&plan).map_err(|error| error.to_string()),
                None => return Err(ExecutorError("no plan was launched".into())),
            },
        };
        output.map_err(|error| self.explain(error))
    }

    fn idle(&mut self) -> Result<(), ExecutorError> {
        self.send(&Order::KeepAlive)
    }
}

impl<B: Backend, C: Collective<B>> Drop for Leader<B, C> {
    fn drop(&mut self) {
        let Some(mut followers) = self.followers.take() else { return };
        followers.expect_end();
        let told = self.send(&Order::Stop);
        if let Err(error) = &told {
            tracing::debug!(%error, "ranks were not told to stop");
        }
        // Followers that did not hear it notice that both exchanges are gone.
        self.share = None;
        self.control = None;
        followers.shutdown(told.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use engine::plan::{Admission, Chunk, SamplingParams, Tokens, Want};

    use super::*;

    #[test]
    fn plans_go_to_other_ranks_without_what_rank_0_alone_needs() {
        let (params, tokens) = (SamplingParams::GREEDY, vec![70_000; 5000]);
        let chunk = Chunk {
            sequence: 3,
            start: 4992,
            tokens: Tokens::Known(vec![70_000; 8]),
            next: None,
            blocks: (0..313).collect(),
            want: Want::Sample,
            admission: Some(Box::new(Admission { params, tokens, prompt_len: 5000 })),
        };
        let mut plan = StepPlan { number: 5, chunks: vec![chunk], released: vec![2] };
        let message = postcard::to_stdvec(&Order::Step(&plan)).unwrap();
        assert!(message.len() < 1000, "{} bytes", message.len());
        let Received::Step(received) = postcard::from_bytes(&message).unwrap() else {
            panic!("a plan");
        };
        plan.chunks[0].admission.as_mut().unwrap().tokens.clear();
        assert_eq!(received, plan);
    }
}
