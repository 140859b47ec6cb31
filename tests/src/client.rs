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
