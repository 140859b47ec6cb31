//! What clients of a router meet.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use tests::{Ca, Log, Process, exchange, tls_answer};

use crate::{ANY_PORTS, all, files, logged, model, run, says};

/// Router and worker in one process; clients must have a certificate.
fn up(ca: &Ca) -> (Process, Log) {
    let model = model();
    let own = ["up", "--model", &model, "--threads", "1"];
    logged(&all(&[&own, &ANY_PORTS], &[ca.flags("tls", "router")]))
}

fn answer(command: &str, at: &str, files: &[String; 3], more: &[&str]) -> Option<String> {
    tls_answer(command, at, files.each_ref().map(String::as_str), more)
}

#[test]
fn clients_with_a_certificate_are_served_and_others_are_told_why_not() {
    let ca = Ca::init();
    ca.issue("router", &[]);
    ca.issue("someone", &["--client"]);
    ca.issue_until("late", None);
    let other = Ca::init();
    other.issue("stranger", &[]);
    let (up, log) = up(&ca);
    let (http, grpc) = (up.address("http"), up.address("grpc"));
    let known = files(&ca, "someone");
    let Some(served) = answer("openai", http, &known, &[grpc]) else { return };
    assert_eq!(served, "served True\n");

    let mut nobody = known.clone();
    nobody[1] = "-".into();
    let mut stranger = files(&other, "stranger");
    stranger[0] = ca.path("ca.crt");
    for (files, reason) in
        [(nobody, "no_certificate"), (stranger, "unknown_ca"), (files(&ca, "late"), "expired")]
    {
        let told = answer("one", http, &files, &[]).unwrap();
        assert!(told.starts_with("error: "), "{reason}: {told}");
        says(reason, &log, &["connection refused", reason]);
    }
    // The client refuses: it does not know the CA.
    let mut wary = known.clone();
    wary[0] = other.path("ca.crt");
    assert!(answer("one", http, &wary, &[]).unwrap().contains("verify failed"));
    says("a client's refusal", &log, &["it does not trust the CA of this side's certificate"]);
    assert!(answer("old", http, &known, &[]).unwrap().starts_with("error: "));
    says("an old client", &log, &["it speaks neither TLS 1.2 nor 1.3"]);

    let plain = exchange(http, "GET", "/v1/models", b"");
    assert_eq!(plain.status, 400, "{plain:?}");
    assert!(plain.body.contains("https://"), "{plain:?}");
    says("a plain client", &log, &["it does not speak TLS, which this port does"]);
    // The worker of the same process has its port on loopback, without TLS.
    assert!(answer("one", up.address("worker"), &known, &[]).unwrap().starts_with("error: "));
    says("TLS to a plain port", &log, &["it speaks TLS, which this port does not"]);

    // Of one kind there is one line in 10 s, and a count of all.
    for _ in 0..50 {
        assert_eq!(exchange(http, "GET", "/v1/models", b"").status, 400);
    }
    assert_eq!(log.text().matches("which this port does;").count(), 1);
    let tools = ca.flags("", "someone");
    tools_speak_tls(http, grpc, &tools);
}

fn tools_speak_tls(http: &str, grpc: &str, tls: &[String]) {
    let (url, channel) = (format!("https://{http}"), format!("grpcs://{grpc}"));
    let with = |words: &[&str]| run(&all(&[words], &[tls.to_vec()]));
    let (well, told) = with(&["status", "--router-http", &url]);
    assert!(well && told.contains("1 of 1 workers usable"), "{told}");
    for to in [&url, &channel] {
        let few = ["--requests", "2", "--output-tokens", "2", "--prompt-tokens", "8"];
        let (well, told) = with(&[&["bench", "--url", to, "--vocab", "500"], &few[..]].concat());
        assert!(well, "{told}");
    }
    let (well, told) = run(&all(&[&["status", "--router-http", &url]], &[]));
    assert!(!well && told.contains("CA"), "{told}");
    let (well, told) = run(&all(&[&["status", "--router-http", http]], &[]));
    assert!(!well && told.contains("https://"), "{told}");
}

#[test]
fn a_thousand_silent_connections_keep_nobody_out() {
    let ca = Ca::init();
    ca.issue("router", &[]);
    let (up, log) = up(&ca);
    let served = answer("silent", up.address("http"), &files(&ca, "router"), &["1000"]);
    let Some(served) = served else { return };
    let slowest: f64 = served.split_whitespace().nth(1).unwrap().parse().unwrap();
    eprintln!("beside 1000 silent connections the slowest of 20 requests took {slowest:.3} s");
    assert!(slowest < 5.0, "{served}");
    assert!(!log.text().contains("error"), "{}", log.text());
}

#[test]
fn a_silent_connection_is_ended_by_its_deadline() {
    let ca = Ca::init();
    ca.issue("router", &[]);
    let (up, log) = up(&ca);
    let mut silent = TcpStream::connect(up.address("http")).unwrap();
    silent.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    // The begin of a handshake, and no more.
    silent.write_all(&[0x16, 3, 1]).unwrap();
    assert_eq!(silent.read(&mut [0; 16]).unwrap(), 0, "the router closes it");
    says("why", &log, &["no TLS handshake within 10 s"]);
}
