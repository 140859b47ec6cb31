//! A group whose ranks run on two "machines", which are processes here, found by a real etcd.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::json;
use tests::{Log, Process, etcd, exchange, is_there, lockstep, signal, wait_for};

const DEADLINE: Duration = Duration::from_secs(60);
const MODEL: &str = "qwen2_gqa4_tied_sharded";

fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/public").join(name)
}

/// Flags of one machine, with a rank on the first and two on the second.
fn flags(endpoint: &str, place: &str, model: &Path) -> Vec<String> {
    let model = model.to_str().expect("a path in UTF-8");
    let group = ["--group", "g", "--nodes", place, "--node-ranks", "1,2", "--tp", "3"];
    let rest = ["--threads", "1", "--kv-memory", "4M", "--precision", "exact"];
    let all = [&["worker", "--etcd", endpoint, "--model", model], &group[..], &rest].concat();
    all.into_iter().map(str::to_owned).collect()
}

fn machine(endpoint: &str, place: &str) -> (Process, Log) {
    let flags = flags(endpoint, place, &model(MODEL));
    Process::logged(&flags.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Some answers, numbers and all.
fn answers(server: &Process) -> String {
    let answer = |seed: usize| {
        let body = json!({
            "model": MODEL, "prompt": format!("Once {seed}"), "max_tokens": 32, "logprobs": 2,
            "ignore_eos": true, "temperature": 0.8 * (seed % 2) as f64, "seed": seed,
        });
        let http = server.address("http");
        let reply = exchange(http, "POST", "/v1/completions", body.to_string().as_bytes());
        assert_eq!(reply.status, 200, "{reply:?}");
        reply.json()["choices"].to_string()
    };
    (0..6).map(answer).collect()
}

#[test]
fn a_group_over_two_machines_answers_as_one_process_and_forms_again() {
    let Some((_etcd, endpoint, _data)) = etcd() else { return };
    let ports = ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];
    let path = model(MODEL);
    let alone = ["up", "--model", path.to_str().unwrap(), "--precision", "exact"];
    let wanted = answers(&Process::lockstep(&[&alone, &ports[..]].concat()));
    let router = Process::lockstep(&[&["router", "--etcd", &endpoint], &ports[..]].concat());
    let serves = |what: &str| {
        let look = || exchange(router.address("http"), "GET", "/v1/models", b"").body;
        wait_for(what, DEADLINE, look, |seen| seen.contains(MODEL));
        assert_eq!(answers(&router), wanted, "{what}");
    };

    let (node, _) = machine(&endpoint, "1/2");
    let (mut leader, log) = machine(&endpoint, "0/2");
    serves("two machines");
    assert_eq!((leader.children().len(), node.children().len()), (0, 2));

    // The machine with ranks is gone: the group waits for it, and forms again when it is back.
    let ranks = node.children();
    node.signal("KILL");
    wait_for("its loss", DEADLINE, || log.text(), |said| said.contains("has lost a rank"));
    wait_for("the end of its ranks", DEADLINE, || ranks.iter().any(|&r| is_there(r)), |any| !any);
    let (node, said) = machine(&endpoint, "1/2");
    serves("after the end of a machine");
    assert!(leader.ended().is_none(), "{}", log.text());

    // The leader is gone: the other machine's ranks join the next one's epoch with what they have.
    let ranks = node.children();
    leader.signal("KILL");
    let began = Instant::now();
    let (mut leader, log) = machine(&endpoint, "0/2");
    serves("after the end of the leader");
    eprintln!("a killed leader's successor served after {:?}", began.elapsed());
    // It does not wait for the end of the other's lease.
    assert!(log.text().contains("the leader before has ended"), "{}", log.text());
    assert_eq!(node.children(), ranks, "the same ranks");
    assert!(said.text().contains("epoch=3"), "{}", said.text());

    // In order: the leader's end is the ranks' end, and the other machine waits.
    leader.signal("TERM");
    assert!(leader.wait(DEADLINE).success());
    wait_for("the ranks' end", DEADLINE, || node.children(), Vec::is_empty);
    let mut node = node;
    node.signal("TERM");
    assert!(node.wait(DEADLINE).success());
}

#[test]
fn a_stopped_rank_of_another_machine_is_named_and_replaced() {
    let Some((_etcd, endpoint, _data)) = etcd() else { return };
    let (node, _) = machine(&endpoint, "1/2");
    let (leader, log) = machine(&endpoint, "0/2");
    let ranks = node.children();
    let began = Instant::now();
    signal(ranks[1], "STOP");
    let told = ["rank 2: it has not been heard of for 2 s", "the group is complete again"];
    for told in told {
        wait_for(told, DEADLINE, || log.text(), |said| said.contains(told));
        eprintln!("{told}: after {:?}", began.elapsed());
    }
    wait_for("its end", DEADLINE, || is_there(ranks[1]), |there| !there);
    assert!(node.children().contains(&ranks[0]), "the other rank is the same");
    drop(leader);
}

#[test]
fn a_machine_with_another_model_is_refused_by_name() {
    let Some((_etcd, endpoint, _data)) = etcd() else { return };
    let other = flags(&endpoint, "1/2", &model("qwen2_gqa2_hd128"));
    let node = Process::lockstep(&other.iter().map(String::as_str).collect::<Vec<_>>());
    let mut command = Command::new(lockstep());
    command.args(flags(&endpoint, "0/2", &model(MODEL))).stdout(Stdio::null());
    let (mut leader, log) = Process::spawn_logged(&mut command);
    let status = leader.wait(DEADLINE);
    assert!(!status.success(), "{status}");
    let told = ["rank ", "qwen2_gqa2_hd128 is another model than rank 0's", "here and"];
    let all = |said: &String| told.iter().all(|part| said.contains(part));
    wait_for("the reason", DEADLINE, || log.text(), all);
    drop(node);
}

#[test]
fn who_is_missing_is_told() {
    let Some((_etcd, endpoint, _data)) = etcd() else { return };
    let mut command = Command::new(lockstep());
    command.args(flags(&endpoint, "0/2", &model(MODEL))).stdout(Stdio::null());
    let (mut leader, log) = Process::spawn_logged(&mut command);
    let told = "waiting for node 1 (ranks [1, 2])";
    wait_for("what is missing", DEADLINE, || log.text(), |said| said.contains(told));
    // A second leader is refused while the first lives.
    command.stdout(Stdio::null());
    let (mut second, said) = Process::spawn_logged(&mut command);
    let status = second.wait(DEADLINE);
    assert!(!status.success(), "{status}");
    wait_for("why", DEADLINE, || said.text(), |said| said.contains("is led already, in epoch 1"));
    leader.signal("TERM");
    leader.wait(DEADLINE);
}
