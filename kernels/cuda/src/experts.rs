//! Mixtures of experts. Kernels: `experts.cu`.
//!
//! Experts' matrices are bf16, whatever the checkpoint and the other weights are stored as:
//! products by expert have no other kernel.

use super::{
    Array, Cuda, Driver, Element, Launch,
    elementwise::{THREADS, VECTOR, bf16_vectors},
    linear::upload,
};
use kernels::{
    ExpertRows, KernelError, Routes, Tensor, WeightPart,
    shape::{self, ensure},
};

/// Rows of W in a tile.
const ROWS: usize = 128;
/// Columns of a stage, and stages.
const STAGE_COLS: usize = 64;
const STAGES: usize = 3;
/// Places in a tile, and the kernel.
const FEW: (usize, &str) = (16, "expert_linear_t16");
const MANY: (usize, &str) = (64, "expert_linear_t64");
/// From this many places an expert on, tiles of many are taken.
const MANY_FROM: usize = 32;
/// Of a grid, in its second dimension.
const TILES_MAX: usize = 65535;
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
struct LinearArgs {
    weight: u64,
    x: u64,
    out: u64,
    pairs: u64,
    starts: u64,
    experts: u32,
    rows: u32,
    cols: u32,
    pairs_of: u32,
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

/// A matrix [N, K] of each expert, in bf16, one behind another.
pub struct CudaExperts<D: Driver> {
    shape: [usize; 3],
    pushed: usize,
    values: Array<D>,
}

impl<D: Driver> CudaExperts<D> {
    pub(super) fn room(driver: &D, shape: [usize; 3]) -> Result<Self, KernelError> {
        let bytes = shape.iter().fold(Element::Bf16.bytes(), |bytes, n| bytes.saturating_mul(*n));
        Ok(Self { shape, pushed: 0, values: Array::zeroed(driver, "experts", bytes)? })
    }

    pub(super) fn push(
        &mut self,
        device: &Cuda<D>,
        parts: &[WeightPart<'_>],
    ) -> Result<(), KernelError> {
        let (rows, cols) = WeightPart::check(parts)?;
        shape::push_expert(self.shape, self.pushed, (rows, cols))?;
        upload::bf16_at(device, parts, cols, (&self.values, self.pushed * rows))?;
        self.pushed += 1;
        Ok(())
    }
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
        let [count, n, k] = experts.shape;
        shape::expert_linear(out, x, rows, [experts.pushed, n, k], routes)?;
        bf16_vectors(OP, &[out, x])?;
        if out.rows == 0 {
            return Ok(());
        }
        let args = LinearArgs {
            weight: experts.values.address(&self.driver),
            x: self.at(x),
            out: self.at(out),
            pairs: routes.pairs.address(&self.driver),
            starts: routes.starts.address(&self.driver),
            experts: count as u32,
            rows: n as u32,
            cols: k as u32,
            pairs_of: match rows {
                ExpertRows::Tokens => routes.routing.per_token as u32,
                ExpertRows::Pairs => 0,
            },
        };
        let (places, kernel) = if out.rows < count * MANY_FROM { FEW } else { MANY };
        // Each expert may leave one tile unfilled.
        let tiles = out.rows.min(out.rows / places + count);
        ensure(OP, tiles <= TILES_MAX, || {
            format!("{} pairs of tokens and experts in one step: make steps shorter", out.rows)
        })?;
        let grid = [n.div_ceil(ROWS) as u32, tiles as u32, 1];
        let stage_bytes = (ROWS + places) * STAGE_COLS * Element::Bf16.bytes();
        let shared = (STAGES * stage_bytes) as u32;
        self.launch_dependent(Launch::new(kernel, grid, THREADS, &args).shared(shared))
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
