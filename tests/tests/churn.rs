//! A router over workers that fail all the time: every answer comes, whole and right, and the
//! router's memory does not grow. The workers, whose engines compute nothing, and the clients are
//! in this process; the router is a process of its own.

use std::{
    ops::Range,
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use cluster::{Etcd, EtcdOptions, Membership};
use proto::v1::{
    GenerateRequest, Sampling, TokenIds, generate_request::Prompt,
    inference_client::InferenceClient,
};
use tests::{FaultTable, MODEL, Process, etcd, lockstep, seconds};
use tokio::{sync::watch, task::JoinSet};
use tonic::transport::Channel;
use worker::{
    GroupConfig, MockConfig, MockFault, MockFaultKind, Worker, WorkerConfig, WorkerError,
    mock_answer,
};

const CLIENTS: usize = 48;
/// Of the model whose engine is replaced.
const VOCABULARY: usize = 512;
/// Between two looks at the progress.
const LOOK: Duration = Duration::from_millis(50);
/// Any answer that takes longer has hung.
const DEADLINE: Duration = Duration::from_secs(60);

/// The finaliser of MurmurHash3: numbers without a pattern.
fn scattered(x: u64) -> u64 {
    let x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let x = (x ^ (x >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ (x >> 33)
}

/// Keeps one worker there: when it has failed, the next one comes. A worker fails after it has
/// sampled some number of tokens.
async fn supervised(
    seed: u64,
    life: Range<u64>,
    membership: Arc<dyn Membership>,
    deaths: Arc<AtomicUsize>,
    stop: watch::Receiver<bool>,
) {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/public").join(MODEL);
    for number in 0.. {
        let drawn = scattered(seed << 32 | number);
        let after = life.start + drawn % (life.end - life.start);
        let kind = match drawn >> 60 {
            0 => MockFaultKind::Slow,
            _ => MockFaultKind::Fail,
        };
        let mut group = GroupConfig::new(&model);
        group.mock = Some(MockConfig {
            step: Duration::from_millis(1),
            token: Duration::from_micros(2),
            fault: Some(MockFault { kind, after }),
        });
        group.sequences_max = 4;
        group.step_limit = Duration::from_millis(50);
        let mut config = WorkerConfig::new(group);
        config.waiting_max = 4;
        let started = Worker::start(config, membership.clone(), Box::new(|_| {}), stop.clone());
        let ended = started.await.expect("a worker").join().await;
        if *stop.borrow() {
            return;
        }
        assert!(matches!(ended, Err(WorkerError::Group(_))), "{ended:?}");
        deaths.fetch_add(1, Ordering::Relaxed);
    }
}

/// One answer, and the longest silence in it.
async fn ask(client: &mut InferenceClient<Channel>, at: u64, vocab: usize) -> Duration {
    let drawn = scattered(at);
    let prompt: Vec<u32> =
        (0..1 + drawn % 100).map(|i| (scattered(drawn ^ i) % vocab as u64) as u32).collect();
    let (seed, count) = (drawn >> 8, 1 + (drawn >> 40) as u32 % 48);
    let request = GenerateRequest {
        prompt: Some(Prompt::Ids(TokenIds { ids: prompt.clone() })),
        sampling: Some(Sampling {
            max_tokens: Some(count),
            temperature: Some(1.0),
            seed: Some(seed),
            ignore_eos: true,
            ..Sampling::default()
        }),
        ..GenerateRequest::default()
    };
    let mut stream = client.generate(request).await.expect("taken").into_inner();
    let (mut ids, mut last, mut gap) = (Vec::new(), Instant::now(), Duration::ZERO);
    while let Some(message) = stream.message().await.expect("no error") {
        gap = gap.max(last.elapsed());
        last = Instant::now();
        ids.extend(message.tokens.iter().map(|token| token.id));
    }
    let wanted = mock_answer(&prompt, seed, count as usize, vocab);
    assert_eq!(ids, wanted, "request {at}");
    gap
}

/// How much is asked of whom.
///
/// A request in whose first step two workers fail, one after the other, is taken for their cause
/// and given up. Lives of workers are so long that this is no chance to be reckoned with.
struct Scale {
    requests: u64,
    workers: u64,
    /// Tokens that a worker samples before it fails; an answer has 24 on average.
    life: Range<u64>,
}

/// What so many requests came to.
struct Churned {
    gaps: Vec<Duration>,
    deaths: usize,
    took: Duration,
    /// Resident memory of the router after each hundredth of the requests.
    memory: Vec<u64>,
}

impl Churned {
    /// Resident memory of the router after a tenth of the requests and at the end: the middle one
    /// of five readings, since what many broken streams need at once comes and goes.
    fn early_and_last(&self) -> [u64; 2] {
        [7..12, 95..100].map(|readings| {
            let mut some = self.memory[readings].to_vec();
            some.sort_unstable();
            some[2]
        })
    }
}

/// The router, told nothing but errors: a line for each request is not what is tested.
fn router(endpoint: &str) -> Process {
    let mut command = Command::new(lockstep());
    command.args(["router", "--etcd", endpoint, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]);
    Process::started(command.env("LOCKSTEP_LOG", "error"))
}

/// One client after the other asks for answers until there are enough.
async fn client(address: String, next: Arc<AtomicU64>, requests: u64) -> Vec<Duration> {
    let mut client = InferenceClient::connect(address).await.expect("a router");
    let mut gaps = Vec::new();
    loop {
        let at = next.fetch_add(1, Ordering::Relaxed);
        if at >= requests {
            return gaps;
        }
        let asked = tokio::time::timeout(DEADLINE, ask(&mut client, at, VOCABULARY));
        gaps.push(asked.await.unwrap_or_else(|_| panic!("request {at} hangs")));
    }
}

async fn churn(endpoint: &str, Scale { requests, workers, life }: Scale) -> Churned {
    let router = router(endpoint);
    let options = EtcdOptions::new(vec![endpoint.to_owned()], "default");
    let membership: Arc<dyn Membership> = Arc::new(Etcd::connect(options).await.expect("etcd"));
    let (stop, stopped) = watch::channel(false);
    let deaths = Arc::new(AtomicUsize::new(0));
    let mut pool = JoinSet::new();
    for seed in 0..workers {
        let (membership, deaths) = (membership.clone(), deaths.clone());
        pool.spawn(supervised(seed, life.clone(), membership, deaths, stopped.clone()));
    }
    let address = format!("http://{}", router.address("grpc"));
    let (began, next) = (Instant::now(), Arc::new(AtomicU64::new(0)));
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        clients.spawn(client(address.clone(), next.clone(), requests));
    }
    let mut memory = Vec::new();
    let mut gaps: Vec<Duration> = Vec::new();
    while !clients.is_empty() {
        tokio::select! {
            Some(ended) = clients.join_next() => {
                gaps.extend(ended.expect("every answer whole and right"));
            }
            () = tokio::time::sleep(LOOK) => {}
        }
        let done = next.load(Ordering::Relaxed).min(requests);
        while (memory.len() as u64 + 1) * requests <= done * 100 {
            memory.push(router.resident());
            if memory.len() % 10 == 0 {
                let (took, bytes) = (began.elapsed(), memory[memory.len() - 1]);
                println!("{} % after {took:?}, the router has {bytes} bytes", memory.len());
            }
        }
    }
    let took = began.elapsed();
    gaps.sort();
    stop.send_replace(true);
    while pool.join_next().await.is_some() {}
    Churned { gaps, deaths: deaths.load(Ordering::Relaxed), took, memory }
}

async fn churned(scale: Scale, deaths_min: usize) -> Option<Churned> {
    let (_etcd, endpoint, _data) = etcd()?;
    let requests = scale.requests;
    let churned = churn(&endpoint, scale).await;
    let Churned { gaps, deaths, took, .. } = &churned;
    let (p99, most) = (gaps[gaps.len() * 99 / 100], gaps[gaps.len() - 1]);
    println!(
        "{} answers in {took:?}, {deaths} workers failed, silence: p99 {p99:?}, longest {most:?}",
        gaps.len()
    );
    assert_eq!(gaps.len() as u64, requests);
    assert!(*deaths >= deaths_min, "only {deaths} workers failed");
    Some(churned)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_answer_is_lost_or_wrong_while_workers_fail() {
    churned(Scale { requests: 2000, workers: 12, life: 400..4000 }, 10).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes an hour: ./dev soak churn"]
async fn soak_churn_of_a_million_requests_does_not_grow_the_router() {
    let scale = Scale { requests: 1_000_000, workers: 100, life: 10_000..30_000 };
    let (requests, workers) = (scale.requests, scale.workers);
    let Some(churned) = churned(scale, 500).await else { return };
    let [early, last] = churned.early_and_last();
    let Churned { gaps, deaths, took, .. } = churned;
    let columns = [
        "requests",
        "workers",
        "of which failed",
        "time",
        "failed requests",
        "silence, 99 %",
        "router's memory after a tenth",
        "at the end",
    ];
    let mut table = FaultTable::with("churn", &columns);
    let [requests, workers, deaths] =
        [requests, workers, deaths as u64].map(|count| count.to_string());
    let [early_mb, last_mb] = [early, last].map(|bytes| format!("{:.1} MB", bytes as f64 / 1e6));
    let (took, silence) = (seconds(took), seconds(gaps[gaps.len() * 99 / 100]));
    table.cells(&[&requests, &workers, &deaths, &took, "0", &silence, &early_mb, &last_mb]);
    table.finish();
    assert!(last as f64 <= 1.2 * early as f64, "{early} bytes after a tenth, {last} at the end");
}
