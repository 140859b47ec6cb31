//! Two workers and a router without etcd: the router is told their addresses.

use std::time::Duration;

use tests::{Process, exchange, wait_for};

const DEADLINE: Duration = Duration::from_secs(60);

fn worker(name: &str, listen: &str) -> Process {
    let flags = ["--model", "demo", "--threads", "1", "--name", name, "--listen", listen];
    Process::lockstep(&[&["worker"], &flags[..]].concat())
}

fn models(address: &str) -> Vec<String> {
    let listed = exchange(address, "GET", "/v1/models", b"").json();
    let ids = listed["data"].as_array().cloned().unwrap_or_default();
    ids.iter().map(|model| model["id"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn listed_workers_serve_and_dead_ones_leave_and_return() {
    let (one, mut two) = (worker("one", "127.0.0.1:0"), worker("two", "127.0.0.1:0"));
    let at = one.address("worker").to_owned();
    // With and without a scheme.
    let list = format!("{at},http://{}", two.address("worker"));
    let ports = ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];
    let router = Process::lockstep(&[&["router", "--workers", &list], &ports[..]].concat());
    let http = router.address("http");
    let roster = |what: &str, wanted: &[&str]| {
        wait_for(what, DEADLINE, || models(http), |seen| seen == wanted);
    };
    let answers = |model: &str| {
        let body = format!(r#"{{"model": "{model}", "prompt": "Hi", "max_tokens": 2}}"#);
        let reply = exchange(http, "POST", "/v1/completions", body.as_bytes());
        assert_eq!(reply.status, 200, "{model}: {reply:?}");
    };
    roster("both workers", &["one", "two"]);
    answers("one");
    answers("two");

    drop(one); // SIGKILL
    roster("the dead worker out", &["two"]);
    answers("two");
    let _one = worker("one", &at);
    roster("the worker back at its address", &["one", "two"]);
    answers("one");

    two.signal("TERM");
    roster("the stopped worker out", &["one"]);
    let status = two.wait(DEADLINE);
    assert!(status.success(), "after a signal: {status}");
}
