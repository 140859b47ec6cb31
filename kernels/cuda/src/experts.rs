//! Mixtures of experts: choosing, products by expert, and sums. Kernels: `experts.cu`,
//! `skinny_experts.cuh`.

mod weights;

use super::{
    Cuda, Driver, Element, Launch,
    elementwise::{THREADS, VECTOR, bf16_vectors},
    skinny::Pairs,
};
use kernels::{
    ExpertRows, KernelError, Routes, Tensor,
    shape::{self, ensure},
};
pub use weights::CudaExperts;

/// Warps in a block, each of which chooses for one token.
const WARPS: usize = THREADS as usize / 32;

#[repr(C)]
#[derive(Clone, Copy)]
struct RouteArgs {
    logits: u64,
    weights: u64,
    chosen: u64,
    tokens: u32,
    experts: u32,
    per_token: u32,
    logit_cols: u32,
    weight_cols: u32,
    normalise: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct SortArgs {
    chosen: u64,
    pairs: u64,
    places: u64,
    starts: u64,
    count: u32,
    unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CombineArgs {
    out: u64,
    x: u64,
    shared: u64,
    places: u64,
    weights: u64,
    vectors: u32,
    row_vectors: u32,
    per_token: u32,
    unused: u32,
}

impl<D: Driver> Cuda<D> {
    pub(super) fn choose_experts(
        &self,
        routes: &mut Routes<Self>,
        logits: &Tensor<Self>,
    ) -> Result<(), KernelError> {
        shape::route(routes, logits)?;
        let exact = [&logits.data, &routes.weights.data].map(|data| data.element());
        ensure("route", exact == [Element::F32; 2], || format!("{exact:?}, not f32"))?;
        let (tokens, count) = (logits.rows, routes.pairs());
        if tokens == 0 {
            return Ok(());
        }
        ensure("route", count <= i32::MAX as usize, || format!("{count} pairs"))?;
        let routing = routes.routing;
        let args = RouteArgs {
            logits: self.at(logits),
            weights: self.at(&routes.weights),
            chosen: routes.chosen.address(&self.driver),
            tokens: tokens as u32,
            experts: routing.experts as u32,
            per_token: routing.per_token as u32,
            logit_cols: routing.logits() as u32,
            weight_cols: routing.weights() as u32,
            normalise: u32::from(routing.normalise),
        };
        let blocks = tokens.div_ceil(WARPS) as u32;
        self.launch_dependent(Launch::new("experts_choose", [blocks, 1, 1], THREADS, &args))?;
        let args = SortArgs {
            chosen: routes.chosen.address(&self.driver),
            pairs: routes.pairs.address(&self.driver),
            places: routes.places.address(&self.driver),
            starts: routes.starts.address(&self.driver),
            count: count as u32,
            unused: 0,
        };
        let shared = (WARPS * size_of::<u32>()) as u32;
        let grid = [routing.experts as u32, 1, 1];
        self.launch_dependent(Launch::new("experts_sort", grid, THREADS, &args).shared(shared))
    }

    pub(super) fn expert_product(
        &self,
        out: &mut Tensor<Self>,
        x: &Tensor<Self>,
        rows: ExpertRows,
        experts: &CudaExperts<D>,
        routes: &Routes<Self>,
    ) -> Result<(), KernelError> {
        const OP: &str = "expert_linear";
        let shape = experts.pushed_shape();
        shape::expert_linear(out, x, rows, shape, routes)?;
        ensure(OP, !experts.are_paired(), || {
            "experts' gates and ups are multiplied by `expert_gated` alone".into()
        })?;
        self.multiply_pairs(OP, (out, x), rows, experts, routes)
    }

    /// out [T k, I] by place = silu(gate) · up of x · Wᵀ, with the bits of the two ops.
    pub(super) fn gated_expert_product(
        &self,
        out: &mut Tensor<Self>,
        room: &Tensor<Self>,
        x: &Tensor<Self>,
        experts: &CudaExperts<D>,
        routes: &Routes<Self>,
    ) -> Result<(), KernelError> {
        const OP: &str = "expert_gated";
        let rows = ExpertRows::Tokens;
        shape::expert_linear(room, x, rows, experts.pushed_shape(), routes)?;
        ensure(OP, experts.are_paired(), || {
            format!("{} columns are no gates and ups of whole vectors", room.cols)
        })?;
        self.multiply_pairs(OP, (out, x), rows, experts, routes)
    }

    fn multiply_pairs(
        &self,
        op: &'static str,
        (out, x): (&mut Tensor<Self>, &Tensor<Self>),
        rows: ExpertRows,
        experts: &CudaExperts<D>,
        routes: &Routes<Self>,
    ) -> Result<(), KernelError> {
        bf16_vectors(op, &[out, x])?;
        if out.rows == 0 {
            return Ok(());
        }
        let pairs = Pairs {
            pairs: routes.pairs.address(&self.driver),
            starts: routes.starts.address(&self.driver),
            experts: routes.routing.experts,
            count: routes.pairs(),
            per_token: routes.routing.per_token,
            by_token: rows == ExpertRows::Tokens,
        };
        self.multiply_by_expert((self.at(out), self.at(x)), &experts.first(&self.driver), pairs)
    }

    pub(super) fn sum_experts(
        &self,
        out: &mut Tensor<Self>,
        x: &Tensor<Self>,
        shared: Option<&Tensor<Self>>,
        routes: &Routes<Self>,
    ) -> Result<(), KernelError> {
        const OP: &str = "combine";
        shape::combine(out, x, shared, routes)?;
        bf16_vectors(OP, &[out, x])?;
        bf16_vectors(OP, shared.as_slice())?;
        let row_vectors = out.cols / VECTOR;
        let vectors = out.rows * row_vectors;
        ensure(OP, vectors <= i32::MAX as usize, || format!("{vectors} vectors in one step"))?;
        let args = CombineArgs {
            out: self.at(out),
            x: self.at(x),
            shared: shared.map_or(0, |shared| self.at(shared)),
            places: routes.places.address(&self.driver),
            weights: self.at(&routes.weights),
            vectors: vectors as u32,
            row_vectors: row_vectors as u32,
            per_token: routes.routing.per_token as u32,
            unused: 0,
        };
        self.launch_vectors("experts_combine", vectors.div_ceil(THREADS as usize) as u32, &args)
    }
}
