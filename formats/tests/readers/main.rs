//! What is read, and what is refused.

#[path = "../common/mod.rs"]
mod common;

mod files;
mod gguf;
mod safetensors;
