//! The gRPC service `lockstep.v1.Worker`: token ids in, token ids out.

use std::{
    collections::{BTreeMap, VecDeque},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use cluster::Instance;
use engine::{End, EngineError, Position, Update, plan::TokenLogprob};
use futures_util::{Stream, StreamExt, stream};
use proto::v1::{self, worker_server};
use tokio::{sync::watch, time::timeout};
use tonic::{Code, Request, Response, Status, metadata::MetadataValue};

use crate::{Engine, Metrics, ModelInfo, News, Output, WorkerError, validate, watch::Watch};

/// Bytes of a file in one message.
const FILE_PART_BYTES: usize = 1 << 20;
/// Token entries, likeliest ones included, in one message: about half a megabyte.
const ENTRIES_MAX: usize = 1 << 16;
/// Advice to callers that met a full queue.
const RETRY_AFTER_MS: &str = "500";
/// A stream with nothing else to say tells its progress this often: its reader takes a longer
/// silence for a worker that is gone.
const PROGRESS_PERIOD: Duration = Duration::from_secs(1);

/// What every request needs.
pub(crate) struct ServiceState {
    pub engine: Engine,
    pub model: ModelInfo,
    pub metrics: Arc<Metrics>,
    /// What the roster is told.
    pub instance: watch::Receiver<Instance>,
    pub draining: AtomicBool,
    /// Asks for the worker's end; how long what runs may take.
    pub drain: watch::Sender<Option<Duration>>,
    /// For that, where nobody says otherwise.
    pub drain_limit: Duration,
    /// Turns true when connections are to end.
    pub closing: watch::Receiver<bool>,
    /// Streams that have not ended.
    pub streams: AtomicUsize,
}

#[derive(Clone)]
pub(crate) struct Service(pub Arc<ServiceState>);

impl From<WorkerError> for Status {
    fn from(error: WorkerError) -> Self {
        let code = match &error {
            WorkerError::Invalid(_) => Code::InvalidArgument,
            WorkerError::Engine(EngineError::Overloaded(_)) => Code::ResourceExhausted,
            WorkerError::Engine(EngineError::Desync { .. }) => Code::Internal,
            WorkerError::Engine(_) => Code::InvalidArgument,
            WorkerError::Draining | WorkerError::Group(_) => Code::Unavailable,
            _ => Code::Internal,
        };
        let mut status = Status::new(code, error.to_string());
        if code == Code::ResourceExhausted {
            let advice = MetadataValue::from_static(RETRY_AFTER_MS);
            status.metadata_mut().insert("retry-after-ms", advice);
        }
        status
    }
}

/// Counts a stream for as long as it lives.
struct Counted(Arc<ServiceState>);

impl Counted {
    fn new(shared: &Arc<ServiceState>) -> Self {
        shared.streams.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(shared))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::SeqCst);
    }
}

type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl worker_server::Worker for Service {
    type RunStream = Messages<v1::RunResponse>;
    type WatchStream = Messages<v1::WorkerReport>;
    type DescribeModelStream = Messages<v1::ModelFile>;

    async fn run(
        &self,
        request: Request<v1::RunRequest>,
    ) -> Result<Response<Self::RunStream>, Status> {
        let trace = request.metadata().get("traceparent").and_then(|value| value.to_str().ok());
        let trace = trace.unwrap_or_default().to_owned();
        let run = request.into_inner();
        let span = tracing::info_span!("run", request_id = %run.request_id, traceparent = trace);
        let started = span.in_scope(|| self.start(run));
        let running = started.inspect_err(|error| {
            self.0.metrics.rejected();
            span.in_scope(|| tracing::debug!(%error, "refused"));
        })?;
        let messages = stream::unfold(running, Running::next);
        Ok(Response::new(Box::pin(InSpan { messages: Box::pin(messages), span })))
    }

    async fn watch(
        &self,
        _request: Request<v1::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let ServiceState { engine, instance, closing, .. } = &*self.0;
        let (instance, closing) = (instance.clone(), closing.clone());
        let (stats, places) = (engine.stats(), engine.places());
        let watch = Watch { instance, stats, places, prefixes: engine.prefixes(), closing };
        Ok(Response::new(Box::pin(watch.reports()?)))
    }

    async fn drain(
        &self,
        request: Request<v1::DrainRequest>,
    ) -> Result<Response<v1::DrainResponse>, Status> {
        let seconds = request.into_inner().seconds.map(u64::from);
        let limit = seconds.map_or(self.0.drain_limit, Duration::from_secs);
        tracing::info!(seconds = limit.as_secs(), "asked to drain");
        self.0.drain.send_replace(Some(limit));
        let streams = self.0.streams.load(Ordering::SeqCst);
        let streams = u32::try_from(streams).unwrap_or(u32::MAX);
        Ok(Response::new(v1::DrainResponse { streams }))
    }

    async fn describe_worker(
        &self,
        _request: Request<v1::DescribeWorkerRequest>,
    ) -> Result<Response<v1::DescribeWorkerResponse>, Status> {
        let instance = self.0.instance.borrow().encode();
        let instance = instance.map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(v1::DescribeWorkerResponse { instance: instance.into() }))
    }

    async fn describe_model(
        &self,
        _request: Request<v1::DescribeModelRequest>,
    ) -> Result<Response<Self::DescribeModelStream>, Status> {
        let shared = Arc::clone(&self.0);
        let parts: Vec<(String, usize)> = file_parts(&shared.model.text_files);
        let messages = stream::iter(parts).map(move |(name, start)| {
            let file = shared.model.text_files.get(&name).map_or(&[][..], Vec::as_slice);
            let data = &file[start..file.len().min(start + FILE_PART_BYTES)];
            Ok(v1::ModelFile { data: data.to_vec().into(), name })
        });
        Ok(Response::new(Box::pin(messages)))
    }
}

