//! One sequence on one worker.
//!
//! A worker accepts or refuses at once and then says something at least every second, if only how
//! far it has come. So a deadline here means silence, never work: slow is not broken.

use crate::{
    RouterError,
    link::{InFlight, Link},
    metrics::{Metrics, StageGauge},
    queue::Standing,
    trace::Trace,
    version::Model,
};
use proto::v1::{Progress, RunRequest, RunResponse};
use std::{error::Error, sync::Arc, time::Duration};
use tokio::time::timeout;
use tonic::{Code, Request, Status, Streaming};

/// For the end of a stream whose last message is here.
const TRAILERS: Duration = Duration::from_millis(5);

/// A worker's stream.
pub(crate) struct Placement {
    stream: Streaming<RunResponse>,
    place: InFlight,
    gauge: StageGauge,
    /// As far as the worker has said.
    stage: Stage,
    /// A message of a worker's came: it is no stranger at its address.
    spoke: bool,
}

/// Where a sequence is on its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// It may begin to run at any moment.
    Accepted,
    /// Others are ahead of it.
    InLine,
    Runs,
}

/// What a worker is asked to do.
pub(crate) struct Order<'a> {
    pub request: &'a RunRequest,
    pub trace: &'a Trace,
    pub model: &'a Arc<Model>,
    pub metrics: &'a Arc<Metrics>,
    pub standing: Standing,
}

/// Why a worker does not run a sequence.
pub(crate) enum Refusal {
    /// No place for now.
    Full,
    /// The worker's fault, or of something else at its address.
    Broken(String),
    /// No other worker would do better.
    Fatal(RouterError),
}

impl Refusal {
    fn of(status: &Status, spoke: bool) -> Self {
        let message = status.message().to_owned();
        match status.code() {
            Code::ResourceExhausted => Self::Full,
            Code::InvalidArgument | Code::OutOfRange => {
                Self::Fatal(RouterError::Invalid { param: None, message })
            }
            // A worker says so of a sequence that failed alone, e.g. with logits that are no
            // numbers. The transport's own failures carry a source.
            Code::Internal if spoke && status.source().is_none() => {
                Self::Fatal(RouterError::Internal(format!("worker: {message}")))
            }
            code => Self::Broken(format!("{code:?}: {message}")),
        }
    }
}

impl Placement {
    /// Asks a worker to run a sequence; it answers within `limit`, or is broken.
    pub async fn ask(
        link: &Arc<Link>,
        order: &Order<'_>,
        limit: Duration,
    ) -> Result<Self, Refusal> {
        let mut place = InFlight::new(link.clone(), order.model.clone());
        let mut request = Request::new(order.request.clone());
        order.trace.write(request.metadata_mut());
        let mut client = link.client();
        let called = tokio::select! {
            called = timeout(limit, client.run(request)) => called,
            loss = link.lost() => return Err(Refusal::Broken(loss.reason)),
        };
        match called {
            Ok(Ok(response)) => {
                place.accepted();
                order.trace.facts.worker(link.address());
                let gauge = StageGauge::new(order.metrics);
                let stream = response.into_inner();
                Ok(Self { stream, place, gauge, stage: Stage::Accepted, spoke: false })
            }
            Ok(Err(status)) => Err(Refusal::of(&status, false)),
            Err(_) => Err(Refusal::Broken(format!("no answer within {limit:?}"))),
        }
    }

    /// The next message. Silence for longer than `limit` is a fault.
    pub async fn message(&mut self, limit: Duration) -> Result<RunResponse, Refusal> {
        match timeout(limit, self.stream.message()).await {
            Ok(Ok(Some(message))) => {
                self.spoke = true;
                self.place.link().works();
                self.gauge.observe(message.progress.as_ref());
                self.stage = match message.progress {
                    Some(Progress { running: false, waiting_ahead: 0, .. }) => Stage::Accepted,
                    Some(Progress { running: false, .. }) => Stage::InLine,
                    Some(_) | None => Stage::Runs,
                };
                Ok(message)
            }
            Ok(Ok(None)) => Err(Refusal::Broken("the stream ended before its finish".to_owned())),
            Ok(Err(status)) => Err(Refusal::of(&status, self.spoke)),
            Err(_) => Err(Refusal::Broken(format!("no sign of life for {limit:?}"))),
        }
    }

    pub fn link(&self) -> &Arc<Link> {
        self.place.link()
    }

    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Lets the worker end the stream itself, so that it does not count as cancelled there.
    pub async fn end(mut self) {
        if let Ok(Ok(Some(_))) = timeout(TRAILERS, self.stream.message()).await {
            let worker = self.link().id();
            tracing::warn!(worker, "worker sent a message after its finish");
        }
    }
}
