//! What is expected of every CUDA kernel, on whatever device runs it.
//!
//! A check compares ops of [`Cuda`] with the plain oracle on shapes made to hurt: length 1, block
//! boundaries and their neighbours, empty splits, long contexts, NaNs in blocks that nobody owns.
//! Tests run the checks on the host emulation, `gpu-check` on a device.
#![forbid(unsafe_code)]

pub mod accuracy;
pub mod bench;
pub mod chained;
mod compare;
pub mod decode;
mod e4m3;
pub mod elementwise;
pub mod every_rows;
pub mod experts;
mod flat;
pub mod fp8;
pub mod gated;
pub mod int4;
pub mod laid_out;
pub mod linear;
pub mod norm;
pub mod paged;
pub mod peers;
pub mod prefill;
pub mod prefill_sm90;
pub mod random;
pub mod rope;
pub mod sampling;
pub mod skinny;
pub mod turned;

pub use compare::{Tolerance, compare};

use cuda::{Cuda, CudaConfig, Driver, KvFormat, PrefillKernel, WeightFormat};

/// One kernel on one family of shapes.
pub struct Check<D: Driver> {
    /// e.g. "add".
    pub name: &'static str,
    /// What was wrong, in words, where something was.
    pub run: fn(Device<'_, D>) -> Result<(), String>,
}

/// Makes a device for a check.
pub type Device<'a, D> = &'a dyn Fn(CudaConfig) -> Cuda<D>;

/// bf16 throughout.
pub const BF16: CudaConfig = CudaConfig {
    kv_format: KvFormat::Bf16,
    prefill: PrefillKernel::Fastest,
    weights: WeightFormat::Bf16,
    overlap: true,
};

/// Every check that a sanitizer has time for.
pub fn all<D: Driver>() -> Vec<Check<D>> {
    [
        chained::checks(),
        elementwise::checks(),
        every_rows::checks(),
        experts::checks(),
        fp8::checks(),
        gated::checks(),
        int4::checks(),
        laid_out::checks(),
        linear::checks(),
        norm::checks(),
        peers::checks(),
        rope::checks(),
        accuracy::checks(),
        prefill::checks(),
        prefill_sm90::checks(),
        random::checks(),
        decode::checks(),
        decode::long_checks(),
        sampling::checks(),
        skinny::checks(),
        turned::checks(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The checks of what reading alone expects to fail on a device first, in that order.
pub fn risks<D: Driver>() -> Vec<Check<D>> {
    [
        every_rows::checks(),
        prefill_sm90::checks(),
        skinny::checks(),
        gated::checks(),
        int4::checks(),
        experts::checks(),
        decode::checks(),
        turned::checks(),
        chained::checks(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Reproducible values, about evenly spread over (-1, 1).
pub fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// `values` as bf16 holds them.
pub fn rounded(values: &[f32]) -> Vec<f32> {
    values.iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect()
}
