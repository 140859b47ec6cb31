#![forbid(unsafe_code)]
//! The Qwen family: checkpoints in, next-token logits out.
