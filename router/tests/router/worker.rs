//! A worker that answers by script.

use proto::v1::{
    DescribeModelRequest, DescribeWorkerRequest, DescribeWorkerResponse, DrainRequest,
    DrainResponse, Finish, Load, ModelFile, Progress, RunRequest, RunResponse, TokenInfo,
    TopLogprob, WatchRequest, WorkerReport,
    worker_server::{self, WorkerServer},
};
use std::{
    collections::VecDeque,
    path::PathBuf,
    pin::Pin,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
    time::Duration,
};
use text::{Files, Language};
use tokio_stream::{
    Stream, StreamExt,
    wrappers::{IntervalStream, TcpListenerStream},
};
use tonic::{Request, Response, Status, metadata::MetadataMap};

pub const END: u32 = 482;

/// What one call does instead of answering.
#[derive(Clone, Debug)]
pub enum Fault {
    /// So many tokens, then this status.
    Status(usize, Status),
    /// So many tokens, then the end without a finish.
    End(usize),
    /// So many tokens, the last one's finish left out; then the end.
    Unfinished(usize),
    /// So many tokens, then silence.
    Silence(usize),
    /// Refused at once.
    Refuse(Status),
    /// No answer to the call itself.
    Mute,
    /// So many tokens of the prompt are computed, told one by one; then this status.
    Prefill(u32, Status),
    /// It is told that others are ahead of it; then this status.
    InLine(Status),
    /// Too many tokens.
    Flood,
}

pub struct Worker {
    /// Faults of the next calls, in order.
    pub faults: Mutex<VecDeque<Fault>>,
    /// Calls taken, in order.
    pub runs: Mutex<Vec<(RunRequest, MetadataMap)>>,
    /// Streams that are not dropped yet.
    pub live: Arc<AtomicUsize>,
    pub describes: AtomicUsize,
    /// The tokens of every answer; then the end of the sequence.
    pub answer: Mutex<Vec<u32>>,
    /// Between two tokens.
    pub pace: Mutex<Duration>,
    /// Progress messages before the first token.
    pub prefill: AtomicU32,
    /// Between two of them.
    pub prefill_pace: Mutex<Duration>,
    /// Calls at once that do not yet lead to RESOURCE_EXHAUSTED.
    pub places: AtomicUsize,
    /// Messages that come as one, as they do when a router reads slowly.
    pub together: AtomicUsize,
    /// What it says of itself.
    pub instance: Mutex<Option<cluster::Instance>>,
    /// How many sequences run there, as it says.
    pub running: AtomicU32,
    /// How many may run or wait there, as it says.
    pub told_places: AtomicU32,
    /// Routers that have begun to watch it.
    pub watchers: AtomicUsize,
    /// It says nothing to those who watch it.
    pub stopped: AtomicBool,
}

pub fn files() -> Files {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/goldens/public/qwen2_gqa4_tied_sharded");
    ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"]
        .map(|name| (name.to_owned(), std::fs::read(folder.join(name)).expect(name)))
        .into()
}

pub fn language() -> &'static Language {
    static LANGUAGE: OnceLock<Language> = OnceLock::new();
    LANGUAGE.get_or_init(|| Language::load(&files()).unwrap())
}

struct Live(Arc<AtomicUsize>);

