//! One choice's stream of tokens, whatever happens to the workers underneath.
//!
//! A stream that breaks goes on elsewhere from the prompt and the tokens received so far: draws
//! depend on (seed, position) alone, so the client sees one unbroken answer. A full worker leads to
//! the next one, then to a bounded line in order of arrival; no worker at all to a short wait.
//! What the client got wrong is told at once and never held against a worker. Dropping cancels.

use crate::{
    RouterError,
    config::{Deadlines, Limits},
    metrics::Metrics,
    policy::{RouteKey, RoutingPolicy, Target},
    queue::Ticket,
    targets::{InFlight, Link, Model, Targets},
    trace::Trace,
};
use proto::v1::{Finish, RunRequest, RunResponse, TokenInfo};
use std::{error::Error, future::Future, sync::Arc, time::Duration};
use tokio::time::{Instant, timeout};
use tonic::{Code, Request, Status, Streaming};

/// Between two looks at workers that were full or away, unless something wakes the wait earlier.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// For the end of a stream whose last message is here.
const TRAILERS: Duration = Duration::from_millis(5);

/// What all sequences share.
pub(crate) struct Upstream {
    pub targets: Targets,
    pub policy: Box<dyn RoutingPolicy>,
    pub limits: Limits,
    pub deadlines: Deadlines,
    pub metrics: Arc<Metrics>,
    /// Sequences in the lines of all models.
    pub queued: std::sync::atomic::AtomicUsize,
}

/// News of a sequence.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// Scored prompt tokens, in order, each once.
    pub prompt: Vec<TokenInfo>,
    /// New tokens, in order, each once.
    pub tokens: Vec<TokenInfo>,
    pub finish: Option<Finish>,
    /// On the first news only.
    pub cached_tokens: u32,
}

/// One sequence, started with [`Sequence::open`].
pub(crate) struct Sequence {
    upstream: Arc<Upstream>,
    model: Arc<Model>,
    trace: Trace,
    key: RouteKey,
    /// As first sent; `generated` grows with what was received.
    request: RunRequest,
    /// Prompt scores handed out.
    scored: usize,
    /// Prompt scores that a later worker sends again.
    scores_again: usize,
    live: Option<Live>,
    breaks: u32,
    /// News was handed out before.
    told: bool,
    finished: bool,
}

struct Live {
    stream: Streaming<RunResponse>,
    place: InFlight,
    fresh: bool,
}

/// How a worker's refusal is to be taken.
enum Verdict {
    Full,
    Broken(String),
    Fatal(RouterError),
}

fn judge(status: &Status) -> Verdict {
    let message = status.message().to_owned();
    match status.code() {
        Code::ResourceExhausted => Verdict::Full,
        Code::InvalidArgument | Code::OutOfRange => {
            Verdict::Fatal(RouterError::Invalid { param: None, message })
        }
        Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Aborted => {
            Verdict::Broken(message)
        }
        // The transport's own failures carry a source; a worker's statement does not.
        _ if status.source().is_some() => Verdict::Broken(message),
        code => Verdict::Fatal(RouterError::Internal(format!("worker: {code:?}: {message}"))),
    }
}

impl Sequence {
    pub fn new(
        upstream: Arc<Upstream>,
        model: Arc<Model>,
        trace: Trace,
        request: RunRequest,
    ) -> Self {
        let key = RouteKey::new(&model.name, &request.prompt);
        Self {
            upstream,
            model,
            trace,
            key,
            request,
            scored: 0,
            scores_again: 0,
            live: None,
            breaks: 0,
            told: false,
            finished: false,
        }
    }

    /// Finds a worker that takes the sequence: tries, stands in line, waits, each within limits.
    pub async fn open(&mut self) -> Result<(), RouterError> {
        let upstream = self.upstream.clone();
        let started = Instant::now();
        let mut refused: Vec<Arc<Link>> = Vec::new();
        let mut ticket = None;
        // A sequence under way does not stand in line behind those that never began.
        if self.breaks == 0 && Ticket::line_waits(&self.model) {
            ticket = Some(Ticket::take(&upstream, &self.model, started).await?);
        }
        loop {
            let (links, targets): (Vec<Arc<Link>>, Vec<Target>) =
                upstream.targets.now().candidates(&self.model.name, &refused).into_iter().unzip();
            let Some(at) = upstream.policy.pick(&self.key, &targets) else {
                if refused.is_empty() {
                    self.wait_for_worker(started).await?;
                    continue;
                }
                refused.clear();
                if ticket.is_none() {
                    ticket = Some(Ticket::take(&upstream, &self.model, started).await?);
                }
                self.wait_for_place(started).await?;
                continue;
            };
            match self.call(&links[at]).await {
                Ok(live) => {
                    self.trace.facts.worker(&links[at].address);
                    self.live = Some(live);
                    return Ok(());
                }
                Err(Verdict::Fatal(error)) => return Err(error),
                Err(Verdict::Full) => refused.push(links[at].clone()),
                Err(Verdict::Broken(reason)) => {
                    tracing::warn!(reason, "worker did not take the sequence");
                    links[at].failed();
                }
            }
            upstream.metrics.retries.inc();
        }
    }

