#![forbid(unsafe_code)]
//! The Qwen family: checkpoints in, next-token logits out.

mod config;
mod error;
mod llama;
mod qwen1;
mod qwen2;
mod qwen3;
mod shard;
mod weights;

pub use config::{DecoderConfig, Rope, RopeScaling};
pub use error::ModelError;
pub use shard::Shard;
pub use weights::Checkpoint;
