//! Workers whose ranks are killed or stopped: they end soon, with the reason, leave nothing behind,
//! and their streams go on elsewhere.

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use serde_json::json;
use tests::{Log, Process, etcd, exchange, is_there, signal, wait_for};

const DEADLINE: Duration = Duration::from_secs(60);
/// A rank that is stopped is noticed in 3 s, one that is killed in 1 s: the rest is for machines
/// that do much else.
const NOTICED: Duration = Duration::from_secs(10);
const MODEL: &str = "qwen2_gqa4_tied_sharded";

fn worker(endpoint: &str) -> (Process, Log) {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/public").join(MODEL);
    let model = model.to_str().expect("a path in UTF-8");
    let group = ["--tp", "3", "--threads", "1", "--kv-memory", "4M"];
    Process::logged(&[&["worker", "--model", model, "--etcd", endpoint], &group[..]].concat())
}

fn router(endpoint: &str, workers: usize) -> Process {
    let ports = ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];
    let router = Process::lockstep(&[&["router", "--etcd", endpoint], &ports[..]].concat());
    let look = || exchange(router.address("http"), "GET", "/v1/models", b"").body;
    wait_for("the workers", DEADLINE, look, |seen| seen.contains(MODEL) == (workers > 0));
    router
}

/// A long answer; its choices.
fn answer(router: &Process) -> String {
    let body = json!({
        "model": MODEL, "prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": true,
        "temperature": 0.9, "seed": 7,
    });
    let reply =
        exchange(router.address("http"), "POST", "/v1/completions", body.to_string().as_bytes());
    assert_eq!(reply.status, 200, "{reply:?}");
    reply.json()["choices"].to_string()
}

/// Rank 1 of the worker gets a signal; how long the worker took to end.
fn lost((worker, log): &mut (Process, Log), name: &str, reason: &str) -> Duration {
    let ranks = worker.children();
    assert_eq!(ranks.len(), 2);
    let began = Instant::now();
    signal(ranks[0], name);
    let status = worker.wait(NOTICED);
    let took = began.elapsed();
    assert!(!status.success(), "{status}");
    wait_for("the reason", DEADLINE, || log.text(), |said| said.contains(reason));
    wait_for("the end of all ranks", DEADLINE, || ranks.iter().any(|&r| is_there(r)), |any| !any);
    took
}

#[test]
fn a_worker_with_nothing_to_do_ends_with_a_rank() {
    let Some((_etcd, endpoint, _data)) = etcd() else { return };
    for (name, reason) in [("KILL", "signal: 9"), ("STOP", "not been heard of for 2 s")] {
        let took = lost(&mut worker(&endpoint), name, reason);
        eprintln!("idle, {name}: the worker ended after {took:?}");
    }
}

#[test]
fn streams_of_a_worker_that_lost_a_rank_go_on_elsewhere() {
    let Some((_etcd, endpoint, _data)) = etcd() else { return };
    let mut current = worker(&endpoint);
    let router = router(&endpoint, 1);
    let wanted = answer(&router);
    for (name, reason) in [("KILL", "signal: 9"), ("STOP", "not been heard of for 2 s")] {
        let began = Instant::now();
        let (answered, took) = thread::scope(|scope| {
            let clients: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| (0..3).map(|_| answer(&router)).collect::<Vec<_>>()))
                .collect();
            let spare = worker(&endpoint);
            let mut first = std::mem::replace(&mut current, spare);
            let took = lost(&mut first, name, reason);
            let answered: Vec<_> =
                clients.into_iter().map(|client| client.join().unwrap()).collect();
            (answered.concat(), took)
        });
        eprintln!("busy, {name}: the worker ended after {took:?}, all in {:?}", began.elapsed());
        assert!(answered.iter().all(|answer| *answer == wanted), "{answered:?}");
    }
}
