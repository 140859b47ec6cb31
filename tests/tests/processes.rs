//! Router, worker and ranks as separate processes, joined by a real etcd.

use std::{path::Path, process::Command, time::Duration};

use serde_json::json;
use tests::{Process, client, etcd, exchange, full_pipe, lockstep, wait_for};

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

#[test]
fn a_worker_whose_output_nobody_reads_serves_and_ends() {
    let Some((_etcd, endpoint, _data)) = etcd() else { return };
    let ports = ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];
    let router = Process::lockstep(&[&["router", "--etcd", &endpoint], &ports[..]].concat());
    let http = router.address("http");
    let (reader, [stdout, stderr]) = full_pipe();
    let model =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/public/qwen2_gqa4_tied_sharded");
    let mut command = Command::new(lockstep());
    command
        .args(["worker", "--etcd", &endpoint, "--tp", "2", "--threads", "1", "--kv-memory", "4M"])
        .arg("--model")
        .arg(model)
        // Ranks, too, say what they can.
        .env("LOCKSTEP_LOG", "trace")
        .stdout(stdout)
        .stderr(stderr);
    let mut worker = Process::spawn(&mut command);
    wait_for("the worker in the roster", DEADLINE, || models(http), |seen| seen.len() == 1);
    let body = json!({
        "model": "qwen2_gqa4_tied_sharded", "prompt": "Once", "max_tokens": 16, "ignore_eos": true,
    });
    for _ in 0..100 {
        let reply = exchange(http, "POST", "/v1/completions", body.to_string().as_bytes());
        assert_eq!(reply.status, 200, "{reply:?}");
    }
    worker.signal("TERM");
    let status = worker.wait(DEADLINE);
    assert!(status.success(), "after a signal: {status}");
    drop(reader);
}
