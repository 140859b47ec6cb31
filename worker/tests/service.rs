//! A worker over a fake group: what clients, slow readers, failures and drains meet at the service.

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
    Engine, Group, GroupConfig, Metrics, ModelInfo, Worker, WorkerConfig, WorkerError, WorkerHandle,
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
        step_limit,
        ..WorkerConfig::new(GroupConfig::new("fake"))
    };
    let group = Group { info: info(), executor };
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
    while let Some(update) = timeout(PATIENCE, fast.next()).await.expect("in time") {
        read += update.unwrap().tokens.len();
    }
    assert_eq!(read, 400);
    let both = |stats: &engine::Stats| stats.finished == 2;
    timeout(PATIENCE, engine.stats().wait_for(both)).await.expect("both end").unwrap();
    let update = slow.next().await.unwrap().unwrap();
    let ids: Vec<u32> = update.tokens.iter().map(|token| token.token).collect();
    assert_eq!(ids, (20..320).collect::<Vec<_>>(), "all of it at once");
    assert_eq!(update.end, Some(engine::End::Length));
    assert!(slow.next().await.is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_group_fails_its_streams_and_leaves_the_roster() {
    for panics in [false, true] {
        let w = world(8).await;
        w.levers.step_micros.store(1000, Ordering::SeqCst);
        let mut first = w.run(request(10, 400)).await.unwrap();
        let second = w.run(request(10, 400)).await.unwrap();
        assert!(first.message().await.unwrap().is_some());
        assert_eq!(w.roster.borrow().len(), 1);
        let lever = if panics { &w.levers.panic } else { &w.levers.fail };
        lever.store(true, Ordering::SeqCst);
        for stream in [first, second] {
            let status = read(stream).await.err().expect("an error, not an end");
            assert_eq!(status.code(), Code::Unavailable, "{status}");
            let told = ["rank 1 ended", "a test said so"];
            assert!(told.iter().any(|told| status.message().contains(told)), "{status}");
        }
        let end = timeout(PATIENCE, w.handle.join()).await.expect("in time");
        assert!(matches!(end, Err(WorkerError::Group(_))), "{end:?}");
        assert!(w.roster.borrow().is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn draining_finishes_what_runs_and_takes_nothing_new() {
    let mut w = world(8).await;
    w.levers.step_micros.store(2000, Ordering::SeqCst);
    let stream = w.run(request(10, 100)).await.unwrap();
    let reader = tokio::spawn(read(stream));
    assert_eq!(w.roster.borrow()[0].state, State::Ready);
    w.shutdown.send(true).unwrap();
    let draining = w.roster.wait_for(|roster| {
        roster.first().is_some_and(|instance| instance.state == State::Draining)
    });
    drop(timeout(PATIENCE, draining).await.expect("in time").unwrap());
    // The roster hears of it first; the refusal follows within the same task.
    let refused = timeout(PATIENCE, async {
        loop {
            match w.run(request(4, 1)).await {
                Ok(stream) => drop(read(stream).await),
                Err(status) => break status,
            }
        }
    });
    assert_eq!(refused.await.expect("in time").code(), Code::Unavailable);
    let answer = reader.await.unwrap().unwrap();
    assert_eq!((answer.ids.len(), answer.finish), (100, v1::Finish::Length));
    timeout(PATIENCE, w.handle.join()).await.expect("in time").unwrap();
    assert!(w.roster.borrow().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn draining_cuts_what_does_not_end() {
    let w = world(8).await;
    w.levers.step_micros.store(20_000, Ordering::SeqCst);
    let stream = w.run(request(10, 400)).await.unwrap();
    let reader = tokio::spawn(read(stream));
    let start = Instant::now();
    let end = timeout(PATIENCE, w.handle.drain(Duration::from_millis(200))).await;
    let end = end.expect("in time");
    assert!(matches!(end, Err(WorkerError::DrainLimit { streams: 1, .. })), "{end:?}");
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!(reader.await.unwrap().err().expect("cut").code(), Code::Unavailable);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_load_in_the_roster_follows_the_engine() {
    let mut w = world(8).await;
    w.levers.step_micros.store(1000, Ordering::SeqCst);
    let stream = w.run(request(100, 400)).await.unwrap();
    let busy = w.roster.wait_for(|roster| roster[0].load.running == 1);
    assert!(timeout(PATIENCE, busy).await.expect("in time").unwrap()[0].load.blocks_free < BLOCKS);
    drop(stream);
    let calm = w.roster.wait_for(|roster| roster[0].load.running == 0);
    let calm = timeout(PATIENCE, calm).await.expect("in time").unwrap()[0].load;
    assert_eq!(calm.blocks_free, BLOCKS);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_worker_tells_its_ranks_that_it_lives() {
    let w = world(8).await;
    tokio::time::sleep(Duration::from_millis(1300)).await;
    assert!(w.levers.idles.load(Ordering::SeqCst) >= 1);
    assert_eq!(w.levers.steps.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_models_files_arrive_whole() {
    let w = world(8).await;
    let mut client = w.client.clone();
    let mut stream = client.describe_model(v1::DescribeModelRequest {}).await.unwrap().into_inner();
    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    while let Some(part) = timeout(PATIENCE, stream.message()).await.unwrap().unwrap() {
        assert!(part.data.len() <= 1 << 20);
        files.entry(part.name).or_default().extend(&part.data);
    }
    assert_eq!(files, w.handle.info().text_files);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_clients_that_vanish_leave_nothing_behind() {
    let w = world(64).await;
    w.levers.step_micros.store(200, Ordering::SeqCst);
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..100u64 {
        let mut worker = w.client.clone();
        clients.spawn(async move {
            let asked = request(1 + (client as usize * 7) % 90, 200);
            let running = async {
                let mut stream = worker.run(asked).await?.into_inner();
                while stream.message().await?.is_some() {}
                Ok::<(), Status>(())
            };
            // Most vanish somewhere on the way.
            drop(timeout(Duration::from_millis((client * 13) % 300), running).await);
        });
    }
    while clients.join_next().await.is_some() {}
    let sequences = ["sequences_running", "sequences_waiting"];
    w.until("none is left", |figure| sequences.map(figure) == [0, 0]).await;
    w.until("all free", |figure| figure("blocks_free") == BLOCKS).await;
    assert_eq!(read(w.run(request(4, 3)).await.unwrap()).await.unwrap().ids, [4, 5, 6]);
}

/// A step that lasts long enough for everything that a test does meanwhile.
const LONG_STEP_MICROS: u64 = 4_000_000;

impl World {
    /// Starts a sequence whose step lasts long.
    async fn in_a_long_step(&self) -> Streaming<v1::RunResponse> {
        self.levers.step_micros.store(LONG_STEP_MICROS, Ordering::SeqCst);
        let stream = self.run(request(100, 4)).await.unwrap();
        let started = || self.levers.steps.load(Ordering::SeqCst) == 1;
        for _ in 0..1000 {
            if started() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        assert!(started(), "the step began");
        stream
    }

    fn still_in_the_step(&self) -> bool {
        self.levers.steps_done.load(Ordering::SeqCst) == 0
    }
}

async fn progress(stream: &mut Streaming<v1::RunResponse>) -> v1::Progress {
    let message = timeout(PATIENCE, stream.message()).await.expect("in time").unwrap();
    message.expect("a message").progress.expect("progress alone")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_step_keeps_nobody_waiting_for_an_answer() {
    let w = world(2).await;
    let _busy = w.in_a_long_step().await;
    // Three places are open and two may wait.
    let mut accepted = Vec::new();
    for _ in 0..5 {
        accepted.push(w.run(request(4, 1)).await.unwrap());
    }
    assert_eq!(w.refused(request(4, 1)).await.code(), Code::ResourceExhausted);
    assert_eq!(w.refused(request(512, 4)).await.code(), Code::InvalidArgument);
    for (ahead, stream) in accepted.iter_mut().enumerate() {
        let told = progress(stream).await;
        let wanted = v1::Progress { waiting_ahead: ahead as u32, prompt: 4, ..Default::default() };
        assert_eq!(told, wanted);
    }
    assert!(w.still_in_the_step(), "all of it within one step");
    w.levers.step_micros.store(0, Ordering::SeqCst);
    for stream in accepted {
        assert_eq!(read(stream).await.unwrap().ids, [4]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn progress_is_told_while_there_is_nothing_else_to_say() {
    let w = world(8).await;
    let mut stream = w.in_a_long_step().await;
    let first = progress(&mut stream).await;
    assert_eq!((first.prefilled, first.prompt), (0, 100));
    let second = progress(&mut stream).await;
    assert!(second.running && second.prefilled == 0, "{second:?}");
    assert!(w.still_in_the_step());
    // 64 tokens are computed in the first step, 36 in the second, which brings a token.
    let mut told = Vec::new();
    let token = loop {
        let message = timeout(PATIENCE, stream.message()).await.expect("in time").unwrap().unwrap();
        match message.progress {
            Some(progress) => told.push(progress.prefilled),
            None => break message,
        }
    };
    assert!(told.contains(&64) && told.is_sorted(), "{told:?}");
    assert_eq!(token.tokens[0].id, 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_hangs_ends_its_worker() {
    let w = world_with(8, Duration::from_secs(1)).await;
    let stream = w.in_a_long_step().await;
    let end = timeout(PATIENCE, w.handle.join()).await.expect("in time");
    let reason = end.expect_err("a failure").to_string();
    assert!(reason.contains("hangs") && reason.contains("--step-limit-seconds"), "{reason}");
    assert!(w.roster.borrow().is_empty());
    assert!(read(stream).await.is_err(), "its streams end without a finish");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_the_loop_never_saw_fail_with_the_group() {
    let w = world(8).await;
    let busy = w.in_a_long_step().await;
    let late = w.run(request(4, 1)).await.unwrap();
    w.levers.fail.store(true, Ordering::SeqCst);
    for stream in [busy, late] {
        let status = read(stream).await.err().expect("an error, not an end");
        assert_eq!(status.code(), Code::Unavailable, "{status}");
        assert!(status.message().contains("rank 1 ended"), "{status}");
    }
}
