//! Workers whose ranks are killed or stopped: they say why, form their group again with the ranks
//! that live, and lose no stream.

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use serde_json::json;
use tests::{Log, Process, etcd, exchange, is_there, signal, wait_for};

const DEADLINE: Duration = Duration::from_secs(60);
/// A rank that is stopped is noticed in 3 s, one that is killed in 1 s: the rest is for loading,
/// and for machines that do much else.
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

/// Rank 1 of the worker gets a signal; how long it took until the group was complete again.
fn lost((worker, log): &mut (Process, Log), name: &str, reason: &str) -> Duration {
    let ranks = worker.children();
    assert_eq!(ranks.len(), 2);
    let formed = || log.text().matches("the group is complete again").count();
    let (began, before) = (Instant::now(), formed());
    signal(ranks[0], name);
    wait_for("the reason", NOTICED, || log.text(), |said| said.contains(reason));
    wait_for("the group", NOTICED, formed, |count| *count > before);
    let took = began.elapsed();
    assert!(worker.ended().is_none() && !is_there(ranks[0]), "{}", log.text());
    let now = worker.children();
    assert!(now.len() == 2 && now.contains(&ranks[1]), "{ranks:?}, {now:?}");
    took
}

const LOSSES: [(&str, &str); 2] = [("KILL", "signal: 9"), ("STOP", "not been heard of for 2 s")];

#[test]
fn a_worker_with_nothing_to_do_forms_its_group_again() {
    let Some((_etcd, endpoint, _data)) = etcd() else { return };
    let mut worker = worker(&endpoint);
    for (name, reason) in LOSSES {
        let took = lost(&mut worker, name, reason);
        eprintln!("idle, {name}: the group was complete after {took:?}");
    }
}

#[test]
fn streams_of_a_worker_that_lost_a_rank_go_on_there_where_no_other_is() {
    let Some((_etcd, endpoint, _data)) = etcd() else { return };
    let mut worker = worker(&endpoint);
    let router = router(&endpoint, 1);
    let wanted = answer(&router);
    for (name, reason) in LOSSES {
        let began = Instant::now();
        let answered = thread::scope(|scope| {
            let clients: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| (0..3).map(|_| answer(&router)).collect::<Vec<_>>()))
                .collect();
            let took = lost(&mut worker, name, reason);
            eprintln!("busy, {name}: the group was complete after {took:?}");
            clients.into_iter().flat_map(|client| client.join().unwrap()).collect::<Vec<_>>()
        });
        eprintln!("busy, {name}: all in {:?}", began.elapsed());
        assert!(answered.iter().all(|answer| *answer == wanted), "{answered:?}");
    }
}

#[test]
fn a_group_that_forms_is_seen_with_its_reason() {
    let Some((_etcd, endpoint, _data)) = etcd() else { return };
    let worker = worker(&endpoint);
    let router = router(&endpoint, 1);
    let status = || {
        let seen = exchange(router.address("http"), "GET", "/status", b"").json();
        let worker = &seen["models"][0]["workers"][0];
        (worker["epoch"].as_u64(), worker["reason"].as_str().unwrap_or_default().to_owned())
    };
    wait_for("a worker that serves", DEADLINE, status, |seen| *seen == (Some(1), String::new()));
    // Both at once: the second one's end fails the first attempt, and the next one waits.
    let ranks = worker.0.children();
    signal(ranks[0], "KILL");
    signal(ranks[1], "STOP");
    let why = "its group is formed anew: ";
    wait_for("the reason", DEADLINE, status, |(_, reason)| {
        reason.contains(why) && reason.contains("rank ")
    });
    wait_for("its end", DEADLINE, status, |(epoch, reason)| {
        epoch.is_some_and(|epoch| epoch > 1) && reason.is_empty()
    });
    assert_eq!(answer(&router), answer(&router));
}
