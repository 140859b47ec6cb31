//! Products by pair of token and expert. Kernels: `skinny_experts.cuh`.

use super::{Extent, HEAD_BYTES, LinearArgs, Place, THREADS, kernel_of};
use crate::{Cuda, Driver, Launch};
use kernels::{KernelError, shape::ensure};

#[repr(C)]
#[derive(Clone, Copy)]
struct ExpertsArgs {
    product: LinearArgs,
    pairs: u64,
    starts: u64,
    experts: u32,
    pairs_of: u32,
}

/// The pairs of a step as they lie sorted, by address.
#[derive(Clone, Copy)]
pub(crate) struct Pairs {
    pub pairs: u64,
    pub starts: u64,
    pub experts: usize,
    /// How many there are, and of one token.
    pub count: usize,
    pub per_token: usize,
    /// Whether x has a row for each token, or for each place.
    pub by_token: bool,
}

impl Pairs {
    /// Places of an expert that are multiplied at once: more than most experts have, and no more
    /// than any can. An expert that has more is read again, from the L2; bits do not depend on it.
    fn at_once(&self) -> usize {
        let even = self.count.div_ceil(self.experts);
        (2 * even).min(self.count / self.per_token)
    }
}

impl<D: Driver> Cuda<D> {
    /// out [pairs, N] by place = x · weightᵀ of each place's expert; of pairs of gate and up,
    /// out [pairs, N / 2] = silu(gate) · up. `first` is the first expert's weight, the others'
    /// follow it. In bf16, by address.
    pub(crate) fn multiply_by_expert(
        &self,
        (out, x): (u64, u64),
        first: &Place,
        of: Pairs,
    ) -> Result<(), KernelError> {
        let (numbers, facts) = (first.numbers, self.driver.facts());
        // Where each expert's units begin, and its places.
        let listed = 2 * (of.experts + 1) * size_of::<u32>();
        let room = self.shared_room().saturating_sub(listed);
        let tile = numbers.token_tile(of.at_once(), room);
        let stages = numbers.stages(tile, room);
        // Each expert may have one unit of a tile that is not full.
        let walks = of.count.min(of.count / tile + of.experts);
        let units = walks.saturating_mul(Extent::tiles(first.extent));
        ensure("expert_linear", i32::try_from(units).is_ok(), || {
            format!("{} pairs of tokens and experts in one step: make steps shorter", of.count)
        })?;
        let product = LinearArgs { x, out, parts: 1, stages: stages as u32, ..first.args(facts) };
        let args = ExpertsArgs {
            product,
            pairs: of.pairs,
            starts: of.starts,
            experts: of.experts as u32,
            pairs_of: if of.by_token { of.per_token as u32 } else { 0 },
        };
        let kernel = numbers.kernels().experts[kernel_of(tile)];
        let grid = [(units as u32).min(facts.multiprocessors).max(1), 1, 1];
        let shared = (HEAD_BYTES + stages * numbers.stage_bytes(tile) + listed) as u32;
        self.launch_dependent(Launch::new(kernel, grid, THREADS, &args).shared(shared))
    }
}
