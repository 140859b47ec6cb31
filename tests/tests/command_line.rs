//! The command line of the real binary: what scripts rely on.

use std::{
    io::Write,
    process::{Command, Output, Stdio},
};

use serde_json::json;
use tests::{Process, exchange, lockstep};

fn run(command: &mut Command, input: &str) -> Output {
    let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = pipes.spawn().expect("lockstep runs");
    // A child that has ended already reads nothing.
    let _unread = child.stdin.take().expect("a pipe").write_all(input.as_bytes());
    child.wait_with_output().expect("its output")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn up_takes_what_router_and_worker_take() {
    let flags = ["--name", "tiny", "--alias", "gpt-4=tiny", "--body-bytes", "1000", "--queue", "9"];
    let more = ["--threads", "1", "--worker-listen", "127.0.0.1:0"];
    let up = Process::up(&[&flags[..], &more[..]].concat());
    assert!(up.ready().contains(" model=tiny "), "{}", up.ready());
    let http = up.address("http");
    let listed = exchange(http, "GET", "/v1/models", b"").json();
    assert_eq!(listed["data"][0]["id"], "tiny");
    assert_eq!(
        (&listed["data"][1]["id"], &listed["data"][1]["root"]),
        (&json!("gpt-4"), &json!("tiny"))
    );
    let body = json!({"model": "gpt-4", "prompt": "Hi", "max_tokens": 2}).to_string();
    let reply = exchange(http, "POST", "/v1/completions", body.as_bytes());
    assert_eq!((reply.status, &reply.json()["model"]), (200, &json!("gpt-4")));
    let long = json!({"prompt": "a".repeat(2000)}).to_string();
    assert_eq!(exchange(http, "POST", "/v1/completions", long.as_bytes()).status, 413);
    let metrics = exchange(up.address("worker"), "GET", "/metrics", b"");
    assert!(metrics.status == 200 && metrics.body.contains("lockstep_worker_"), "{metrics:?}");
    chats(&up);
}

/// From a pipe: answers to standard output, all else beside it, and a status that tells faults.
fn chats(up: &Process) {
    // Without a scheme, without a model.
    let chat = |flags: &[&str], input: &str| {
        let mut command = Command::new(lockstep());
        command.args(["chat", "--router", up.address("grpc"), "--temperature", "0"]).args(flags);
        run(&mut command, input)
    };
    let cut = chat(&["--max-tokens", "3"], "What is the capital of France?\n\n/reset\nHi\n");
    assert!(cut.status.success(), "{cut:?}");
    assert!(text(&cut.stdout).lines().count() >= 2, "{cut:?}");
    assert_eq!(text(&cut.stderr).matches("truncated").count(), 2, "{cut:?}");
    let whole = chat(&["--max-tokens", "100"], "What is 2 + 2?\n");
    assert!(whole.status.success() && !text(&whole.stderr).contains("truncated"), "{whole:?}");

    let named = chat(&["--model", "nobody"], "Hi\n");
    let told = text(&named.stderr);
    assert!(!named.status.success() && told.contains("line 1") && told.contains("tiny"), "{told}");
    let unknown = chat(&[], "/rest\nHi\n");
    assert!(!unknown.status.success() && unknown.stdout.is_empty(), "{unknown:?}");
}

/// Nobody listens at port 1, so what `bench` fails with is the address that it was told.
#[test]
fn a_flag_wins_over_the_environment_and_that_over_the_file() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "[bench]\nurl = \"file.invalid:1\"\n").unwrap();
    let bench = |flags: &[&str], variables: &[(&str, &str)]| {
        let mut command = Command::new(lockstep());
        command
            .env_remove("LOCKSTEP_CONFIG")
            .env_remove("LOCKSTEP_URL")
            .env_remove("LOCKSTEP_NAME");
        let output = run(command.arg("bench").args(flags).envs(variables.iter().copied()), "");
        assert!(!output.status.success());
        text(&output.stderr)
    };
    let path = file.path().to_str().unwrap();
    let (by_file, by_env) = (("LOCKSTEP_CONFIG", path), ("LOCKSTEP_URL", "env.invalid:1"));
    for (flags, variables, wanted) in [
        (&["--config", path][..], &[][..], "file.invalid"),
        (&[], &[by_file], "file.invalid"),
        (&[], &[by_file, by_env], "env.invalid"),
        (&["--url", "flag.invalid:1"], &[by_file, by_env], "flag.invalid"),
    ] {
        let told = bench(flags, variables);
        assert!(told.contains(wanted), "{wanted}: {told}");
    }
    // What asks for a model by its name is not what loads one.
    let told = bench(&["--url", "127.0.0.1:1"], &[("LOCKSTEP_MODEL", "/no/such/file")]);
    assert!(!told.contains("/no/such/file"), "{told}");
}

#[test]
fn completions_and_man_pages_name_commands_and_flags() {
    for shell in ["bash", "zsh", "fish"] {
        let output = run(Command::new(lockstep()).args(["completions", shell]), "");
        let script = text(&output.stdout);
        assert!(output.status.success(), "{output:?}");
        for part in ["lockstep", "perplexity", "worker-listen"] {
            assert!(script.contains(part), "{shell}: {part}");
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let pages = folder.path().join("man1");
    let output = run(Command::new(lockstep()).arg("man").arg(&pages), "");
    assert!(output.status.success(), "{output:?}");
    for (page, part) in [("lockstep.1", "router"), ("lockstep-up.1", "LOCKSTEP_WORKER_LISTEN")] {
        let page = std::fs::read_to_string(pages.join(page)).expect(page);
        assert!(page.contains(part), "{part}");
    }
    assert!(!pages.join("lockstep-rank.1").exists());
}

#[test]
fn a_start_that_cannot_work_is_refused_with_the_remedy() {
    for (flags, wanted) in [
        ("router", "--workers"),
        ("router --workers 127.0.0.1", "no port"),
        ("worker --etcd http://10.0.0.5:2379 --listen 127.0.0.1:0", "--listen HOST:PORT"),
        ("worker --insecure --listen 0.0.0.0:7001", "--advertise http://HOST:PORT"),
        ("worker --listen 10.0.0.7:7001", "--cluster-cert"),
        ("router --workers 127.0.0.1:1 --http 0.0.0.0:0", "--tls-cert and --tls-key"),
        ("router --workers 127.0.0.1:1 --grpc 0.0.0.0:0", "--insecure"),
        ("router --workers 127.0.0.1:1 --tls-cert x", "add --tls-key"),
        ("worker --cluster-ca x", "--cluster-cert"),
        ("worker --etcd https://127.0.0.1:1", "--etcd-ca"),
        ("up --alias a=b,b=c", "another alias"),
        ("up --insecure --worker-listen 0.0.0.0:0", "--advertise"),
        ("chat --router 127.0.0.1:1", "lockstep up"),
        ("up --hppt 127.0.0.1:0", "--http"),
    ] {
        let output = run(Command::new(lockstep()).args(flags.split(' ')), "");
        let told = text(&output.stderr);
        assert!(!output.status.success() && told.contains(wanted), "{flags}: {told}");
    }
}
