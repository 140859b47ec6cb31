//! A worker over a fake group: what clients, slow readers, failures and drains meet at the service.

mod ends;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use cluster::{InMemory, Membership, Roster, State};
use cpu::Precision;
use engine::plan::{Executor, ExecutorError, StepOutput, StepPlan, TokenLogprob, Want};
use proto::v1::{self, worker_client::WorkerClient};
use tokio::{sync::watch, time::timeout};
use tonic::{Code, Status, Streaming, transport::Channel};
use worker::{
    Engine, Group, GroupConfig, Metrics, ModelInfo, News, Worker, WorkerConfig, WorkerError,
    WorkerHandle,
};

const VOCAB: usize = 1000;
const EOS: u32 = 9;
const BLOCKS: usize = 64;
const PATIENCE: Duration = Duration::from_secs(10);

/// Levers that a test pulls on a running fake group.
#[derive(Default)]
struct Levers {
    step_micros: AtomicU64,
    fail: AtomicBool,
    panic: AtomicBool,
    steps: AtomicU64,
    steps_done: AtomicU64,
    idles: AtomicU64,
}

/// Samples the sequence's length as the next token; checks that the plans are numbered.
struct Fake {
    levers: Arc<Levers>,
    expected: u64,
    output: Option<StepOutput>,
}

fn known(token: u32) -> TokenLogprob {
    TokenLogprob { token, logprob: Some(-1.0), top: vec![(token, -1.0)] }
}

impl Executor for Fake {
    fn depth(&self) -> usize {
        1
    }

    fn launch(&mut self, plan: StepPlan) -> Result<(), ExecutorError> {
        assert_eq!(plan.number, self.expected);
        self.expected += 1;
        let mut output = StepOutput { number: plan.number, ..StepOutput::default() };
        for chunk in &plan.chunks {
            if let Want::Score { .. } = chunk.want {
                let following = chunk.tokens.known()[1..].iter().copied().chain(chunk.next);
                output.scored.push((chunk.sequence, following.map(known).collect()));
            }
            if matches!(chunk.want, Want::Sample | Want::Score { sample: true }) {
                output.sampled.push((chunk.sequence, known(chunk.end() as u32)));
            }
        }
        self.output = Some(output);
        Ok(())
    }

    fn finish(&mut self) -> Result<StepOutput, ExecutorError> {
        self.levers.steps.fetch_add(1, Ordering::SeqCst);
        std::thread::sleep(Duration::from_micros(self.levers.step_micros.load(Ordering::SeqCst)));
        self.levers.steps_done.fetch_add(1, Ordering::SeqCst);
        assert!(!self.levers.panic.load(Ordering::SeqCst), "a test said so");
        if self.levers.fail.load(Ordering::SeqCst) {
            return Err(ExecutorError("rank 1 ended".into()));
        }
        self.output.take().ok_or_else(|| ExecutorError("nothing launched".into()))
    }

