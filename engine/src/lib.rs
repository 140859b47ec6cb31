#![forbid(unsafe_code)]
//! Tokens and blocks: which tokens run next, on which KV blocks. Pure and synchronous.

pub mod blocks;
pub mod plan;
mod scheduler;
mod sequence;

pub use scheduler::{Position, Scheduler, SchedulerConfig, Stats};
pub use sequence::{End, Request, Update};

/// Why a request was refused, or an output could not be taken over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// Worth another try, here later or elsewhere now.
    #[error("queue is full ({0} requests waiting); retry later")]
    Overloaded(usize),
    /// Can never run here.
    #[error(
        "prompt of {prompt} + {new} tokens exceeds the context of {context}; shorten the prompt"
    )]
    TooLong { prompt: usize, new: usize, context: usize },
    /// Can never run anywhere.
    #[error("{0}")]
    Invalid(&'static str),
    /// Scheduler and executor no longer speak of the same step; the group is unusable.
    #[error("step {number} returned what was not planned: {reason}")]
    Desync { number: u64, reason: String },
}
