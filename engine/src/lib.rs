#![forbid(unsafe_code)]
//! Tokens and blocks: which tokens run next, on which KV blocks. Pure and synchronous.

pub mod blocks;
mod driven;
pub mod plan;
mod sampling;
mod scheduler;
mod sequence;

pub use driven::Driven;
pub use sampling::{LOGPROBS_MAX, check_count, check_ids};
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
    /// A parameter that no request may have.
    #[error("{name} must be {allowed}, not {value}")]
    Parameter { name: &'static str, value: String, allowed: String },
    /// A token that the model does not have.
    #[error("{name}: token id {id} does not exist; ids are below {vocab}")]
    Token { name: &'static str, id: u32, vocab: usize },
    /// Scheduler and executor no longer speak of the same step; the group is unusable.
    #[error("step {number} returned what was not planned: {reason}")]
    Desync { number: u64, reason: String },
}

impl EngineError {
    /// The parameter that is to blame, where one is.
    pub fn parameter(&self) -> Option<&'static str> {
        match self {
            Self::Parameter { name, .. } | Self::Token { name, .. } => Some(name),
            _ => None,
        }
    }
}
