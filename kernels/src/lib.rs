#![forbid(unsafe_code)]
//! What one device can do: the ops of a step, their shapes, the formats of weights, and the plain
//! oracle that every backend is compared with.
//!
//! Every tensor is a row-major matrix `[rows, cols]`, the step's tokens flattened across sequences.
//! Ops write to their first argument, allocate nothing and check shapes in one place (`shape`).
//! Shape letters: `T` tokens, `S` sequences, `H` hidden, `D` head_dim, `I` intermediate, `V`
//! vocabulary, `E` experts, `k` experts of a token.

mod batch;
pub mod host;
pub mod plain;
pub mod routing;
pub mod sampling;
pub mod shape;
mod tensor;
pub mod weight;

pub use batch::{Batch, BatchRoom, LAST_SAMPLED, Step, StepSequence, TableBlock};
pub use routing::{ExpertRows, Routes, Routing};
use sampling::{Refused, SampleRequest, Sampled};
pub use shape::ShapeError;
pub use tensor::Tensor;
pub use weight::{
    Format, Grouped, Groups, IntegerShape, PartShape, Random, RandomFormat, Scaled, Stored,
    WeightPart,
};

/// Tokens in one KV block.
pub const BLOCK_TOKENS: usize = 16;

/// Rows of logits that are computed together where a device knows nothing better.
pub const LOGIT_ROWS_MAX: usize = 64;

/// Why an op, an allocation or an upload was refused.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Shapes that do not fit each other: a fault in the caller.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The device cannot hold what was asked for.
    #[error("cannot allocate {bytes} bytes for {what}")]
    Memory { what: &'static str, bytes: usize },
    /// The backend has no kernel for this weight, e.g. columns that split a quantisation block.
    #[error("unsupported weight: {0}")]
    Weight(String),
    /// The device itself failed.
    #[error("device: {0}")]
    Device(String),
}

/// Attention heads on this rank. `q` is a multiple of `kv`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    pub q: usize,
    pub kv: usize,
    pub dim: usize,
}

impl Heads {
    /// Columns of a packed row: every query head, then every key head, then every value head.
    pub fn qkv_cols(&self) -> usize {
        (self.q + 2 * self.kv) * self.dim
    }
}

/// What happens to packed rows between the product that makes them and attention.
pub struct Rotation<'a, B: Backend> {
    /// Weights [1, D] of the query heads' norm and of the key heads', and its epsilon.
    pub norm: Option<(&'a Tensor<B>, &'a Tensor<B>, f32)>,
    /// [P, D], in f32: D/2 cosines, then D/2 sines.
    pub cos_sin: &'a Tensor<B>,
    pub heads: Heads,
}

/// What follows a sum that ends half a layer: [`Backend::add_rms_norm`] of it.
pub struct AddNorm<'a, B: Backend> {
    /// [T, H], which takes up the sum.
    pub x: &'a mut Tensor<B>,
    /// [T, H] the norm of x.
    pub out: &'a mut Tensor<B>,
    /// [1, H]
    pub weight: &'a Tensor<B>,
    pub eps: f32,
}

/// How ranks make one result of a product whose inputs are spread over them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Join {
    /// Inputs are gathered, and each rank computes some columns of all of them. No sum is cut: bits
    /// are the same on any number of ranks.
    Gather,
    /// Each rank multiplies its own inputs, and the results are summed: fewer bytes on the way.
    Sum,
}

