//! A whole cluster by TLS: etcd, a router, workers and a group over two machines; certificates are
//! replaced under load.

use std::{
    io::{BufRead, BufReader, Read},
    path::PathBuf,
    process::Stdio,
    time::Duration,
};

use serde_json::Value;
use tests::{Ca, Log, Process, half, secure_etcd, tls_answer, tls_client, wait_for};

use crate::{ANY_PORTS, DEADLINE, all, files, logged, model, run, says};

/// Every process with its log; the router is the first.
fn start(ca: &Ca, endpoint: &str) -> Vec<(Process, Log)> {
    let model = model();
    let cluster = |name: &str| ca.flags("cluster", name);
    let worker = |name: &str, group: &[&str]| {
        let own = ["worker", "--etcd", endpoint, "--model", &model, "--threads", "1"];
        let rest = ["--kv-memory", "16M", "--precision", "exact"];
        logged(&all(&[&own, &rest, group], &[cluster(name)]))
    };
    let front = ca.flags("tls", "router");
    let router =
        logged(&all(&[&["router", "--etcd", endpoint], &ANY_PORTS], &[cluster("router"), front]));
    let group = |place: &str| ["--group", "g", "--tp", "2", "--nodes", place].map(str::to_owned);
    let node = group("1/2");
    let node = worker("worker", &node.each_ref().map(String::as_str));
    let leader = group("0/2");
    let leader = worker("worker", &leader.each_ref().map(String::as_str));
    vec![router, node, leader, worker("worker", &[]), worker("other", &[])]
}

#[test]
fn a_cluster_serves_by_tls_while_its_certificates_are_replaced() {
    let ca = Ca::init();
    for name in ["etcd", "router", "worker", "other"] {
        ca.issue(name, &[]);
    }
    ca.issue("user", &["--client"]);
    let Some((_etcd, endpoint, _data)) = secure_etcd(&ca) else { return };
    let all = start(&ca, &endpoint);
    let http = all[0].0.address("http").to_owned();
    let tools = ca.flags("", "user");
    let url = format!("https://{http}");
    let status = || {
        let words = ["status", "--json", "--router-http", &url].map(str::to_owned);
        run(&[&words[..], &tools].concat()).1
    };
    wait_for("three workers", DEADLINE, status, |told| {
        told.matches("\"usable\":true").count() == 3 && told.matches("https://").count() == 3
    });
    let user = files(&ca, "user");
    let user = user.each_ref().map(String::as_str);
    let Some(before) = tls_answer("serial", &http, user, &[]) else { return };
    assert!(before.contains("TLSv1.3"), "{before}");

    let mut load = tls_client("load", &http, user, &[]).expect("Python was there");
    let mut load = load.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("python runs");
    let mut printed = BufReader::new(load.stdout.take().expect("a pipe"));
    let mut line = String::new();
    printed.read_line(&mut line).expect("the clients' begin");
    replace(&ca, &all);
    let after = tls_answer("serial", &http, user, &[]).expect("Python was there");
    assert_ne!(before, after, "new connections meet the new certificate");
    drop(load.stdin.take());
    let mut text = String::new();
    printed.read_to_string(&mut text).expect("what came of it");
    assert!(load.wait().expect("its end").success());
    let outcome: Value = serde_json::from_str(&text).expect("JSON");
    eprintln!("while certificates were replaced: {outcome}");
    assert_eq!(outcome["failures"], serde_json::json!([]));
    assert_eq!(outcome["texts"], 1, "one answer, whoever gave it");
    assert!(outcome["answers"].as_u64() > Some(10), "{outcome}");
}

/// Half a file, then none that fits, then new ones.
fn replace(ca: &Ca, all: &[(Process, Log)]) {
    let kept = "certificate files cannot be used; those read before stay in use";
    let cert = PathBuf::from(ca.path("router.crt"));
    std::fs::write(&cert, half(&cert)).expect("a file");
    says("half a file", &all[0].1, &[kept, "not whole, or no PEM"]);
    std::thread::sleep(Duration::from_secs(5));
    let told = all[0].1.text().matches(kept).count();
    // The router follows the file twice: for its ports, and for the cluster.
    assert!(told <= 3, "one warning for each change, not {told}: {}", all[0].1.text());
    for name in ["router", "worker", "other"] {
        ca.issue(name, &[]);
    }
    for (_, log) in all {
        says("the new certificate", log, &["certificate replaced"]);
    }
    std::thread::sleep(Duration::from_secs(2));
}
