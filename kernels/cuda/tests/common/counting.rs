//! A device that computes nothing and counts the bytes that it holds.

use cuda::{Driver, Facts, Gemm, Launch};
use kernels::KernelError;
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

#[derive(Clone)]
pub struct Counting {
    facts: Facts,
    held: Arc<AtomicUsize>,
}

/// Counted until it is dropped.
pub struct Held {
    bytes: usize,
    held: Arc<AtomicUsize>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.held.fetch_sub(self.bytes, Relaxed);
    }
}

impl Counting {
    pub fn new() -> Self {
        let facts = Facts {
            name: "counting".into(),
            compute_capability: (9, 0),
            multiprocessors: 132,
            shared_bytes_max: 227 << 10,
            memory_bytes: 8 << 30,
        };
        Self { facts, held: Arc::default() }
    }

    /// Bytes of all memory that was not given back.
    pub fn held(&self) -> usize {
        self.held.load(Relaxed)
    }
}

impl Driver for Counting {
    type Memory = Held;
    type Graph = ();
    type Reading = usize;

    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn zeroed(&self, _what: &'static str, bytes: usize) -> Result<Held, KernelError> {
        self.held.fetch_add(bytes, Relaxed);
        Ok(Held { bytes, held: Arc::clone(&self.held) })
    }

    fn shared(&self, what: &'static str, bytes: usize) -> Result<Held, KernelError> {
        self.zeroed(what, bytes)
    }

    fn export(&self, _memory: &Held) -> Result<Vec<u8>, KernelError> {
        Ok(Vec::new())
    }

    fn import(&self, _ticket: &[u8]) -> Result<Held, KernelError> {
        Ok(Held { bytes: 0, held: Arc::clone(&self.held) })
    }

    fn address(&self, _memory: &Held) -> u64 {
        256
    }

    fn write(&self, to: &Held, offset: usize, bytes: &[u8]) -> Result<(), KernelError> {
        assert!(offset + bytes.len() <= to.bytes, "a write past the end");
        Ok(())
    }

    fn read(&self, to: &mut [u8], _from: &Held, _offset: usize) -> Result<(), KernelError> {
        to.fill(0);
        Ok(())
    }

    fn begin_read(&self, _from: &Held, _offset: usize, bytes: usize) -> Result<usize, KernelError> {
        Ok(bytes)
    }

    fn end_read(&self, bytes: usize) -> Result<Vec<u8>, KernelError> {
        Ok(vec![0; bytes])
    }

    fn launch(&self, _launch: Launch<'_>) -> Result<(), KernelError> {
        Ok(())
    }

    /// As if it were one of NVIDIA's: libraries find no device by themselves.
    fn stream(&self) -> Result<*mut std::ffi::c_void, KernelError> {
        Ok(std::ptr::null_mut())
    }

    fn gemm(&self, _gemm: Gemm) -> Result<(), KernelError> {
        Ok(())
    }

    fn captures(&self) -> bool {
        false
    }

    fn begin_capture(&self) -> Result<(), KernelError> {
        Ok(())
    }

    fn end_capture(&self) -> Result<(), KernelError> {
        Ok(())
    }

    fn replay(&self, (): &()) -> Result<(), KernelError> {
        Ok(())
    }
}
