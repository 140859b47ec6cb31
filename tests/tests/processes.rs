//! Router, worker and ranks as separate processes, joined by a real etcd.

use std::{
    net::{TcpListener, TcpStream},
    process::{Command, Stdio},
    time::Duration,
};

use serde_json::json;
use tests::{Process, exchange, wait_for};

const DEADLINE: Duration = Duration::from_secs(30);

fn models(address: &str) -> Vec<String> {
    let listed = exchange(address, "GET", "/v1/models", b"").json();
    let ids = listed["data"].as_array().cloned().unwrap_or_default();
    ids.iter().map(|model| model["id"].as_str().unwrap().to_owned()).collect()
}

fn ask(address: &str, model: &str) -> String {
    let body = json!({
        "model": model, "prompt": "The sun rises in the", "max_tokens": 24, "temperature": 0,
        "ignore_eos": true,
    });
    let reply = exchange(address, "POST", "/v1/completions", body.to_string().as_bytes());
    assert_eq!(reply.status, 200, "{reply:?}");
    reply.json()["choices"][0]["text"].as_str().unwrap().to_owned()
}

/// A registry of one member: the process, its URL and its data.
fn etcd() -> Option<(Process, String, tempfile::TempDir)> {
    if Command::new("etcd").arg("--version").output().is_err() {
        eprintln!("SKIPPED: etcd is not installed; apt-get install etcd-server runs this test");
        return None;
    }
    let data = tempfile::tempdir().unwrap();
    let held = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let ports = held.each_ref().map(|port| port.local_addr().unwrap().to_string());
    drop(held);
    let [client, peer] = ports.each_ref().map(|port| format!("http://{port}"));
    let mut command = Command::new("etcd");
    command
        .arg("--data-dir")
        .arg(data.path())
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("default={peer}")])
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let process = Process::spawn(&mut command);
    wait_for("etcd", DEADLINE, || TcpStream::connect(&ports[0]).map(drop), Result::is_ok);
    Some((process, client, data))
}

#[test]
fn separate_processes_answer_as_one_and_a_stopped_worker_leaves() {
    let Some((_etcd, endpoint, _data)) = etcd() else { return };
    let up = Process::up(&["--tp", "1", "--threads", "2"]);
    let model = models(up.address("http")).pop().unwrap();
    let wanted = ask(up.address("http"), &model);
    drop(up);

    let ports = ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];
    let router = Process::lockstep(&[&["router", "--etcd", &endpoint], &ports[..]].concat());
    let router = router.address("http");
    assert!(models(router).is_empty());
    let worker = ["worker", "--model", "demo", "--etcd", &endpoint, "--tp", "2", "--threads", "1"];
    let mut worker = Process::lockstep(&worker);
    let wait = |what: &str, good: &[String]| {
        wait_for(what, DEADLINE, || models(router), |seen| seen == good);
    };
    wait("the worker in the roster", std::slice::from_ref(&model));
    assert_eq!(ask(router, &model), wanted);

    worker.signal("TERM");
    wait("the worker out of the roster", &[]);
    let status = worker.wait(DEADLINE);
    assert!(status.success(), "after a signal: {status}");
}
