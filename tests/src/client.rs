//! The Python clients in `tests/python`, run against a router.

use crate::{Process, skip};
use std::{path::Path, process::Command, time::Duration};

const DEADLINE: Duration = Duration::from_secs(600);

/// What `script` printed, once it ended well; `None` without the packages it needs.
pub fn client(router: &Process, script: &str) -> Option<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ has a parent");
    let python = root.join(".venv/bin/python");
    if !python.exists() {
        return skip(&format!("no {}; `./dev test` makes it and runs this", python.display()));
    }
    let mut command = Command::new(python);
    command
        .arg(root.join("tests/python").join(script))
        .env("LOCKSTEP_TEST_HTTP", format!("http://{}", router.address("http")))
        .env("LOCKSTEP_TEST_GRPC", format!("http://{}", router.address("grpc")));
    let (status, output) = Process::run(&mut command, DEADLINE);
    assert!(status.success(), "{script}: {status}");
    Some(output)
}

/// `tests/python/tls_client.py`, to be run against `address` with a CA and, but for `-`, a
/// certificate and its key; `None` without the Python packages.
pub fn tls_client(
    command: &str,
    address: &str,
    files: [&str; 3],
    more: &[&str],
) -> Option<Command> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ has a parent");
    let python = root.join(".venv/bin/python");
    if !python.exists() {
        return skip(&format!("no {}; `./dev test` makes it and runs this", python.display()));
    }
    let (host, port) = address.rsplit_once(':').expect("host:port");
    let mut made = Command::new(python);
    made.arg(root.join("tests/python/tls_client.py")).args([command, host, port]);
    made.args(files).args(more);
    Some(made)
}

/// What that printed.
pub fn tls_answer(command: &str, address: &str, files: [&str; 3], more: &[&str]) -> Option<String> {
    let (status, output) = Process::run(&mut tls_client(command, address, files, more)?, DEADLINE);
    assert!(status.success(), "{command}: {status}");
    Some(output)
}
