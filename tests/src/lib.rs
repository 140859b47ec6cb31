#![forbid(unsafe_code)]
//! Real processes under test: starts them, waits for their ready line, speaks HTTP to them and ends
//! them with the value. Every wait has a deadline; what goes wrong fails the test that asked.

mod certs;
mod client;
mod cluster;
mod connection;
mod etcd;
mod fault_table;
mod http;
mod load;
mod network;
mod process;
mod registry;
mod streams;
mod supervised;

use std::{
    thread,
    time::{Duration, Instant},
};

pub use certs::{Ca, half};
pub use client::{client, tls_answer, tls_client};
pub use cluster::{Cluster, MODEL, address, metric, workers};
pub use connection::Connection;
pub use etcd::{etcd, secure_etcd};
pub use fault_table::{FaultTable, seconds};
pub use http::{Reply, exchange, request};
pub use load::{Load, Outcome};
pub use network::{Network, in_own_network};
pub use process::{Log, Process, full_pipe, is_there, lockstep, signal};
pub use registry::Registry;
pub use streams::{Answer, Choice, Round, Streams, repeatable};
pub use supervised::Supervised;

/// Leaves a test out, loudly, for want of something; under `./dev test`, which brings everything,
/// that is a failure.
pub fn skip<T>(want: &str) -> Option<T> {
    let whole = std::env::var_os("LOCKSTEP_TEST_WHOLE").is_some();
    assert!(!whole, "./dev test must bring what this test needs: {want}");
    eprintln!("SKIPPED: {want}");
    None
}

/// Polls until it is so; a failure says what it waited for and what it saw last.
pub fn wait_for<T: std::fmt::Debug>(
    what: &str,
    deadline: Duration,
    look: impl Fn() -> T,
    good: impl Fn(&T) -> bool,
) {
    let began = Instant::now();
    loop {
        let seen = look();
        if good(&seen) {
            return;
        }
        let waited = began.elapsed();
        assert!(waited < deadline, "{what}: not within {deadline:?}, but {seen:?}");
        thread::sleep(Duration::from_millis(100));
    }
}
