//! The hops within a cluster, each with what does not fit.

use std::time::Duration;

use tests::{Ca, Process, secure_etcd, tls_answer, wait_for, workers};

use crate::{DEADLINE, all, files, logged, mock, model, router, run, says};

/// What the router of a plain front says of its only worker.
fn reason(router: &Process) -> String {
    let all = workers(router.address("http"));
    all.first().map(|worker| worker["reason"].to_string()).unwrap_or_default()
}

#[test]
fn routers_and_workers_check_each_other() {
    let (ca, other) = (Ca::init(), Ca::init());
    ca.issue("node", &[]);
    ca.issue("user", &["--client"]);
    ca.issue_until("late", None);
    other.issue("node", &[]);
    let (worker, said) = mock(&[], ca.flags("cluster", "node"));
    assert!(worker.ready().contains("worker=https://"), "{}", worker.ready());
    let at = worker.address("worker");
    let meets = |tls: Vec<Vec<String>>, parts: &[&str]| {
        let (_router, log) = router(at, &tls);
        says("the router", &log, parts);
    };
    // By the list the worker is asked before it is in any roster.
    meets(vec![], &["not in the roster"]);
    says("a router without TLS", &said, &["plain_text"]);
    meets(vec![other.flags("cluster", "node")], &["not of a CA that is trusted here"]);
    says("a router of another CA", &said, &["it does not trust the CA of this side's certificate"]);
    meets(vec![ca.flags("cluster", "late")], &["this side's certificate has expired"]);
    says("an expired router", &said, &["its certificate has expired"]);
    meets(vec![ca.flags("cluster", "user")], &["refuses this side's certificate"]);
    says("a user in place of a router", &said, &["wrong_name", "not for lockstep"]);
    let (router, _) = router(at, &[ca.flags("cluster", "node")]);
    let usable = || workers(router.address("http")).iter().any(|one| one["usable"] == true);
    wait_for("the router that fits", DEADLINE, usable, |usable| *usable);
    assert_eq!(reason(&router), "null");

    // A worker without TLS gets nothing from a router that has it.
    let (plain, said) = mock(&[], vec![]);
    meets_plain(&plain, &ca);
    says("a plain worker", &said, &["it speaks TLS, which this port does not"]);
    drains(at, &ca);
}

fn meets_plain(plain: &Process, ca: &Ca) {
    let (_router, log) = router(plain.address("worker"), &[ca.flags("cluster", "node")]);
    says("a router with TLS", &log, &["not in the roster"]);
}

fn drains(at: &str, ca: &Ca) {
    let (well, told) = run(&all(&[&["drain", at]], &[]));
    assert!(!well, "{told}");
    let (well, told) = run(&all(&[&["drain", at]], &[ca.flags("cluster", "node")]));
    assert!(well && told.contains("has ended"), "{told}");
}

#[test]
fn etcd_is_reached_by_tls_with_a_certificate() {
    let (ca, other) = (Ca::init(), Ca::init());
    for name in ["etcd", "node"] {
        ca.issue(name, &[]);
    }
    other.issue("node", &[]);
    let Some((_etcd, endpoint, _data)) = secure_etcd(&ca) else { return };
    let trusting = |flags: Vec<String>, parts: &[&str]| {
        let mut command = std::process::Command::new(tests::lockstep());
        command.args(all(&[&["router", "--etcd", &endpoint], &crate::ANY_PORTS], &[flags]));
        let (_router, log) = Process::spawn_logged(command.stdout(std::process::Stdio::null()));
        says("the router", &log, parts);
    };
    trusting(other.flags("etcd", "node"), &["not of a CA that is trusted here"]);
    let only_ca = vec!["--etcd-ca".to_owned(), ca.path("ca.crt")];
    trusting(only_ca, &["wants one and was shown none"]);
    let flags = [ca.flags("etcd", "node")];
    let (_router, _) = logged(&all(&[&["router", "--etcd", &endpoint], &crate::ANY_PORTS], &flags));
}

#[test]
fn ranks_of_other_machines_come_by_tls_alone() {
    let (ca, other) = (Ca::init(), Ca::init());
    for name in ["etcd", "node"] {
        ca.issue(name, &[]);
    }
    other.issue("node", &[]);
    let Some((_etcd, endpoint, _data)) = secure_etcd(&ca) else { return };
    let machine = |place: &str, tls: &[Vec<String>]| {
        let model = model();
        let own = ["worker", "--etcd", &endpoint, "--model", &model, "--kv-memory", "4M"];
        let group = ["--group", "g", "--nodes", place, "--tp", "2", "--threads", "1"];
        let mut command = std::process::Command::new(tests::lockstep());
        let etcd = ca.flags("etcd", "node");
        command.args(all(&[&own, &group], &[&[etcd], tls].concat()));
        Process::spawn_logged(command.stdout(std::process::Stdio::null()))
    };
    let (_leader, log) = machine("0/2", &[ca.flags("cluster", "node")]);
    says("the leader", &log, &["waiting for the ranks of all nodes"]);
    let (node, said) = machine("1/2", &[]);
    says("a node without TLS", &said, &["the leader's ranks speak TLS"]);
    drop(node);
    let (node, said) = machine("1/2", &[other.flags("cluster", "node")]);
    says("a node of another CA", &said, &["not of a CA that is trusted here"]);
    says("the leader", &log, &["it does not trust the CA of this side's certificate"]);
    drop(node);
    let (_node, _said) = machine("1/2", &[ca.flags("cluster", "node")]);
    says("the group", &log, &["ranks=2"]);
}

#[test]
fn streams_outlive_certificates_and_new_connections_do_not() {
    let ca = Ca::init();
    ca.issue("user", &["--client"]);
    let valid = Duration::from_secs(15);
    ca.issue_until("node", Some(valid));
    let cluster = ca.flags("cluster", "node");
    let (worker, _) = mock(&["--mock-step-ms", "100"], cluster.clone());
    let front = ca.flags("tls", "node");
    let (router, log) = router(worker.address("worker"), &[cluster, front]);
    let http = router.address("http").to_owned();
    let user = files(&ca, "user");
    let ask = |command: &str, more: &[&str]| {
        tls_answer(command, &http, user.each_ref().map(String::as_str), more)
    };
    if ask("one", &[]).is_none() {
        return;
    }
    says("both", &log, &["worker met"]);
    let began = std::time::Instant::now();
    // 20 s of steps: beyond the end of every certificate but the client's.
    let streamed = ask("stream", &["200"]).unwrap();
    assert!(began.elapsed() > valid, "{:?}", began.elapsed());
    assert!(streamed.ends_with("data: [DONE]\n"), "{streamed}");
    assert!(ask("one", &[]).unwrap().contains("expired"));
    // It is replaced, and nothing is restarted.
    ca.issue("node", &[]);
    says("the router", &log, &["certificate replaced"]);
    assert!(ask("one", &[]).unwrap().starts_with("200 "));
    assert!(ask("stream", &["2"]).unwrap().ends_with("data: [DONE]\n"));
}