/// What one device can do. A row's result never depends on the batch's other rows, on how a prompt
/// was cut into chunks, nor on the number of threads: every sum runs in one fixed order.
pub trait Backend: Send + Sync + Sized + 'static {
    /// A device buffer of activations (f32 on the CPU, bf16 on CUDA).
    type Floats: Send + Sync;
    /// A device buffer of 32-bit integers.
    type Ints: Send + Sync;
    /// A weight matrix [N, K] in whatever layout and precision the device multiplies best.
    type Weight: Send + Sync;
    /// One matrix [N, K] of each of a layer's experts.
    type Experts: Send + Sync;
    /// The K and V blocks of one layer.
    type Kv: Send;
    /// How a step's attention is cut; `()` where nothing is made beforehand.
    type Cuts: Send + Sync;
    /// A point in the device's work.
    type Mark: Send;
    /// What choosing tokens on the device takes; `Infallible` where the host chooses them.
    type Sampling: Send;

    // A step, in the order of its ops.

    /// Makes the batch what `step` says. Block tables stay as they were but for the new blocks.
    fn lay_out(&self, batch: &mut Batch<Self>, step: &Step) -> Result<(), KernelError>;
    /// out [T, H] = row `ids[t] - first_id` of `table` [V_local, H]; zeros where that is outside
    /// the table.
    fn embed(
        &self,
        out: &mut Tensor<Self>,
        table: &Self::Weight,
        first_id: usize,
        batch: &Batch<Self>,
    ) -> Result<(), KernelError>;
    /// out [T, H] = x / sqrt(mean(x²) + eps) · weight [1, H].
    fn rms_norm(
        &self,
        out: &mut Tensor<Self>,
        x: &Tensor<Self>,
        weight: &Tensor<Self>,
        eps: f32,
    ) -> Result<(), KernelError>;
    /// out [T, N] = x [T, K] · weight [N, K]ᵀ + bias [1, N].
    fn linear(
        &self,
        out: &mut Tensor<Self>,
        x: &Tensor<Self>,
        weight: &Self::Weight,
        bias: Option<&Tensor<Self>>,
    ) -> Result<(), KernelError>;
    /// Norms (where there are weights), then rotates the query and key heads of qkv
    /// [T, (q + 2 kv) D] (rotate-half), queries times `batch.q_scale`. Queries stay in place, keys
    /// go to `batch.slots` of the cache with the values. What is left of the key heads in qkv is
    /// the device's own affair: attention takes them from the cache.
    fn rotate_and_store(
        &self,
        kv: &mut Self::Kv,
        qkv: &mut Tensor<Self>,
        rotation: &Rotation<'_, Self>,
        batch: &Batch<Self>,
    ) -> Result<(), KernelError>;
    /// out [T, q D] = softmax(q kᵀ / sqrt(D)) v over the sequence's cached keys at positions ≤ the
    /// row's own, and > position − `window` where there is one. This step's K and V are already
    /// stored.
    fn attention(
        &self,
        out: &mut Tensor<Self>,
        qkv: &Tensor<Self>,
        kv: &Self::Kv,
        batch: &Batch<Self>,
        heads: Heads,
        window: Option<usize>,
    ) -> Result<(), KernelError>;
    /// [`Self::rotate_and_store`], then [`Self::attention`] over what is in the cache then. What is
    /// left in qkv is the device's own affair.
    fn rotate_and_attend(
        &self,
        out: &mut Tensor<Self>,
        kv: &mut Self::Kv,
        qkv: &mut Tensor<Self>,
        rotation: &Rotation<'_, Self>,
        batch: &Batch<Self>,
        window: Option<usize>,
    ) -> Result<(), KernelError> {
        self.rotate_and_store(kv, qkv, rotation, batch)?;
        self.attention(out, qkv, kv, batch, rotation.heads, window)
    }
    /// x [T, H] += delta [T, H].
    fn add(&self, x: &mut Tensor<Self>, delta: &Tensor<Self>) -> Result<(), KernelError>;
    /// x [T, H] += delta [T, H], then out [T, H] = x / sqrt(mean(x²) + eps) · weight [1, H]: what
    /// ends one half of a layer and begins the next.
    fn add_rms_norm(
        &self,
        out: &mut Tensor<Self>,
        x: &mut Tensor<Self>,
        delta: &Tensor<Self>,
        weight: &Tensor<Self>,
        eps: f32,
    ) -> Result<(), KernelError> {
        self.add(x, delta)?;
        self.rms_norm(out, x, weight, eps)
    }
    /// out [T, I] = silu(gate) · up, where x [T, 2 I] is gate, then up.
    fn silu_mul(&self, out: &mut Tensor<Self>, x: &Tensor<Self>) -> Result<(), KernelError>;
    /// out [T, I] = silu(x · gateᵀ) · (x · upᵀ), x [T, K]; `weight` [2 I, K] is of
    /// [`Self::gate_up`]. What is left in `room` [T, 2 I] is the device's own affair.
    fn gated(
        &self,
        out: &mut Tensor<Self>,
        room: &mut Tensor<Self>,
        x: &Tensor<Self>,
        weight: &Self::Weight,
    ) -> Result<(), KernelError> {
        self.linear(room, x, weight, None)?;
        self.silu_mul(out, room)
    }
    /// Chooses the experts of every row of logits [T, E], in f32: the k largest of their softmax
    /// (the first of equals), which are their weights. Column E, where there is a shared expert, is
    /// its gate; its weight is the sigmoid of that.
    fn route(&self, routes: &mut Routes<Self>, logits: &Tensor<Self>) -> Result<(), KernelError>;
    /// out [T k, N] by place = x · W [N, K]ᵀ of each pair's expert; `rows` tells what x holds.
    fn expert_linear(
        &self,
        out: &mut Tensor<Self>,
        x: &Tensor<Self>,
        rows: ExpertRows,
        experts: &Self::Experts,
        routes: &Routes<Self>,
    ) -> Result<(), KernelError>;
    /// out [T k, I] by place = silu(x · gateᵀ) · (x · upᵀ) of each pair's expert, x [T, K];
    /// `experts` are of [`Self::expert_gate_ups`]. What is left in `room` [T k, 2 I] is the
    /// device's own affair.
    fn expert_gated(
        &self,
        out: &mut Tensor<Self>,
        room: &mut Tensor<Self>,
        x: &Tensor<Self>,
        experts: &Self::Experts,
        routes: &Routes<Self>,
    ) -> Result<(), KernelError> {
        self.expert_linear(room, x, ExpertRows::Tokens, experts, routes)?;
        self.silu_mul(out, room)
    }
    /// out [T, N] = the results of each token's experts, x [T k, N] by place, times their weights,
    /// and `shared` [T, N] times its own. Summed in the order of the pairs, `shared` last.
    fn combine(
        &self,
        out: &mut Tensor<Self>,
        x: &Tensor<Self>,
        shared: Option<&Tensor<Self>>,
        routes: &Routes<Self>,
    ) -> Result<(), KernelError>;
    /// out [len, H] = rows `batch.logit_rows[first..first + len]` of x.
    fn gather_rows(
        &self,
        out: &mut Tensor<Self>,
        x: &Tensor<Self>,
        batch: &Batch<Self>,
        first: usize,
        len: usize,
    ) -> Result<(), KernelError>;
    /// Takes what is asked of the rows of logits of the step that is laid out next, in their order,
    /// and to which table's sequence a token is new. It goes to the device with the step.
    fn ask(
        &self,
        _batch: &mut Batch<Self>,
        _room: &mut Self::Sampling,
        _asked: &[(SampleRequest<'_>, Option<usize>)],
    ) -> Result<(), KernelError> {
        Err(no_sampling())
    }
    /// Begins to choose tokens from `logits` [R, V], in f32: rows `first` and on of what was asked
    /// about. They are left in `batch.last_ids` too. The logits are changed meanwhile, and are as
    /// before afterwards.
    fn sample(
        &self,
        _batch: &mut Batch<Self>,
        _room: &mut Self::Sampling,
        _logits: &mut Tensor<Self>,
        _first: usize,
    ) -> Result<(), KernelError> {
        Err(no_sampling())
    }
    /// Waits for the oldest [`Self::sample`] that was not answered. A refused row says why, and is
    /// no error for the others.
    fn answers(
        &self,
        _room: &mut Self::Sampling,
    ) -> Result<Vec<Result<Sampled, Refused>>, KernelError> {
        Err(no_sampling())
    }
    /// Whether a step may follow another that was not answered: the device knows what it sampled.
    fn keeps_sampled(&self) -> bool {
        false
    }
    /// A point behind all work so far.
    fn mark(&self) -> Result<Self::Mark, KernelError>;
    /// Waits for it.
    fn wait(&self, mark: Self::Mark) -> Result<(), KernelError>;

    // Steps that are the same each time.

    /// Rows to which a step of `rows` sequences with one row each is padded, so that its ops can be
    /// run as they were captured from another of that size; `None` where nothing is captured.
    fn graph_rows(&self, _rows: usize) -> Option<usize> {
        None
    }
    /// Runs `ops` of a step whose sequences have one row each, padded to [`Self::graph_rows`]; or
    /// runs again what they were captured as. They write to the same tensors in each such step.
    fn captured<E: From<KernelError>>(
        &self,
        _batch: &Batch<Self>,
        ops: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        ops()
    }
    /// Waits for what was launched, and forgets what was captured: what it points to may go.
    fn forget_steps(&self) -> Result<(), KernelError> {
        Ok(())
    }
    /// Rows of logits that are computed at once: bounds their memory whatever a step asks for.
    fn logit_rows_max(&self) -> usize {
        LOGIT_ROWS_MAX
    }

    // What is taken before the first step, and what the host writes and reads.

    /// How ranks join the results of attention and of feed-forward blocks.
    fn join(&self) -> Join {
        Join::Gather
    }

    /// Zeroed.
    fn floats(&self, len: usize) -> Result<Self::Floats, KernelError>;
    /// As [`Self::floats`], in f32 whatever the device's activations are: for tables and logits.
    fn exact_floats(&self, len: usize) -> Result<Self::Floats, KernelError> {
        self.floats(len)
    }
    /// Zeroed.
    fn ints(&self, len: usize) -> Result<Self::Ints, KernelError>;
    /// Writes the first `values.len()` elements.
    fn write_floats(&self, to: &mut Self::Floats, values: &[f32]) -> Result<(), KernelError>;
    /// Writes the first `values.len()` elements.
    fn write_ints(&self, to: &mut Self::Ints, values: &[i32]) -> Result<(), KernelError>;
    /// Reads the first `to.len()` elements.
    fn read_floats(&self, to: &mut [f32], from: &Self::Floats) -> Result<(), KernelError>;
    /// The elements themselves where they are f32 in host memory: spares an exchange two copies.
    fn host_floats<'a>(&self, _floats: &'a mut Self::Floats) -> Option<&'a mut [f32]> {
        None
    }
    /// As [`Self::host_floats`], for reading.
    fn host_view<'a>(&self, _floats: &'a Self::Floats) -> Option<&'a [f32]> {
        None
    }
    /// Repacks `parts`, stacked by rows: part 0's outputs come first. All share K.
    fn weight(&self, parts: &[WeightPart<'_>]) -> Result<Self::Weight, KernelError>;
    /// As [`Self::weight`], for a matrix whose rows are looked up or make logits, and which devices
    /// that round weights further leave as it is.
    fn table(&self, parts: &[WeightPart<'_>]) -> Result<Self::Weight, KernelError> {
        self.weight(parts)
    }
    /// As [`Self::weight`], for [`Self::gated`] alone: half of the rows are gate's, then come as
    /// many of up.
    fn gate_up(&self, parts: &[WeightPart<'_>]) -> Result<Self::Weight, KernelError> {
        self.weight(parts)
    }
    /// Room for a matrix [N, K] of each of `count` experts. `stack` is what each consists of:
    /// integers in groups only where all experts have such.
    fn experts(&self, count: usize, stack: &[PartShape]) -> Result<Self::Experts, KernelError>;
    /// As [`Self::experts`], for [`Self::expert_gated`] alone: half of the rows are gate's, then
    /// come as many of up.
    fn expert_gate_ups(
        &self,
        count: usize,
        stack: &[PartShape],
    ) -> Result<Self::Experts, KernelError> {
        self.experts(count, stack)
    }
    /// Repacks the next expert's matrix, as [`Self::weight`] does.
    fn push_expert(
        &self,
        to: &mut Self::Experts,
        parts: &[WeightPart<'_>],
    ) -> Result<(), KernelError>;
    /// Room for the K and V of `blocks` blocks. Zeroed.
    fn kv(&self, blocks: usize, heads: Heads) -> Result<Self::Kv, KernelError>;
    /// Bytes that `kv` takes for one block of one layer.
    fn kv_block_bytes(&self, heads: Heads) -> usize;
    /// Room for the cuts of steps of that size.
    fn cuts(&self, room: &BatchRoom) -> Result<Self::Cuts, KernelError>;
    /// Room for choosing tokens from up to `rows_max` rows of `vocab` logits, of which the first
    /// `drawable` stand for tokens; `None` where the host had better read the logits.
    fn sampling(
        &self,
        _rows_max: usize,
        _vocab: usize,
        _drawable: usize,
    ) -> Result<Option<Self::Sampling>, KernelError> {
        Ok(None)
    }
}

fn no_sampling() -> KernelError {
    KernelError::Device("the host chooses this device's tokens".into())
}
