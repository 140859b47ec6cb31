//! One choice's stream of tokens, whatever happens to the workers underneath.
//!
//! A stream that breaks goes on elsewhere from the prompt and the tokens received so far: draws
//! depend on (seed, position) alone, so the client sees one unbroken answer. One that breaks twice
//! without any progress between is given up: it may be what breaks its workers. What the client got
//! wrong is told at once and never held against a worker. Dropping cancels.

use crate::{
    RouterError,
    config::{Deadlines, Limits},
    link::{Link, Loss},
    metrics::Metrics,
    opening::Opening,
    placement::{Order, Placement, Refusal, Stage},
    policy::{RouteKey, RoutingPolicy},
    queue::Standing,
    targets::Targets,
    trace::Trace,
    version::Model,
};
use proto::v1::{Finish, Progress, RunRequest, RunResponse, TokenInfo};
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::time::{Instant, sleep};

/// Suspicion against a sequence whose worker broke in its first run, while no others break.
const BROKE_WORKER: u32 = 4;
/// Each reason to doubt that halves it, up to so many.
const DOUBTS_MAX: usize = 2;
/// Between two looks for another worker than one that is not there, unless something changes.
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// Between two lines of the log on a stream that has no token yet.
const PROGRESS_LOG_PERIOD: Duration = Duration::from_secs(10);

/// What all streams share.
pub(crate) struct Upstream {
    pub targets: Targets,
    pub policy: Box<dyn RoutingPolicy>,
    pub limits: Limits,
    pub deadlines: Deadlines,
    pub metrics: Arc<Metrics>,
    /// Sequences in the lines of all models.
    pub queued: AtomicUsize,
}

impl Upstream {
    /// A worker broke a stream or could not be reached.
    pub fn failed(&self, link: &Link) {
        link.failed();
        self.targets.losses().note(link.key());
    }

    /// A sequence is no longer in a line.
    pub fn left_line(&self) {
        self.queued.fetch_sub(1, Relaxed);
        self.metrics.queued.dec();
    }
}

/// News of a sequence.
#[derive(Debug, Default)]
pub(crate) struct Received {
    /// Scored prompt tokens, in order, each once.
    pub prompt: Vec<TokenInfo>,
    /// New tokens, in order, each once.
    pub tokens: Vec<TokenInfo>,
    pub finish: Option<Finish>,
    /// On the first news but progress only.
    pub cached_tokens: u32,
    /// Alone: nothing but this came.
    pub progress: Option<Progress>,
}

/// Where a stream is: `Waiting`, then `Streaming` and `Resuming` in turn, then `Ended`.
enum State {
    /// On no worker yet.
    Waiting,
    Streaming {
        placement: Box<Placement>,
        /// Prompt scores that an earlier worker has sent, and this one will send again.
        again: usize,
    },
    /// Its worker failed it: it goes on elsewhere, ahead of those that never began.
    Resuming,
    Ended,
}

/// One sequence, started with [`UpstreamStream::open`].
pub(crate) struct UpstreamStream {
    upstream: Arc<Upstream>,
    model: Arc<Model>,
    trace: Trace,
    standing: Standing,
    key: RouteKey,
    /// As first sent; `generated` grows with what was received.
    request: RunRequest,
    state: State,
    /// Prompt scores received.
    scores: usize,
    breaks: Breaks,
    progress_logged: Instant,
}

/// Counts breaks, and what came between them.
#[derive(Default)]
struct Breaks {
    all: u32,
    /// Workers that broke since anything came that no worker before had brought.
    barren: Vec<u64>,
    /// How likely it is that the sequence has caused those.
    suspicion: u32,
    /// Tokens computed, at best.
    computed: u32,
}

impl Breaks {
    fn computed(&mut self, tokens: u32) {
        if tokens > self.computed {
            self.computed = tokens;
            self.barren.clear();
            self.suspicion = 0;
        }
    }
}

