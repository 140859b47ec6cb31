#![forbid(unsafe_code)]
//! Whole clusters: in one process, and of real processes with a real etcd.
