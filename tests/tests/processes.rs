//! Router, worker and ranks as separate processes, joined by a real etcd.

use std::time::Duration;

use tests::{Process, client, etcd, exchange, wait_for};

const DEADLINE: Duration = Duration::from_secs(30);

fn models(address: &str) -> Vec<String> {
    let listed = exchange(address, "GET", "/v1/models", b"").json();
    let ids = listed["data"].as_array().cloned().unwrap_or_default();
    ids.iter().map(|model| model["id"].as_str().unwrap().to_owned()).collect()
}

/// Ten answers of 64 tokens over HTTP and gRPC.
fn answers(router: &Process) -> Option<String> {
    client(router, "answers.py")
}

#[test]
fn any_number_of_ranks_in_any_number_of_processes_answers_alike() {
    let Some((_etcd, endpoint, _data)) = etcd() else { return };
    let up = |tp| answers(&Process::up(&["--tp", tp, "--threads", "1"]));
    let Some(wanted) = up("1") else { return };
    for tp in ["2", "3"] {
        assert_eq!(up(tp).as_ref(), Some(&wanted), "--tp {tp}");
    }

    let ports = ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];
    let router = Process::lockstep(&[&["router", "--etcd", &endpoint], &ports[..]].concat());
    let roster = |what: &str, len: usize| {
        let look = || models(router.address("http"));
        wait_for(what, DEADLINE, look, |seen| seen.len() == len);
    };
    roster("an empty roster", 0);
    let worker = ["worker", "--model", "demo", "--etcd", &endpoint, "--tp", "2", "--threads", "1"];
    let mut worker = Process::lockstep(&worker);
    roster("the worker in the roster", 1);
    assert_eq!(answers(&router), Some(wanted), "separate processes");

    worker.signal("TERM");
    roster("the worker out of the roster", 0);
    let status = worker.wait(DEADLINE);
    assert!(status.success(), "after a signal: {status}");
}
