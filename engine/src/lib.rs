#![forbid(unsafe_code)]
//! Tokens and blocks: which tokens run next, on which KV blocks. Pure and synchronous.

pub mod plan;
