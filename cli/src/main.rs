#![forbid(unsafe_code)]
//! The binary `lockstep`.

fn main() {}
