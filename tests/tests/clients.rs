//! Clients that people use, unmodified, against the real binary with the demo model on two ranks.

use std::{
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

const START_DEADLINE: Duration = Duration::from_secs(900);
const CLIENT_DEADLINE: Duration = Duration::from_secs(600);
const STOP_DEADLINE: Duration = Duration::from_secs(20);

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The binary beside the tests' own folder.
fn lockstep() -> PathBuf {
    let tests = std::env::current_exe().unwrap();
    let binary = tests.parent().unwrap().parent().unwrap().join("lockstep");
    assert!(binary.exists(), "no {}: run `./dev test`, which builds it", binary.display());
    binary
}

/// A running `lockstep up`, ended with the value.
struct Up {
    process: Child,
    http: String,
    grpc: String,
}

impl Up {
    fn start(flags: &[&str]) -> Self {
        let mut process = Command::new(lockstep())
            .args(["up", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"])
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap());
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            let mut line = String::new();
            let _read = lines.read_line(&mut line);
            let _timed_out = sender.send(line);
            // Whatever follows is read, so that the process never waits for us.
            let _rest = lines.read_to_end(&mut Vec::new());
        });
        let mut up = Self { process, http: String::new(), grpc: String::new() };
        let line = receiver.recv_timeout(START_DEADLINE).expect("no ready line in time");
        assert!(line.starts_with("ready "), "not ready: {line:?}");
        let word = |name: &str| {
            let value = line.split_whitespace().find_map(|word| word.strip_prefix(name));
            value.unwrap_or_else(|| panic!("no {name} in {line:?}")).to_owned()
        };
        (up.http, up.grpc) = (word("http="), word("grpc="));
        up
    }

    fn client(&self, script: &str) -> Option<ExitStatus> {
        let python = root().join(".venv/bin/python");
        if !python.exists() {
            eprintln!("SKIPPED: no {}; `./dev test` makes it and runs this", python.display());
            return None;
        }
        let mut client = Command::new(python)
            .arg(root().join("tests/python").join(script))
            .env("LOCKSTEP_TEST_HTTP", &self.http)
            .env("LOCKSTEP_TEST_GRPC", &self.grpc)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Some(wait(&mut client, CLIENT_DEADLINE))
    }

    /// Ctrl-C, and how it ended.
    fn stop(mut self) -> ExitStatus {
        let pid = self.process.id().to_string();
        assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
        wait(&mut self.process, STOP_DEADLINE)
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let _ended = self.process.kill();
        let _status = self.process.wait();
    }
}

fn wait(process: &mut Child, deadline: Duration) -> ExitStatus {
    let began = Instant::now();
    loop {
        if let Some(status) = process.try_wait().unwrap() {
            return status;
        }
        if began.elapsed() > deadline {
            let _ended = process.kill();
            panic!("no end within {} s", deadline.as_secs());
        }
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn the_openai_client_and_a_reflection_client_are_served() {
    let up = Up::start(&["--model", "demo", "--tp", "2", "--threads", "1"]);
    for script in ["openai_client.py", "reflection_client.py"] {
        if let Some(status) = up.client(script) {
            assert!(status.success(), "{script}: {status}");
        }
    }
    let status = up.stop();
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
