//! What measurements launch themselves. Kernels: `bench.cu`.

use super::{
    Cuda, Driver, Launch,
    elementwise::{VECTOR, bf16_vectors},
};
use kernels::{KernelError, Tensor};

/// As the kernels have them.
const THREADS: u32 = 512;
/// Blocks that read on each multiprocessor, as many as fit.
const READERS: u32 = 4;

#[repr(C)]
#[derive(Clone, Copy)]
struct NoiseArgs {
    out: u64,
    vectors: u64,
    seed: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ReadArgs {
    out: u64,
    from: u64,
    vectors: u64,
}

impl<D: Driver> Cuda<D> {
    /// out [T, H] in bf16 becomes noise, evenly spread over (-1, 1), made by the device.
    ///
    /// # Errors
    /// `KernelError::Shape` for rows that are no multiple of 16 bytes; the driver's own.
    pub fn fill_noise(&self, out: &mut Tensor<Self>, seed: u64) -> Result<(), KernelError> {
        bf16_vectors("fill_noise", &[out])?;
        let vectors = out.rows * out.cols / VECTOR;
        if vectors == 0 {
            return Ok(());
        }
        let args = NoiseArgs { out: self.at(out), vectors: vectors as u64, seed };
        let blocks = vectors.div_ceil(THREADS as usize) as u32;
        self.driver.launch(Launch::new("noise_bf16", [blocks, 1, 1], THREADS, &args))
    }

    /// Reads x [T, H], in bf16, once, as fast as the device can, and does nothing with it.
    ///
    /// # Errors
    /// As [`Self::fill_noise`].
    pub fn read_all(&self, x: &Tensor<Self>) -> Result<(), KernelError> {
        bf16_vectors("read_all", &[x])?;
        let vectors = (x.rows * x.cols / VECTOR) as u64;
        let args = ReadArgs { out: self.at(x), from: self.at(x), vectors };
        let blocks = self.driver.facts().multiprocessors * READERS;
        self.driver.launch(Launch::new("read_all", [blocks, 1, 1], THREADS, &args))
    }
}
