#![forbid(unsafe_code)]
//! One worker group: takes token ids, runs the engine and the ranks, streams token ids back.

mod announce;
mod error;
mod group;
mod handle;
mod health;
mod mailbox;
mod metrics;
mod mock;
mod places;
pub mod plan;
mod prefixes;
mod pulse;
mod server;
mod service;
mod validate;
mod watch;

use std::any::Any;

pub use error::WorkerError;
pub use group::{
    Device, Group, GroupConfig, GroupPlan, LoadProgress, ModelInfo, NcclUse, NodeConfig, Nodes,
    RankConfig, RankMode, run_node, run_rank,
};
pub use handle::Engine;
pub use health::Health;
pub use mailbox::{News, Output};
pub use metrics::Metrics;
pub use mock::{MockConfig, MockFault, MockFaultKind, mock_answer};
pub use server::{Worker, WorkerConfig, WorkerHandle};

/// What a caught panic said.
fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "panicked without a message".into())
}
