#![forbid(unsafe_code)]
//! One worker group: takes token ids, runs the engine and the ranks, streams token ids back.
