//! Why a group could not start, a request was not taken, or a stream ended early.

use std::{io, net::SocketAddr};

use cluster::MembershipError;
use engine::EngineError;
use model::ModelError;

/// One variant for each case that a caller treats differently.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The scheduler refused a request.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A request that no worker of this model could run.
    #[error("{0}")]
    Invalid(String),
    /// The worker finishes what it has and takes nothing new.
    #[error("worker is draining; try another")]
    Draining,
    /// The group is lost, and every stream with it.
    #[error("the group failed: {0}")]
    Group(String),
    /// The checkpoint, or what was asked of it.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Settings that contradict each other or the machine.
    #[error("{0}")]
    Config(String),
    /// Told before anything is loaded.
    #[error("not enough memory: {0}")]
    Memory(String),
    #[error("cannot listen on {addr}: {source}; choose another address or stop who uses it")]
    Bind { addr: SocketAddr, source: io::Error },
    #[error(transparent)]
    Membership(#[from] MembershipError),
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    /// Running streams did not end in time; they were cut.
    #[error("drained for {seconds} s, then cut {streams} streams that had not finished")]
    DrainLimit { seconds: u64, streams: usize },
}

impl WorkerError {
    /// For `map_err`: says what was being done.
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}
