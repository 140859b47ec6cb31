//! Slow is not broken, on real processes: long prompts on one thread each, in steps and queues that
//! last longer than the router lets a worker be silent, are answered without a failure and without
//! a restart.

use std::{
    io::{Read, Write},
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tests::{Process, etcd, exchange, metric, request, wait_for};

const DEADLINE: Duration = Duration::from_secs(60);
const PATIENCE: Duration = Duration::from_secs(300);
/// Shorter than the prefill of one prompt.
const SILENCE_SECONDS: &str = "3";
const WORKERS: usize = 2;
const PROMPTS: usize = 4;
/// Each of these numbers is three tokens or four.
const WORDS: usize = 350;

/// One that shares no prefix with another client's.
fn prompt(client: usize) -> String {
    let words = (0..WORDS).map(|at| (at * 7919 + client * 104_729) % 900 + 100);
    format!("{client} {}", words.map(|word| format!("{word} ")).collect::<String>())
}

/// A streamed completion: all of its bytes, and how long the whole took.
fn stream(address: &str, model: &str, prompt: &str) -> (String, Duration) {
    let body = json!({"model": model, "prompt": prompt, "max_tokens": 4, "ignore_eos": true,
        "stream": true, "stream_options": {"include_progress": true}});
    let began = Instant::now();
    let mut stream = TcpStream::connect(address).expect("a router");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let bytes = request("POST", "/v1/completions", body.to_string().as_bytes());
    stream.write_all(&bytes).expect("a router that reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer in time");
    (answer, began.elapsed())
}

/// The events' data.
fn events(answer: &str) -> Vec<Value> {
    let lines = answer.lines().filter_map(|line| line.strip_prefix("data: "));
    lines.filter_map(|data| serde_json::from_str(data).ok()).collect()
}

/// A router and its workers on one thread each.
struct Cluster {
    router: Process,
    workers: Vec<Process>,
    model: String,
    _etcd: (Process, tempfile::TempDir),
}

impl Cluster {
    /// `None` where etcd is not installed.
    fn start(workers: usize, flags: &[&str]) -> Option<Self> {
        let (etcd, endpoint, data) = etcd()?;
        let worker = ["worker", "--model", "demo", "--etcd", &endpoint, "--threads", "1"];
        let workers: Vec<Process> = (0..workers)
            .map(|_| Process::lockstep(&[&worker[..], &["--precision", "exact"], flags].concat()))
            .collect();
        let ports = ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];
        let silence = ["--silence-seconds", SILENCE_SECONDS, "--connect-seconds", SILENCE_SECONDS];
        let router = ["router", "--etcd", &endpoint];
        let router = Process::lockstep(&[&router, &ports[..], &silence[..]].concat());
        let look = || exchange(router.address("http"), "GET", "/v1/models", b"").json();
        wait_for("a model", DEADLINE, look, |listed| listed["data"][0]["id"].is_string());
        let model = look()["data"][0]["id"].as_str().expect("a name").to_owned();
        let cluster = Self { router, workers, model, _etcd: (etcd, data) };
        // The first request fetches the tokenizer.
        cluster.stream("Hello");
        Some(cluster)
    }

    fn address(&self) -> &str {
        self.router.address("http")
    }

    fn stream(&self, prompt: &str) -> (String, Duration) {
        stream(self.address(), &self.model, prompt)
    }
}

#[test]
fn long_prompts_on_slow_workers_neither_fail_nor_start_again() {
    let flags = ["--sequences", "1", "--step-tokens", "4096"];
    let Some(cluster) = Cluster::start(WORKERS, &flags) else { return };
    let answers: Vec<(String, Duration)> = thread::scope(|scope| {
        let clients: Vec<_> = (0..PROMPTS)
            .map(|client| {
                let cluster = &cluster;
                scope.spawn(move || cluster.stream(&prompt(client)))
            })
            .collect();
        clients.into_iter().map(|client| client.join().expect("a client")).collect()
    });
    for (answer, _) in &answers {
        assert!(answer.trim_end().ends_with("data: [DONE]"), "{answer}");
        let events = events(answer);
        assert!(events.iter().all(|event| event["error"].is_null()), "{answer}");
        assert!(events.iter().any(|event| event["progress"].is_object()), "{answer}");
    }
    let longest = answers.iter().map(|(_, took)| took.as_secs_f64()).fold(0.0, f64::max);
    eprintln!("{PROMPTS} prompts of {WORDS} words on {WORKERS} workers: {longest:.1} s at most");
    let address = cluster.address();
    assert_eq!(metric(address, "lockstep_router_resumes_total"), 0.0, "nothing started again");
    assert_eq!(metric(address, "lockstep_router_retries_total"), 0.0, "nothing was refused");
    let finished = |worker: &Process| {
        metric(worker.address("worker"), "lockstep_worker_requests_finished_total")
    };
    let finished: Vec<f64> = cluster.workers.iter().map(finished).collect();
    assert_eq!(finished.iter().sum::<f64>(), PROMPTS as f64 + 1.0);
    assert!(finished.iter().all(|&count| count >= 2.0), "both took their share: {finished:?}");
}

/// Some prompt is being computed.
fn is_prefilling(cluster: &Cluster) -> bool {
    metric(cluster.address(), "lockstep_router_prefilling") >= 1.0
}

#[test]
fn a_short_request_does_not_wait_for_a_long_prefill_beside_it() {
    let Some(cluster) = &Cluster::start(1, &[]) else { return };
    thread::scope(|scope| {
        let long = scope.spawn(|| {
            let prompts: String = (0..3).map(prompt).collect();
            let (answer, _) = cluster.stream(&prompts);
            (answer, Instant::now())
        });
        let look = || is_prefilling(cluster);
        wait_for("the long prompt is being computed", DEADLINE, look, |&prefilling| prefilling);
        let (short, took) = cluster.stream("Hello");
        let ended = Instant::now();
        assert!(short.trim_end().ends_with("data: [DONE]"), "{short}");
        let (long, long_ended) = long.join().expect("a client");
        assert!(long.trim_end().ends_with("data: [DONE]"), "{long}");
        assert!(ended < long_ended, "the short request waited for the long one");
        eprintln!("4 tokens beside a prefill: {took:?}, {:?} earlier", long_ended - ended);
    });
}
