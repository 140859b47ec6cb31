//! Clients that people use, unmodified, against the real binary with the demo model on two ranks.

use std::{
    process::{Command, Stdio},
    time::Duration,
};

use tests::{Process, client, lockstep};

const STOP_DEADLINE: Duration = Duration::from_secs(20);

#[test]
fn unmodified_clients_are_served() {
    let mut up = Process::up(&["--tp", "2", "--threads", "1"]);
    for script in
        ["openai_client.py", "litellm_client.py", "langchain_client.py", "reflection_client.py"]
    {
        client(&up, script);
    }
    up.signal("INT");
    let status = up.wait(STOP_DEADLINE);
    assert!(status.success(), "after Ctrl-C: {status}");
}

#[test]
fn a_taken_port_and_a_missing_model_are_told_in_one_line() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for (flags, word) in [
        (["--model", "demo", "--http", &address], "choose another with --http"),
        (["--model", "no-such-model", "--http", "127.0.0.1:0"], "lockstep pull --list"),
        (["--device", "cuda", "--http", "127.0.0.1:0"], "--device cpu"),
        (["--tp", "0", "--http", "127.0.0.1:0"], "--tp must be at least 1"),
    ] {
        let mut command = Command::new(lockstep());
        command.args(["up", "--grpc", "127.0.0.1:0"]).args(flags).env("LOCKSTEP_LOG", "error");
        let output = command.stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.starts_with("error: ") && said.contains(word), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    let usage = Command::new(lockstep()).args(["up", "--no-such-flag"]).output().unwrap();
    assert_eq!(usage.status.code(), Some(2));
}
