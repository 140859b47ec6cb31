//! Against real etcd members; skipped, loudly, where etcd is not installed.

mod contract;
mod faults;
pub(super) mod members;