/// Each file's parts: its name and where the part begins. An empty file has one.
fn file_parts(files: &BTreeMap<String, Vec<u8>>) -> Vec<(String, usize)> {
    files
        .iter()
        .flat_map(|(name, data)| {
            (0..data.len().max(1)).step_by(FILE_PART_BYTES).map(|start| (name.clone(), start))
        })
        .collect()
}

impl Service {
    fn start(&self, run: v1::RunRequest) -> Result<Running, WorkerError> {
        // Counted before the flag is looked at: a drain either sees the stream or refuses it.
        let counted = Counted::new(&self.0);
        if self.0.draining.load(Ordering::SeqCst) {
            return Err(WorkerError::Draining);
        }
        let request = validate::request(run, &self.0.model)?;
        let entries = request.params.logprobs.unwrap_or(0) as usize + 1;
        let output = self.0.engine.run(request)?;
        let tokens_max = (ENTRIES_MAX / entries).max(1);
        let ready = VecDeque::from([Ok(progress(output.position()))]);
        Ok(Running { output, ready, tokens_max, ended: false, counted })
    }
}

/// One stream's state between messages.
struct Running {
    output: Output,
    /// Parts of an update that was too large for one message.
    ready: VecDeque<Result<v1::RunResponse, Status>>,
    /// Tokens in one message.
    tokens_max: usize,
    ended: bool,
    counted: Counted,
}

impl Running {
    async fn next(mut self) -> Option<(Result<v1::RunResponse, Status>, Self)> {
        while self.ready.is_empty() {
            if self.ended {
                return None;
            }
            match timeout(PROGRESS_PERIOD, self.output.next()).await {
                Ok(update) => match update? {
                    Ok(News::Update(update)) => self.take(update),
                    Ok(News::Admitted) => {
                        self.ready.push_back(Ok(progress(self.output.position())));
                    }
                    Err(error) => {
                        self.ended = true;
                        self.ready.push_back(Err(error.into()));
                    }
                },
                Err(_) => match self.counted.0.engine.loss() {
                    // The loop hangs and cannot say so itself.
                    Some(reason) => {
                        self.ended = true;
                        self.ready.push_back(Err(WorkerError::Group(reason).into()));
                    }
                    None => self.ready.push_back(Ok(progress(self.output.position()))),
                },
            }
        }
        self.ready.pop_front().map(|message| (message, self))
    }

    /// Cuts an update into messages; the last one carries the end.
    fn take(&mut self, update: Update) {
        let Update { cached_tokens, scores, tokens, end, .. } = update;
        let cached_tokens = u32::try_from(cached_tokens).unwrap_or(u32::MAX);
        let mut messages: Vec<v1::RunResponse> = Vec::new();
        let mut cut = |tokens: Vec<TokenLogprob>, of_prompt: bool| {
            let mut tokens = tokens.into_iter().map(token_info).peekable();
            while tokens.peek().is_some() {
                let part: Vec<_> = tokens.by_ref().take(self.tokens_max).collect();
                let (prompt, tokens) = if of_prompt { (part, vec![]) } else { (vec![], part) };
                let message = v1::RunResponse { prompt, tokens, cached_tokens, ..empty() };
                messages.push(message);
            }
        };
        cut(scores, true);
        cut(tokens, false);
        if let Some(end) = end {
            self.ended = true;
            let finish = match end {
                End::Stop => v1::Finish::Stop,
                End::Length => v1::Finish::Length,
                End::Failed(reason) => {
                    self.ready.extend(messages.into_iter().map(Ok));
                    self.ready.push_back(Err(Status::internal(reason)));
                    return;
                }
            };
            if messages.is_empty() {
                messages.push(v1::RunResponse { cached_tokens, ..empty() });
            }
            if let Some(last) = messages.last_mut() {
                last.set_finish(finish);
            }
        }
        self.ready.extend(messages.into_iter().map(Ok));
    }
}

fn empty() -> v1::RunResponse {
    v1::RunResponse::default()
}

fn progress(position: Position) -> v1::RunResponse {
    let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    let progress = v1::Progress {
        waiting_ahead: count(position.waiting_ahead),
        prefilled: count(position.computed),
        prompt: count(position.known),
        running: position.running,
    };
    v1::RunResponse { progress: Some(progress), ..empty() }
}

fn token_info(token: TokenLogprob) -> v1::TokenInfo {
    let top = token.top.into_iter().map(|(id, logprob)| v1::TopLogprob { id, logprob });
    v1::TokenInfo { id: token.token, logprob: token.logprob, top: top.collect() }
}

/// Polls a stream inside its span.
struct InSpan {
    messages: Messages<v1::RunResponse>,
    span: tracing::Span,
}

impl Stream for InSpan {
    type Item = Result<v1::RunResponse, Status>;

    fn poll_next(
        mut self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        let span = self.span.clone();
        let _entered = span.enter();
        self.messages.as_mut().poll_next(cx)
    }
}