impl UpstreamStream {
    pub fn new(
        upstream: Arc<Upstream>,
        model: Arc<Model>,
        trace: Trace,
        standing: Standing,
        request: RunRequest,
    ) -> Self {
        let key = RouteKey::new(&model.name, &request.prompt);
        Self {
            upstream,
            model,
            trace,
            standing,
            key,
            request,
            state: State::Waiting,
            scores: 0,
            breaks: Breaks::default(),
            progress_logged: Instant::now(),
        }
    }

    /// Finds a worker that takes the sequence: tries, stands in line, waits, each within limits.
    pub async fn open(&mut self) -> Result<(), RouterError> {
        let order = Order {
            request: &self.request,
            trace: &self.trace,
            model: &self.model,
            metrics: &self.upstream.metrics,
            standing: self.standing,
        };
        let under_way = matches!(self.state, State::Resuming);
        let placement = Opening::new(&self.upstream, order, &self.key, under_way).run().await?;
        self.state = State::Streaming { placement: Box::new(placement), again: self.scores };
        Ok(())
    }

    /// Whether anything but progress was handed out.
    fn began(&self) -> bool {
        self.scores > 0 || !self.request.generated.is_empty()
    }

    /// The next news; `None` after the finish.
    pub async fn next(&mut self) -> Result<Option<Received>, RouterError> {
        loop {
            let placement = match &mut self.state {
                State::Ended => return Ok(None),
                State::Waiting | State::Resuming => {
                    self.open().await?;
                    continue;
                }
                State::Streaming { placement, .. } => placement,
            };
            let limit = self.upstream.deadlines.silence;
            let link = placement.link().clone();
            let mut stopped = false;
            let message = tokio::select! {
                // What has arrived counts, however late it is read: it tells how far it came.
                biased;
                message = placement.message(limit) => message,
                loss = deserted(&link, &self.upstream, &self.model) => {
                    stopped = loss.stopped;
                    Err(Refusal::Broken(loss.reason))
                }
            };
            let reason = match message {
                Ok(message) => return self.accept(message).await.map(Some),
                Err(Refusal::Fatal(error)) => return Err(error),
                Err(Refusal::Full) => "the worker is full".to_owned(),
                Err(Refusal::Broken(reason)) => {
                    self.upstream.failed(&link);
                    reason
                }
            };
            let stage = if stopped { Stage::InLine } else { placement.stage() };
            self.state = State::Resuming;
            if let Some(received) = self.complete() {
                return Ok(Some(received));
            }
            self.restart(stage, &link, &reason)?;
        }
    }

    /// Only the finish was lost with the stream.
    fn complete(&mut self) -> Option<Received> {
        let last = self.request.generated.last()?;
        let finish = if self.request.stop_ids.contains(last) {
            Finish::Stop
        } else if self.request.generated.len() >= self.request.max_tokens as usize {
            Finish::Length
        } else {
            return None;
        };
        self.state = State::Ended;
        Some(Received { finish: Some(finish), ..Received::default() })
    }

    /// Prepares the request for another worker.
    fn restart(&mut self, stage: Stage, link: &Link, reason: &str) -> Result<(), RouterError> {
        let Upstream { limits, targets, .. } = &*self.upstream;
        let worker = link.id();
        self.breaks.all += 1;
        self.breaks.barren.push(link.key());
        // Workers that die together break many streams more than once. One that has brought
        // tokens before is seldom what breaks them, nor is one beside which others break too; one
        // that did not run cannot be.
        let doubts =
            [stage == Stage::Accepted, self.began(), targets.losses().beside(&self.breaks.barren)];
        let doubts = doubts.into_iter().filter(|&doubt| doubt).count().min(DOUBTS_MAX);
        if stage != Stage::InLine {
            self.breaks.suspicion += BROKE_WORKER >> doubts;
        }
        let (all, barren) = (self.breaks.all, self.breaks.barren.len());
        let suspicion = self.breaks.suspicion;
        if suspicion >= BROKE_WORKER * limits.workers_broken_max {
            return Err(RouterError::Unavailable(format!(
                "the stream broke {all} times, {barren} of them without progress between; this \
                 request may be what breaks its workers; last {worker}: {reason}"
            )));
        }
        if all > limits.resumes_max {
            return Err(RouterError::Unavailable(format!(
                "the stream broke {all} times; last {worker}: {reason}"
            )));
        }
        self.upstream.metrics.resumes.inc();
        let received = self.request.generated.len();
        tracing::warn!(worker, reason, received, breaks = all, "stream broke; resuming");
        if received > 0 {
            self.request.score_prompt = false;
        }
        Ok(())
    }