    fn idle(&mut self) -> Result<(), ExecutorError> {
        self.levers.idles.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

struct World {
    handle: WorkerHandle,
    client: WorkerClient<Channel>,
    levers: Arc<Levers>,
    roster: watch::Receiver<Roster>,
    shutdown: watch::Sender<bool>,
}

async fn world(waiting_max: usize) -> World {
    world_with(waiting_max, Duration::from_secs(600)).await
}

fn info() -> ModelInfo {
    ModelInfo {
        name: "fake".into(),
        fingerprint: "f".into(),
        vocab: VOCAB,
        context_max: 512,
        ranks: 1,
        device: "none".into(),
        threads_per_rank: 1,
        isa: "none",
        precision: Precision::Exact,
        blocks: BLOCKS,
        kv_bytes: 0,
        weights_bytes: 0,
        prefix_reuse_max: None,
        step_tokens_max: 64,
        step_target: None,
        step_deadline: None,
        sequences_max: 4,
        text_files: BTreeMap::from([
            ("empty.json".to_owned(), Vec::new()),
            ("tokenizer.json".to_owned(), (0..3_000_000).map(|at| at as u8).collect()),
        ]),
    }
}

async fn world_with(waiting_max: usize, step_limit: Duration) -> World {
    let levers = Arc::new(Levers::default());
    let executor = Box::new(Fake { levers: Arc::clone(&levers), expected: 0, output: None });
    let membership = Arc::new(InMemory::new());
    let roster = membership.roster();
    let (shutdown, asked) = watch::channel(false);
    let config = WorkerConfig {
        waiting_max,
        drain_limit: PATIENCE,
        ..WorkerConfig::new(GroupConfig { step_limit, ..GroupConfig::new("fake") })
    };
    let group = Group { info: info(), executor, epoch: Arc::default() };
    let handle = Worker::start_with(config, group, membership, asked).await.unwrap();
    let client = WorkerClient::connect(format!("http://{}", handle.addr())).await.unwrap();
    World { handle, client, levers, roster, shutdown }
}

fn params() -> v1::SamplingParams {
    v1::SamplingParams { top_p: 1.0, repetition_penalty: 1.0, ..Default::default() }
}

fn request(prompt: usize, max_tokens: u32) -> v1::RunRequest {
    v1::RunRequest {
        request_id: "test".into(),
        prompt: vec![1; prompt],
        params: Some(params()),
        max_tokens,
        stop_ids: vec![EOS],
        ..Default::default()
    }
}

struct Received {
    ids: Vec<u32>,
    scored: Vec<u32>,
    finish: v1::Finish,
    messages: usize,
}

async fn read(mut stream: Streaming<v1::RunResponse>) -> Result<Received, Status> {
    let mut answer =
        Received { ids: vec![], scored: vec![], finish: v1::Finish::None, messages: 0 };
    while let Some(message) = timeout(PATIENCE, stream.message()).await.expect("in time")? {
        assert_eq!(answer.finish, v1::Finish::None, "nothing after the finish");
        answer.messages += 1;
        answer.finish = message.finish();
        answer.scored.extend(message.prompt.iter().map(|token| token.id));
        answer.ids.extend(message.tokens.iter().map(|token| token.id));
    }
    Ok(answer)
}

impl World {
    async fn run(&self, request: v1::RunRequest) -> Result<Streaming<v1::RunResponse>, Status> {
        let mut client = self.client.clone();
        let response = timeout(PATIENCE, client.run(request)).await.expect("in time");
        Ok(response?.into_inner())
    }

    async fn refused(&self, request: v1::RunRequest) -> Status {
        self.run(request).await.expect_err("a refusal")
    }

    /// Waits until the figures hold, by their names in `/metrics`.
    async fn until(&self, what: &str, holds: impl Fn(&dyn Fn(&str) -> usize) -> bool) {
        let start = Instant::now();
        loop {
            let (_, page) = self.handle.metrics().exposition(None).unwrap();
            let figure = |name: &str| {
                let line = format!("lockstep_worker_{name}{{model=\"fake\"}} ");
                let value = page.lines().find_map(|at| at.strip_prefix(&line));
                value.unwrap_or_else(|| panic!("no {name}")).parse().unwrap()
            };
            if holds(&figure) {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "{what}: {page}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_come_in_order_and_end_with_the_reason() {
    let w = world(8).await;
    let answer = read(w.run(request(20, 5)).await.unwrap()).await.unwrap();
    assert_eq!((answer.ids, answer.finish), (vec![20, 21, 22, 23, 24], v1::Finish::Length));
    let answer = read(w.run(request(5, 50)).await.unwrap()).await.unwrap();
    assert_eq!((answer.ids, answer.finish), (vec![5, 6, 7, 8, EOS], v1::Finish::Stop));
    let resumed = v1::RunRequest { generated: vec![5, 6], ..request(5, 4) };
    let answer = read(w.run(resumed).await.unwrap()).await.unwrap();
    assert_eq!((answer.ids, answer.finish), (vec![7, 8], v1::Finish::Length));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_is_scored_before_the_answer() {
    let w = world(8).await;
    let prompt: Vec<u32> = (100..300).collect();
    let scored = v1::RunRequest { prompt, score_prompt: true, ..request(1, 2) };
    let answer = read(w.run(scored.clone()).await.unwrap()).await.unwrap();
    assert_eq!(answer.scored, (101..300).collect::<Vec<_>>());
    assert_eq!(answer.ids, [200, 201]);
    let none = v1::RunRequest { max_tokens: 0, ..scored };
    let answer = read(w.run(none).await.unwrap()).await.unwrap();
    assert_eq!((answer.scored.len(), answer.ids.len()), (199, 0));
    assert_eq!(answer.finish, v1::Finish::Length);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_makes_no_sense_is_refused_by_name() {
    let w = world(8).await;
    let with = |change: fn(&mut v1::SamplingParams)| {
        let mut params = params();
        change(&mut params);
        v1::RunRequest { params: Some(params), ..request(4, 4) }
    };
    let cases = [
        ("prompt", request(0, 4)),
        ("1000", v1::RunRequest { prompt: vec![VOCAB as u32], ..request(1, 4) }),
        ("generated", v1::RunRequest { generated: vec![u32::MAX], ..request(1, 4) }),
        ("max_tokens", v1::RunRequest { generated: vec![1; 5], ..request(1, 4) }),
        ("params", v1::RunRequest { params: None, ..request(1, 4) }),
        ("context", request(512, 4)),
        ("temperature", with(|p| p.temperature = -0.5)),
        ("temperature", with(|p| p.temperature = f32::NAN)),
        ("temperature", with(|p| p.temperature = f32::INFINITY)),
        ("top_p", with(|p| p.top_p = 0.0)),
        ("top_p", with(|p| p.top_p = 1.5)),
        ("min_p", with(|p| p.min_p = -0.1)),
        ("repetition_penalty", with(|p| p.repetition_penalty = 0.0)),
        ("presence_penalty", with(|p| p.presence_penalty = f32::NAN)),
        ("frequency_penalty", with(|p| p.frequency_penalty = f32::NEG_INFINITY)),
        ("logit_bias", with(|p| p.logit_bias = [(1, f32::NAN)].into())),
        ("logit_bias", with(|p| p.logit_bias = [(5000, 1.0)].into())),
        ("logprobs", with(|p| p.logprobs = Some(100_000))),
    ];
    for (name, request) in cases {
        let status = w.refused(request).await;
        assert_eq!(status.code(), Code::InvalidArgument, "{name}: {status}");
        assert!(status.message().contains(name), "{name}: {status}");
    }
    assert!(read(w.run(request(4, 1)).await.unwrap()).await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_stream_frees_its_blocks() {
    let w = world(8).await;
    w.levers.step_micros.store(1000, Ordering::SeqCst);
    let mut stream = w.run(request(100, 400)).await.unwrap();
    assert!(stream.message().await.unwrap().is_some());
    w.until("it runs", |figure| figure("blocks_free") < BLOCKS).await;
    drop(stream);
    w.until("it is cancelled", |figure| figure("requests_cancelled_total") == 1).await;
    w.until("all free", |figure| figure("blocks_free") == BLOCKS).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_refuses_with_advice() {
    let w = world(2).await;
    w.levers.step_micros.store(2000, Ordering::SeqCst);
    let mut streams = Vec::new();
    let refused = loop {
        match w.run(request(4, 400)).await {
            Ok(stream) => streams.push(stream),
            Err(status) => break status,
        }
        assert!(streams.len() <= 4 + 2, "four run and two wait");
    };
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.metadata().get("retry-after-ms").is_some());
    drop(streams);
    w.until("all free", |figure| figure("blocks_free") == BLOCKS).await;
    let (_, text) = w.handle.metrics().exposition(None).unwrap();
    assert!(text.contains("lockstep_worker_requests_rejected_total{model=\"fake\"} 1"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_sleeps_stalls_nobody_and_misses_nothing() {
    // On an engine itself: no transport that would read ahead.
    let levers = Arc::new(Levers::default());
    levers.step_micros.store(100, Ordering::SeqCst);
    let executor = Box::new(Fake { levers, expected: 0, output: None });
    let metrics = Arc::new(Metrics::new("fake"));
    let engine = Engine::start(executor, info().scheduler_config(8), metrics).unwrap();
    let request_of = |max_tokens| engine::Request {
        prompt: vec![1; 20],
        generated: vec![],
        params: engine::plan::SamplingParams::GREEDY,
        max_tokens,
        stop_ids: vec![],
        score_prompt: false,
    };
    let mut slow = engine.run(request_of(300)).unwrap();
    let mut fast = engine.run(request_of(400)).unwrap();
    let mut read = 0;
    while let Some(news) = timeout(PATIENCE, fast.next()).await.expect("in time") {
        match news.unwrap() {
            News::Update(update) => read += update.tokens.len(),
            News::Admitted => assert_eq!(read, 0, "told before the first token"),
        }
    }
    assert_eq!(read, 400);
    let both = |stats: &engine::Stats| stats.finished == 2;
    timeout(PATIENCE, engine.stats().wait_for(both)).await.expect("both end").unwrap();
    let News::Update(update) = slow.next().await.unwrap().unwrap() else { panic!("no update") };
    let ids: Vec<u32> = update.tokens.iter().map(|token| token.token).collect();
    assert_eq!(ids, (20..320).collect::<Vec<_>>(), "all of it at once");
    assert_eq!(update.end, Some(engine::End::Length));
    assert!(slow.next().await.is_none());
}
