//! A worker that follows the protocol on the stopped clock, until it is made to fail.

use super::{Draw, net::Net};
use cluster::Instance;
use proto::v1::{
    DescribeModelRequest, DescribeWorkerRequest, DescribeWorkerResponse, DrainRequest,
    DrainResponse, Finish, Load, ModelFile, Progress, RunRequest, RunResponse, TokenInfo,
    WatchRequest, WorkerReport,
    worker_server::{self, WorkerServer},
};
use std::{
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::{
    sync::{Semaphore, mpsc, watch},
    time::{interval, sleep, timeout},
};
use tokio_stream::{
    Stream, StreamExt, iter,
    wrappers::{IntervalStream, ReceiverStream, UnboundedReceiverStream},
};
use tonic::{Request, Response, Status, transport::Server};

/// A prompt with this token ends whoever runs it.
pub const POISON: u32 = 666_666;
const TOLD: Duration = Duration::from_secs(1);

/// The token of an answer at a position; a fingerprint is a model of its own.
pub fn token(fingerprint: &str, prompt: &[u32], position: usize) -> u32 {
    let mut draw = Draw::new(fingerprint.len() as u64 ^ u64::from(fingerprint.as_bytes()[0]));
    for &id in prompt.iter().chain([&(position as u32)]) {
        draw = Draw::new(draw.next() ^ u64::from(id));
    }
    (draw.next() % 1000) as u32
}

/// The number that a worker gives with a token.
pub fn logprob(token: u32) -> f32 {
    -(token as f32) / 8.0
}

/// How a worker is made.
#[derive(Clone)]
pub struct Make {
    pub instance: Instance,
    pub step: Duration,
    /// Sequences that run, and that run or wait.
    pub places: (usize, usize),
}

pub struct Worker {
    pub make: Make,
    pub cable: Arc<super::net::Cable>,
    /// Sequences that are not over.
    pub live: AtomicUsize,
    pub draining: AtomicBool,
    pub slow: AtomicBool,
    /// Its group is lost.
    pub failed: watch::Sender<bool>,
    running: Semaphore,
    violations: Arc<Mutex<Vec<String>>>,
}

#[derive(Clone)]
struct Door(Arc<Worker>);

struct Live(Arc<Worker>);

impl Drop for Live {
    fn drop(&mut self) {
        self.0.live.fetch_sub(1, SeqCst);
    }
}

impl Worker {
    pub fn start(net: &Net, make: Make, violations: &Arc<Mutex<Vec<String>>>) -> Arc<Self> {
        let authority = make.instance.address.trim_start_matches("http://");
        let (cable, incoming) = net.listen(authority);
        let worker = Arc::new(Self {
            cable,
            live: AtomicUsize::new(0),
            draining: AtomicBool::new(false),
            slow: AtomicBool::new(false),
            failed: watch::Sender::new(false),
            running: Semaphore::new(make.places.0),
            violations: violations.clone(),
            make,
        });
        let server = Server::builder()
            .add_service(WorkerServer::new(Door(worker.clone())))
            .serve_with_incoming(UnboundedReceiverStream::new(incoming));
        tokio::spawn(server);
        worker
    }

    /// Until its group is lost.
    pub async fn lost(&self) {
        let mut failed = self.failed.subscribe();
        let _told = failed.wait_for(|&failed| failed).await;
    }

    fn load(&self) -> Load {
        let (running, places) = self.make.places;
        let live = self.live.load(SeqCst);
        Load {
            running: live.min(running) as u32,
            waiting: live.saturating_sub(running) as u32,
            places: places as u32,
            ..Load::default()
        }
    }

    /// A step's time, with a word each second as long as it lasts.
    async fn step(&self, running: bool, sender: &mpsc::Sender<Result<RunResponse, Status>>) {
        let factor = if self.slow.load(SeqCst) { 100 } else { 1 };
        let mut left = self.make.step * factor;
        while left > TOLD {
            sleep(TOLD).await;
            left -= TOLD;
            let _gone = sender.send(Ok(progress(running))).await;
        }
        sleep(left).await;
    }

    async fn answer(
        &self,
        request: &RunRequest,
        sender: &mpsc::Sender<Result<RunResponse, Status>>,
    ) {
        let _gone = sender.send(Ok(progress(false))).await;
        let place = loop {
            if let Ok(place) = timeout(TOLD, self.running.acquire()).await {
                break place;
            }
            let _gone = sender.send(Ok(progress(false))).await;
        };
        let _gone = sender.send(Ok(progress(true))).await;
        for _ in 0..=request.prompt.len() / 16 {
            self.step(true, sender).await;
        }
        if request.prompt.contains(&POISON) {
            self.failed.send_replace(true);
        }
        let fingerprint = &self.make.instance.fingerprint;
        if request.score_prompt {
            for part in request.prompt[1..].chunks(16) {
                self.step(true, sender).await;
                let prompt = part.iter().map(|&id| info(id)).collect();
                let scores = RunResponse { prompt, cached_tokens: 1, ..RunResponse::default() };
                let _gone = sender.send(Ok(scores)).await;
            }
        }
        let mut message = RunResponse { cached_tokens: 1, ..RunResponse::default() };
        for at in request.generated.len()..request.max_tokens as usize {
            self.step(true, sender).await;
            let id = token(fingerprint, &request.prompt, request.prompt.len() + at);
            message.tokens.push(info(id));
            if request.stop_ids.contains(&id) {
                message.set_finish(Finish::Stop);
            } else if at + 1 == request.max_tokens as usize {
                message.set_finish(Finish::Length);
            } else if id.is_multiple_of(4) {
                continue; // Together with the next.
            }
            let ends = message.finish() != Finish::None;
            let message = std::mem::take(&mut message);
            if sender.send(Ok(message)).await.is_err() || ends {
                break;
            }
        }
        drop(place);
    }
}

fn info(id: u32) -> TokenInfo {
    TokenInfo { id, logprob: Some(logprob(id)), top: Vec::new() }
}

fn progress(running: bool) -> RunResponse {
    let waiting_ahead = u32::from(!running);
    let progress = Progress { running, waiting_ahead, prefilled: 0, prompt: 100 };
    RunResponse { progress: Some(progress), ..RunResponse::default() }
}

#[tonic::async_trait]
impl worker_server::Worker for Door {
    type RunStream = ReceiverStream<Result<RunResponse, Status>>;
    type DescribeModelStream = tokio_stream::Empty<Result<ModelFile, Status>>;
    type WatchStream = Pin<Box<dyn Stream<Item = Result<WorkerReport, Status>> + Send>>;

    async fn run(&self, request: Request<RunRequest>) -> Result<Response<Self::RunStream>, Status> {
        let (worker, request) = (self.0.clone(), request.into_inner());
        if worker.draining.load(SeqCst) || *worker.failed.borrow() {
            return Err(Status::unavailable("it drains, or its group is lost"));
        }
        if worker.live.load(SeqCst) >= worker.make.places.1 {
            return Err(Status::resource_exhausted("its queue is full"));
        }
        let of = &worker.make.instance.fingerprint;
        let start = request.prompt.len();
        let known = (0..request.generated.len()).map(|at| token(of, &request.prompt, start + at));
        if !known.eq(request.generated.iter().copied()) {
            let wrong = format!("{} resumes with tokens it never sent", request.request_id);
            worker.violations.lock().unwrap().push(wrong);
        }
        worker.live.fetch_add(1, SeqCst);
        let live = Live(worker.clone());
        let (sender, receiver) = mpsc::channel(4);
        tokio::spawn(async move {
            tokio::select! {
                () = sender.closed() => {}
                () = worker.lost() => {
                    let _gone = sender.send(Err(Status::unavailable("its group is lost"))).await;
                }
                () = worker.answer(&request, &sender) => {}
            }
            drop(live);
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let worker = self.0.clone();
        let instance = worker.make.instance.encode().expect("short").into();
        let first = WorkerReport { instance, load: Some(worker.load()), prefixes: None };
        let ticks = IntervalStream::new(interval(Duration::from_millis(proto::WORKER_BEAT_MS)));
        let beats = ticks.map(move |_| {
            let load = Some(worker.load());
            Ok(WorkerReport { load, ..WorkerReport::default() })
        });
        Ok(Response::new(Box::pin(iter([Ok(first)]).chain(beats))))
    }

    async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
        Err(Status::unimplemented("drained by the schedule"))
    }

    async fn describe_worker(
        &self,
        _: Request<DescribeWorkerRequest>,
    ) -> Result<Response<DescribeWorkerResponse>, Status> {
        Err(Status::unimplemented("the roster is there"))
    }

    async fn describe_model(
        &self,
        _: Request<DescribeModelRequest>,
    ) -> Result<Response<Self::DescribeModelStream>, Status> {
        Ok(Response::new(tokio_stream::empty()))
    }
}
