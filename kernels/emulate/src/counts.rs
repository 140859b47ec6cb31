//! What an emulated device was asked to do, seen from outside.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

/// Counts of one device; clones share them.
#[derive(Clone, Default)]
pub struct Counts(Arc<Inner>);

#[derive(Default)]
struct Inner {
    writes: AtomicUsize,
    bytes: AtomicUsize,
    reads: AtomicUsize,
    launches: AtomicUsize,
    replays: AtomicUsize,
    captured: Mutex<Vec<Vec<String>>>,
}

impl Counts {
    /// Copies to the device.
    pub fn writes(&self) -> usize {
        self.0.writes.load(Relaxed)
    }

    /// Bytes of those.
    pub fn written_bytes(&self) -> usize {
        self.0.bytes.load(Relaxed)
    }

    /// Copies from the device, each of which waits for it.
    pub fn reads(&self) -> usize {
        self.0.reads.load(Relaxed)
    }

    /// Kernels and products that were launched one by one.
    pub fn launches(&self) -> usize {
        self.0.launches.load(Relaxed)
    }

    /// Graphs that were launched.
    pub fn replays(&self) -> usize {
        self.0.replays.load(Relaxed)
    }

    /// The kernels of every graph that was captured, in order; products are "a product".
    pub fn captured(&self) -> Vec<Vec<String>> {
        self.graphs().clone()
    }

    fn graphs(&self) -> MutexGuard<'_, Vec<Vec<String>>> {
        self.0.captured.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wrote(&self, bytes: usize) {
        self.0.writes.fetch_add(1, Relaxed);
        self.0.bytes.fetch_add(bytes, Relaxed);
    }

    pub(super) fn read(&self) {
        self.0.reads.fetch_add(1, Relaxed);
    }

    pub(super) fn launched(&self) {
        self.0.launches.fetch_add(1, Relaxed);
    }

    pub(super) fn replayed(&self) {
        self.0.replays.fetch_add(1, Relaxed);
    }

    pub(super) fn has_captured(&self, kernels: Vec<String>) {
        self.graphs().push(kernels);
    }
}
