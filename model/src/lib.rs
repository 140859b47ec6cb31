#![forbid(unsafe_code)]
//! The Qwen family: checkpoints in, next-token logits out.

mod error;

pub use error::ModelError;