impl Drop for Live {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[derive(Clone)]
struct Door(Arc<Worker>);

impl Worker {
    pub async fn start() -> (Arc<Self>, String) {
        let worker = Arc::new(Self {
            faults: Mutex::default(),
            runs: Mutex::default(),
            live: Arc::default(),
            describes: AtomicUsize::new(0),
            answer: Mutex::new(language().encode_ordinary(crate::TEXT).unwrap()),
            pace: Mutex::default(),
            prefill: AtomicU32::new(0),
            prefill_pace: Mutex::default(),
            places: AtomicUsize::new(usize::MAX),
            together: AtomicUsize::new(1),
            instance: Mutex::default(),
            running: AtomicU32::new(0),
            told_places: AtomicU32::new(1000),
            watchers: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let server = tonic::transport::Server::builder()
            .add_service(WorkerServer::new(Door(worker.clone())))
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(async move { server.await.unwrap() });
        (worker, address)
    }

    pub fn say(&self, text: &str) {
        *self.answer.lock().unwrap() = language().encode_ordinary(text).unwrap();
    }

    pub fn fault(&self, fault: Fault) {
        self.faults.lock().unwrap().push_back(fault);
    }

    pub fn live(&self) -> usize {
        self.live.load(Ordering::SeqCst)
    }

    pub fn run(&self, at: usize) -> RunRequest {
        self.runs.lock().unwrap()[at].0.clone()
    }

    pub fn calls(&self) -> usize {
        self.runs.lock().unwrap().len()
    }
}

fn info(id: u32, position: usize, request: &RunRequest) -> TokenInfo {
    let wanted = request.params.as_ref().unwrap().logprobs;
    let top = wanted.unwrap_or(0);
    let top = (0..top).map(|k| TopLogprob { id: id.wrapping_sub(k), logprob: -0.5 - k as f32 });
    TokenInfo { id, logprob: wanted.map(|_| -(position as f32) - 0.5), top: top.collect() }
}

/// Of a prompt of 1000 tokens.
fn progress(prefilled: u32, running: bool, waiting_ahead: u32) -> RunResponse {
    let progress = Progress { waiting_ahead, prefilled, prompt: 1000, running };
    RunResponse { progress: Some(progress), ..RunResponse::default() }
}

/// The messages of an undisturbed call: one token each.
fn script(worker: &Worker, request: &RunRequest) -> Result<Vec<RunResponse>, Status> {
    let mut answer = worker.answer.lock().unwrap().clone();
    answer.push(END);
    let done = request.generated.len();
    if answer.get(..done) != Some(&request.generated[..]) {
        return Err(Status::invalid_argument("resumed with tokens that were never sent"));
    }
    let mut messages = Vec::new();
    if request.score_prompt {
        let scores = request.prompt.iter().enumerate().skip(1);
        let scores: Vec<_> = scores.map(|(at, &id)| info(id, at, request)).collect();
        for part in scores.chunks(2) {
            messages.push(RunResponse { prompt: part.to_vec(), ..RunResponse::default() });
        }
    }
    for (at, &id) in answer.iter().enumerate().skip(done) {
        let finish = match at + 1 {
            _ if request.stop_ids.contains(&id) => Finish::Stop,
            count if count == request.max_tokens as usize => Finish::Length,
            count if count == answer.len() => Finish::Length,
            _ => Finish::None,
        };
        let tokens = vec![info(id, at, request)];
        messages.push(RunResponse { tokens, finish: finish.into(), ..RunResponse::default() });
        if finish != Finish::None {
            break;
        }
    }
    if let Some(first) = messages.first_mut() {
        first.cached_tokens = 1;
    }
    Ok(messages)
}

fn together(messages: Vec<RunResponse>, count: usize) -> Vec<RunResponse> {
    let merged = messages.chunks(count).map(|messages| {
        messages.iter().cloned().reduce(|mut all, message| {
            all.prompt.extend(message.prompt);
            all.tokens.extend(message.tokens);
            all.finish = message.finish;
            all
        })
    });
    merged.flatten().collect()
}

#[tonic::async_trait]
impl worker_server::Worker for Door {
    type RunStream = Pin<Box<dyn Stream<Item = Result<RunResponse, Status>> + Send>>;
    type DescribeModelStream = tokio_stream::Iter<std::vec::IntoIter<Result<ModelFile, Status>>>;

    type WatchStream = Pin<Box<dyn Stream<Item = Result<WorkerReport, Status>> + Send>>;

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let worker = self.0.clone();
        let instance = worker.instance.lock().unwrap().clone();
        let instance = instance.ok_or_else(|| Status::unavailable("not in a roster"))?;
        worker.watchers.fetch_add(1, Ordering::SeqCst);
        let report = move |instance| {
            let running = worker.running.load(Ordering::SeqCst);
            let places = worker.told_places.load(Ordering::SeqCst);
            let load = Load { running, places, ..Load::default() };
            let report = WorkerReport { instance, load: Some(load), prefixes: None };
            (!worker.stopped.load(Ordering::SeqCst)).then_some(Ok(report))
        };
        let first = tokio_stream::iter(report(instance.encode().unwrap().into()));
        let ticks = IntervalStream::new(tokio::time::interval(Duration::from_millis(20)));
        let beats = ticks.filter_map(move |_| report(Default::default()));
        Ok(Response::new(Box::pin(first.chain(beats))))
    }

    async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
        Err(Status::unimplemented("a script has no end"))
    }