    async fn call(&self, link: &Arc<Link>) -> Result<Live, Verdict> {
        let place = InFlight::new(link.clone(), self.model.clone());
        let mut request = Request::new(self.request.clone());
        self.trace.write(request.metadata_mut());
        let mut client = link.client();
        let limit = self.upstream.deadlines.connect;
        match timeout(limit, client.run(request)).await {
            Ok(Ok(response)) => Ok(Live { stream: response.into_inner(), place, fresh: true }),
            Ok(Err(status)) => Err(judge(&status)),
            Err(_) => Err(Verdict::Broken(format!("no answer within {limit:?}"))),
        }
    }

    async fn wait_for_worker(&self, started: Instant) -> Result<(), RouterError> {
        let upstream = &self.upstream;
        if started.elapsed() >= upstream.deadlines.ready {
            let shortage = upstream.targets.now().shortage(&self.model.name);
            return Err(RouterError::Unavailable(shortage));
        }
        let mut targets = upstream.targets.clone();
        wake_or_tick(targets.changed()).await;
        Ok(())
    }

    async fn wait_for_place(&self, started: Instant) -> Result<(), RouterError> {
        let upstream = &self.upstream;
        if started.elapsed() >= upstream.deadlines.queue {
            return Err(crate::queue::overloaded(&format!(
                "every worker of '{}' stayed full for {:?}",
                self.model.name, upstream.deadlines.queue
            )));
        }
        wake_or_tick(self.model.freed.notified()).await;
        Ok(())
    }

    /// The next news; `None` after the finish.
    pub async fn next(&mut self) -> Result<Option<Progress>, RouterError> {
        loop {
            if self.finished {
                return Ok(None);
            }
            if self.live.is_none() {
                self.open().await?;
            }
            let Some(live) = &mut self.live else { continue };
            let deadlines = &self.upstream.deadlines;
            let limit = if live.fresh { deadlines.first_token } else { deadlines.next_token };
            let reason = match timeout(limit, live.stream.message()).await {
                Ok(Ok(Some(message))) => {
                    live.fresh = false;
                    live.place.link().works();
                    return self.accept(message).await.map(Some);
                }
                Ok(Ok(None)) => "the stream ended before its finish".to_owned(),
                Ok(Err(status)) => match judge(&status) {
                    Verdict::Fatal(error) => return Err(error),
                    Verdict::Full => {
                        self.live = None;
                        self.restart("the worker is full")?;
                        continue;
                    }
                    Verdict::Broken(reason) => reason,
                },
                Err(_) => format!("no token within {limit:?}"),
            };
            live.place.link().failed();
            self.live = None;
            if let Some(progress) = self.complete() {
                return Ok(Some(progress));
            }
            self.restart(&reason)?;
        }
    }

    /// Only the finish was lost with the stream.
    fn complete(&mut self) -> Option<Progress> {
        let last = self.request.generated.last()?;
        let finish = if self.request.stop_ids.contains(last) {
            Finish::Stop
        } else if self.request.generated.len() >= self.request.max_tokens as usize {
            Finish::Length
        } else {
            return None;
        };
        self.finished = true;
        Some(Progress { finish: Some(finish), ..Progress::default() })
    }

    /// Prepares the request for another worker.
    fn restart(&mut self, reason: &str) -> Result<(), RouterError> {
        self.breaks += 1;
        if self.breaks > self.upstream.limits.resumes_max {
            return Err(RouterError::Unavailable(format!(
                "the stream broke {} times, last: {reason}",
                self.breaks
            )));
        }
        self.upstream.metrics.resumes.inc();
        let received = self.request.generated.len();
        tracing::warn!(reason, received, breaks = self.breaks, "stream broke; resuming");
        if received > 0 {
            self.request.score_prompt = false;
        }
        self.scores_again = self.scored;
        Ok(())
    }

    async fn accept(&mut self, message: RunResponse) -> Result<Progress, RouterError> {
        let finish = match Finish::try_from(message.finish) {
            Ok(Finish::None) => None,
            Ok(finish) => Some(finish),
            Err(_) => {
                let unknown = format!("worker: unknown finish {}", message.finish);
                return Err(RouterError::Internal(unknown));
            }
        };
        let mut prompt = message.prompt;
        let again = self.scores_again.min(prompt.len());
        prompt.drain(..again);
        self.scores_again -= again;
        self.scored += prompt.len();
        self.request.generated.extend(message.tokens.iter().map(|token| token.id));
        if self.request.generated.len() > self.request.max_tokens as usize {
            let (sent, max) = (self.request.generated.len(), self.request.max_tokens);
            let many = format!("worker: {sent} tokens where {max} were asked for");
            return Err(RouterError::Internal(many));
        }
        if finish.is_some() {
            self.finished = true;
            self.end_stream().await;
        }
        let cached_tokens = if self.told { 0 } else { message.cached_tokens };
        self.told = true;
        Ok(Progress { prompt, tokens: message.tokens, finish, cached_tokens })
    }

    /// Lets the worker end the stream itself, so that it does not count as cancelled there.
    async fn end_stream(&mut self) {
        if let Some(mut live) = self.live.take()
            && let Ok(Ok(Some(_))) = timeout(TRAILERS, live.stream.message()).await
        {
            tracing::warn!("worker sent a message after its finish");
        }
    }
}

/// Waits for the event, but not longer than until it is time to look again.
async fn wake_or_tick(event: impl Future<Output = ()>) {
    tokio::select! {
        () = event => {}
        () = tokio::time::sleep(LOOK_AGAIN) => {}
    }
}
