#![forbid(unsafe_code)]
//! The Qwen family: checkpoints in, next-token logits out.

mod config;
mod decoder;
mod elements;
mod error;
mod families;
mod llama;
mod moe;
mod qwen1;
mod qwen2;
mod qwen3;
mod rope;
mod runner;
mod sampler;
pub mod score;
mod shard;
mod weights;

pub use config::{DecoderConfig, Experts, Rope, RopeScaling};
pub use decoder::Loaded;
pub use elements::{Elements, elements};
pub use error::ModelError;
pub use families::{FAMILIES, Family};
pub use runner::{ModelShard, Runner, RunnerOptions, prefix_reuse_max};
pub use sampler::{Sampler, Seen, next_token};
pub use shard::Shard;
pub use weights::{Checkpoint, FfnBlock, Numbers, Role, Stack};