    async fn describe_worker(
        &self,
        _: Request<DescribeWorkerRequest>,
    ) -> Result<Response<DescribeWorkerResponse>, Status> {
        let instance = self.0.instance.lock().unwrap().clone();
        let instance = instance.ok_or_else(|| Status::unavailable("not in a roster"))?;
        let instance = instance.encode().unwrap().into();
        Ok(Response::new(DescribeWorkerResponse { instance }))
    }

    async fn run(&self, request: Request<RunRequest>) -> Result<Response<Self::RunStream>, Status> {
        let worker = self.0.clone();
        let (metadata, _, request) = request.into_parts();
        worker.runs.lock().unwrap().push((request.clone(), metadata));
        if worker.live() >= worker.places.load(Ordering::SeqCst) {
            return Err(Status::resource_exhausted("queue is full"));
        }
        let fault = worker.faults.lock().unwrap().pop_front();
        let mut messages = script(&worker, &request)?;
        messages = together(messages, worker.together.load(Ordering::SeqCst));
        let (mut last, mut silent, mut ahead) = (None, false, 0);
        let mut prefill = worker.prefill.load(Ordering::SeqCst);
        match fault {
            None => {}
            Some(Fault::Refuse(status)) => return Err(status),
            Some(Fault::Mute) => std::future::pending().await,
            Some(Fault::Prefill(count, status)) => {
                messages.clear();
                prefill = count;
                last = Some(status);
            }
            Some(Fault::InLine(status)) => {
                messages.clear();
                ahead = 3;
                last = Some(status);
            }
            Some(Fault::End(count)) => messages.truncate(count),
            Some(Fault::Unfinished(count)) => {
                messages.truncate(count);
                messages.iter_mut().for_each(|message| message.finish = Finish::None.into());
            }
            Some(Fault::Silence(count)) => {
                messages.truncate(count);
                silent = true;
            }
            Some(Fault::Status(count, status)) => {
                messages.truncate(count);
                last = Some(status);
            }
            Some(Fault::Flood) => {
                let tokens = vec![info(1, 0, &request); request.max_tokens as usize + 1];
                messages = vec![RunResponse { tokens, ..RunResponse::default() }];
            }
        }
        worker.live.fetch_add(1, Ordering::SeqCst);
        let live = Live(worker.live.clone());
        let pace = *worker.pace.lock().unwrap();
        let items: Vec<_> = messages.into_iter().map(Ok).chain(last.map(Err)).collect();
        let paced = tokio_stream::iter(items).then(move |item| async move {
            if !pace.is_zero() {
                tokio::time::sleep(pace).await;
            }
            item
        });
        let prefill_pace = *worker.prefill_pace.lock().unwrap();
        let first = tokio_stream::once(Ok(progress(0, false, ahead)));
        let prefill = tokio_stream::iter(1..=prefill).then(move |count| async move {
            tokio::time::sleep(prefill_pace).await;
            Ok(progress(count, true, 0))
        });
        let paced = first.chain(prefill).chain(paced);
        let stream: Self::RunStream = match silent {
            true => Box::pin(paced.chain(tokio_stream::pending())),
            false => Box::pin(paced),
        };
        Ok(Response::new(Box::pin(stream.map(move |item| {
            let _ = &live;
            item
        }))))
    }

    async fn describe_model(
        &self,
        _: Request<DescribeModelRequest>,
    ) -> Result<Response<Self::DescribeModelStream>, Status> {
        self.0.describes.fetch_add(1, Ordering::SeqCst);
        let mut parts = Vec::new();
        for (name, data) in files() {
            for part in data.chunks(5000) {
                parts.push(Ok(ModelFile { name: name.clone(), data: part.to_vec().into() }));
            }
        }
        Ok(Response::new(tokio_stream::iter(parts)))
    }
}
