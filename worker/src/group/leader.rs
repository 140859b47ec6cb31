//! Rank 0: sends each plan to the other ranks, and runs its own share.
//!
//! One message a step and no reply: what a step produces comes out of the exchange between the
//! ranks. While nothing runs, an empty message says that the leader lives.

use std::time::Duration;

use collective::{Collective, HostCollective};
use engine::plan::{Executor, ExecutorError, StepOutput, StepPlan};
use kernels::Backend;
use model::Runner;
use serde::{Deserialize, Serialize};

use super::failures::{REASON_PATIENCE, RankFailures};

/// How long a follower waits for a message of its leader, and the leader for followers that lag.
pub(super) const CONTROL_DEADLINE: Duration = Duration::from_secs(10);

/// A message of the leader.
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

/// The other ranks as the leader started them; shut down after they were sent `Stop`.
pub(super) trait Followers: Send {
    fn shutdown(&mut self);
}

pub(super) struct Leader<B: Backend, C: Collective<B>> {
    /// `None` once the group ends.
    pub runner: Option<Runner<B, C>>,
    /// `None` when there are no others.
    pub control: Option<Box<dyn HostCollective>>,
    pub failures: RankFailures,
    pub followers: Box<dyn Followers>,
    pub submitted: Option<StepPlan>,
    pub message: Vec<u8>,
}

impl<B: Backend, C: Collective<B>> Leader<B, C> {
    fn send(&mut self, order: &Order<'_>) -> Result<(), ExecutorError> {
        let Some(control) = &mut self.control else { return Ok(()) };
        if let Some(reason) = self.failures.describe(Duration::ZERO) {
            return Err(ExecutorError(reason));
        }
        self.message.clear();
        let message = postcard::to_extend(order, std::mem::take(&mut self.message));
        self.message =
            message.map_err(|error| ExecutorError(format!("a plan cannot be encoded: {error}")))?;
        let sent = control.broadcast(&mut self.message, CONTROL_DEADLINE);
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

impl<B: Backend, C: Collective<B>> Executor for Leader<B, C> {
    fn submit(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        self.send(&Order::Step(plan))?;
        self.submitted = Some(plan.clone());
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, ExecutorError> {
        let (Some(runner), Some(plan)) = (&mut self.runner, self.submitted.take()) else {
            return Err(ExecutorError("no plan was submitted".into()));
        };
        runner.step(&plan).map_err(|error| self.explain(error.to_string()))
    }

    fn idle(&mut self) -> Result<(), ExecutorError> {
        self.send(&Order::KeepAlive)
    }
}

impl<B: Backend, C: Collective<B>> Drop for Leader<B, C> {
    fn drop(&mut self) {
        if let Err(error) = self.send(&Order::Stop) {
            tracing::debug!(%error, "ranks were not told to stop");
        }
        // Followers that did not hear it notice that both exchanges are gone.
        self.runner = None;
        self.control = None;
        self.followers.shutdown();
    }
}
