//! TLS on every hop, with real processes, a real etcd and clients that we did not write.

mod cluster;
mod front;
mod hops;

use std::{
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use tests::{Ca, Log, Process, lockstep, wait_for};

pub const DEADLINE: Duration = Duration::from_secs(60);
pub const ANY_PORTS: [&str; 4] = ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];

pub fn model() -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/public").join(tests::MODEL);
    folder.to_str().expect("a path in UTF-8").to_owned()
}

/// Flags in one list.
pub fn all(parts: &[&[&str]], owned: &[Vec<String>]) -> Vec<String> {
    let parts = parts.concat().into_iter().map(str::to_owned);
    parts.chain(owned.concat()).collect()
}

/// `lockstep` with what it logs.
pub fn logged(flags: &[String]) -> (Process, Log) {
    Process::logged(&flags.iter().map(String::as_str).collect::<Vec<_>>())
}

/// How `lockstep` ends by itself, and what it says on both outputs.
pub fn run(flags: &[String]) -> (bool, String) {
    let mut command = Command::new(lockstep());
    let output = command.args(flags).stdin(Stdio::null()).output().expect("lockstep runs");
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// Waits until a log has each of these.
pub fn says(what: &str, log: &Log, parts: &[&str]) {
    let whole = |text: &String| parts.iter().all(|part| text.contains(part));
    wait_for(what, DEADLINE, || log.text(), whole);
}

/// A worker that computes nothing, and its log.
pub fn mock(flags: &[&str], tls: Vec<String>) -> (Process, Log) {
    let model = model();
    let own = ["worker", "--engine", "mock", "--model", &model, "--listen", "127.0.0.1:0"];
    logged(&all(&[&own, flags], &[tls]))
}

/// A router of fixed workers, and its log.
pub fn router(workers: &str, tls: &[Vec<String>]) -> (Process, Log) {
    logged(&all(&[&["router", "--workers", workers], &ANY_PORTS], tls))
}

/// The CA, a client's certificate and its key.
pub fn files(ca: &Ca, client: &str) -> [String; 3] {
    ["ca.crt".to_owned(), format!("{client}.crt"), format!("{client}.key")].map(|f| ca.path(&f))
}