    async fn accept(&mut self, message: RunResponse) -> Result<Received, RouterError> {
        if let Some(progress) = message.progress {
            self.breaks.computed(progress.prefilled);
            self.log(&progress);
            return Ok(Received { progress: Some(progress), ..Received::default() });
        }
        let finish = match Finish::try_from(message.finish) {
            Ok(Finish::None) => None,
            Ok(finish) => Some(finish),
            Err(_) => {
                let unknown = format!("worker: unknown finish {}", message.finish);
                return Err(RouterError::Internal(unknown));
            }
        };
        let cached_tokens = if self.began() { 0 } else { message.cached_tokens };
        let mut prompt = message.prompt;
        if let State::Streaming { again, .. } = &mut self.state {
            let known = prompt.len().min(*again);
            prompt.drain(..known);
            *again -= known;
        }
        self.scores += prompt.len();
        self.request.generated.extend(message.tokens.iter().map(|token| token.id));
        if self.request.generated.len() > self.request.max_tokens as usize {
            let (sent, max) = (self.request.generated.len(), self.request.max_tokens);
            let many = format!("worker: {sent} tokens where {max} were asked for");
            return Err(RouterError::Internal(many));
        }
        if !message.tokens.is_empty() {
            let known = self.request.prompt.len() + self.request.generated.len();
            self.breaks.computed(u32::try_from(known).unwrap_or(u32::MAX));
        } else if !prompt.is_empty() {
            self.breaks.computed(u32::try_from(self.scores).unwrap_or(u32::MAX));
        }
        if finish.is_some()
            && let State::Streaming { placement, .. } =
                std::mem::replace(&mut self.state, State::Ended)
        {
            placement.end().await;
        }
        Ok(Received { prompt, tokens: message.tokens, finish, cached_tokens, progress: None })
    }

    /// Says now and then what a stream without a token waits for.
    fn log(&mut self, progress: &Progress) {
        let State::Streaming { placement, .. } = &self.state else { return };
        let worker = placement.link().id();
        let Progress { waiting_ahead, prefilled, prompt, running } = *progress;
        tracing::debug!(worker, running, waiting_ahead, prefilled, prompt, "progress");
        if self.began() || self.progress_logged.elapsed() < PROGRESS_LOG_PERIOD {
            return;
        }
        self.progress_logged = Instant::now();
        match running {
            true => tracing::info!(worker, prefilled, prompt, "still being prefilled"),
            false => tracing::info!(worker, waiting_ahead, "still waiting for a place"),
        }
    }
}

/// Waits until a stream's worker is not there and another could take it over; says why. Where there
/// is no other it is worth waiting for this one: what was only held up goes on.
async fn deserted(link: &Link, upstream: &Upstream, model: &Model) -> Loss {
    loop {
        let loss = link.lost().await;
        let mut changes = upstream.targets.changes();
        let now = upstream.targets.now();
        if now.version(model).is_some_and(|version| version.has_other(link)) {
            return loss;
        }
        tokio::select! {
            () = changes.next() => {}
            () = sleep(LOOK_AGAIN) => {}
        }
    }
}
