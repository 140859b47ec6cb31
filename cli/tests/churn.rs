//! A router over workers that fail all the time: every answer comes, whole and right.
//!
//! `LOCKSTEP_CHURN_REQUESTS` and `LOCKSTEP_CHURN_WORKERS` make it longer than in `./dev test`.

use std::{
    env,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use cluster::InMemory;
use proto::v1::{
    GenerateRequest, Sampling, TokenIds, generate_request::Prompt,
    inference_client::InferenceClient,
};
use router::{Router, RouterConfig};
use tokio::{sync::watch, task::JoinSet};
use tonic::transport::Channel;
use worker::{
    GroupConfig, MockConfig, MockFault, MockFaultKind, Worker, WorkerConfig, WorkerError,
    mock_answer,
};

const CLIENTS: usize = 48;
/// Tokens that a worker samples before it fails: a few dozen answers.
const LIFE: std::ops::Range<u64> = 200..2000;
/// Any answer that takes longer has hung.
const DEADLINE: Duration = Duration::from_secs(60);

fn number(name: &str, default: u64) -> u64 {
    env::var(name).ok().map_or(default, |text| text.parse().expect(name))
}

/// The finaliser of MurmurHash3: numbers without a pattern.
fn scattered(x: u64) -> u64 {
    let x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let x = (x ^ (x >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ (x >> 33)
}

/// Keeps one worker there: when it has failed, the next one comes.
async fn supervised(
    seed: u64,
    membership: InMemory,
    deaths: Arc<AtomicUsize>,
    stop: watch::Receiver<bool>,
) {
    let model = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/goldens/public/qwen2_gqa4_tied_sharded");
    for life in 0.. {
        let drawn = scattered(seed << 32 | life);
        let after = LIFE.start + drawn % (LIFE.end - LIFE.start);
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
        let started =
            Worker::start(config, Arc::new(membership.clone()), Box::new(|_| {}), stop.clone());
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_answer_is_lost_or_wrong_while_workers_fail() {
    let requests = number("LOCKSTEP_CHURN_REQUESTS", 2000);
    let workers = number("LOCKSTEP_CHURN_WORKERS", 12);
    let membership = InMemory::new();
    let (stop, stopped) = watch::channel(false);
    let deaths = Arc::new(AtomicUsize::new(0));
    let mut pool = JoinSet::new();
    for seed in 0..workers {
        pool.spawn(supervised(seed, membership.clone(), deaths.clone(), stopped.clone()));
    }
    let any = "127.0.0.1:0".parse().ok();
    let router = Router::start(RouterConfig::new(None, any), Arc::new(membership), stopped);
    let router = router.await.expect("a router");
    let address = format!("http://{}", router.grpc().expect("an address"));

    let next = Arc::new(AtomicU64::new(0));
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        let (next, address) = (next.clone(), address.clone());
        clients.spawn(async move {
            let mut client = InferenceClient::connect(address).await.expect("a router");
            let mut gaps = Vec::new();
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                if at >= requests {
                    return gaps;
                }
                let asked = tokio::time::timeout(DEADLINE, ask(&mut client, at, 512));
                gaps.push(asked.await.unwrap_or_else(|_| panic!("request {at} hangs")));
            }
        });
    }
    let mut gaps: Vec<Duration> = Vec::new();
    while let Some(ended) = clients.join_next().await {
        gaps.extend(ended.expect("every answer whole and right"));
    }
    gaps.sort();
    let deaths = deaths.load(Ordering::Relaxed);
    let (p99, most) = (gaps[gaps.len() * 99 / 100], gaps[gaps.len() - 1]);
    println!(
        "{} answers, {deaths} workers failed, silence: p99 {p99:?}, longest {most:?}",
        gaps.len()
    );
    assert_eq!(gaps.len() as u64, requests);
    assert!(deaths as u64 >= requests / 100, "only {deaths} workers failed");
    stop.send_replace(true);
    router.join().await;
    while pool.join_next().await.is_some() {}
}
