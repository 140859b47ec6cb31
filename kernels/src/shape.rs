//! One shape check per op, shared by every backend.
//!
//! A check sees only what the host knows of a tensor: rows and columns. What lies inside device
//! buffers (token ids, slots, block tables) is checked by backends whose buffers the host can read.

use crate::{
    Backend, Batch, ExpertRows, Heads, Rotation, Routes, Routing, Tensor,
    routing::{EXPERTS_MAX, EXPERTS_PER_TOKEN_MAX},
};

/// Shapes that do not fit each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{op}: {detail}")]
pub struct ShapeError {
    pub op: &'static str,
    pub detail: String,
}

/// `Ok` where `fits`; the message is only built where it does not.
pub fn ensure(
    op: &'static str,
    fits: bool,
    detail: impl FnOnce() -> String,
) -> Result<(), ShapeError> {
    if fits { Ok(()) } else { Err(ShapeError { op, detail: detail() }) }
}

/// A tensor's `rows` lie within its allocation and both extents are the wanted ones.
fn extents<B: Backend>(
    op: &'static str,
    name: &str,
    tensor: &Tensor<B>,
    rows: usize,
    cols: usize,
) -> Result<(), ShapeError> {
    let (has_rows, has_cols) = (tensor.rows, tensor.cols);
    ensure(op, has_rows == rows && has_cols == cols, || {
        format!("{name} is [{has_rows}, {has_cols}], wanted [{rows}, {cols}]")
    })?;
    ensure(op, has_rows <= tensor.rows_max, || {
        format!("{name} has {has_rows} rows in an allocation of {}", tensor.rows_max)
    })
}

/// Head counts that ops can work with: a whole number of query heads for each key head, even width.
pub fn heads(op: &'static str, heads: Heads) -> Result<(), ShapeError> {
    let Heads { q, kv, dim } = heads;
    ensure(op, q > 0 && kv > 0 && q.is_multiple_of(kv), || {
        format!("{q} query heads cannot share {kv} key heads")
    })?;
    ensure(op, dim > 0 && dim.is_multiple_of(2), || {
        format!("head_dim {dim} is not a positive even number")
    })
}

fn packed_qkv<B: Backend>(
    op: &'static str,
    qkv: &Tensor<B>,
    rows: usize,
    shape: Heads,
) -> Result<(), ShapeError> {
    heads(op, shape)?;
    extents(op, "qkv", qkv, rows, shape.qkv_cols())
}

/// out [T, H], table [V, H].
pub fn embed<B: Backend>(
    out: &Tensor<B>,
    table_cols: usize,
    batch: &Batch<B>,
) -> Result<(), ShapeError> {
    extents("embed", "out", out, batch.tokens, table_cols)
}

/// out [T, H], x [T, H], weight [1, H].
pub fn rms_norm<B: Backend>(
    out: &Tensor<B>,
    x: &Tensor<B>,
    weight: &Tensor<B>,
) -> Result<(), ShapeError> {
    extents("rms_norm", "x", x, x.rows, x.cols)?;
    extents("rms_norm", "out", out, x.rows, x.cols)?;
    extents("rms_norm", "weight", weight, 1, x.cols)
}

/// out [T, N], x [T, K], weight [N, K], bias [1, N].
pub fn linear<B: Backend>(
    out: &Tensor<B>,
    x: &Tensor<B>,
    (weight_rows, weight_cols): (usize, usize),
    bias: Option<&Tensor<B>>,
) -> Result<(), ShapeError> {
    extents("linear", "x", x, x.rows, weight_cols)?;
    extents("linear", "out", out, x.rows, weight_rows)?;
    bias.map_or(Ok(()), |bias| extents("linear", "bias", bias, 1, weight_rows))
}

/// qkv [T, (q + 2 kv) D] into a cache made for `cached`; the norms' weights [1, D], cos_sin [P, D].
pub fn rotate_and_store<B: Backend>(
    qkv: &Tensor<B>,
    cached: Heads,
    rotation: &Rotation<'_, B>,
    batch: &Batch<B>,
) -> Result<(), ShapeError> {
    const OP: &str = "rotate_and_store";
    let Rotation { norm, cos_sin, heads } = *rotation;
    packed_qkv(OP, qkv, batch.tokens, heads)?;
    if let Some((q, k, _)) = norm {
        extents(OP, "the query heads' norm", q, 1, heads.dim)?;
        extents(OP, "the key heads' norm", k, 1, heads.dim)?;
    }
    extents(OP, "cos_sin", cos_sin, cos_sin.rows, heads.dim)?;
    same_cache(OP, cached, heads)
}

/// out [T, q D], qkv [T, (q + 2 kv) D], a cache made for `cached`.
pub fn attention<B: Backend>(
    out: &Tensor<B>,
    qkv: &Tensor<B>,
    cached: Heads,
    batch: &Batch<B>,
    shape: Heads,
) -> Result<(), ShapeError> {
    packed_qkv("attention", qkv, batch.tokens, shape)?;
    extents("attention", "out", out, batch.tokens, shape.q * shape.dim)?;
    same_cache("attention", cached, shape)
}

fn same_cache(op: &'static str, cached: Heads, shape: Heads) -> Result<(), ShapeError> {
    ensure(op, (cached.kv, cached.dim) == (shape.kv, shape.dim), || {
        format!(
            "the cache holds {} heads of {}, the rows {} of {}",
            cached.kv, cached.dim, shape.kv, shape.dim
        )
    })
}

/// out [T, I], x [T, 2 I].
pub fn silu_mul<B: Backend>(out: &Tensor<B>, x: &Tensor<B>) -> Result<(), ShapeError> {
    extents("silu_mul", "x", x, x.rows, 2 * out.cols)?;
    extents("silu_mul", "out", out, x.rows, out.cols)
}

/// Experts that ops can choose from.
pub fn routing(op: &'static str, routing: Routing) -> Result<(), ShapeError> {
    let Routing { experts, per_token, .. } = routing;
    let fits = (1..=EXPERTS_MAX).contains(&experts)
        && (1..=experts.min(EXPERTS_PER_TOKEN_MAX)).contains(&per_token);
    ensure(op, fits, || {
        format!(
            "{per_token} of {experts} experts; supported are 1 to {EXPERTS_PER_TOKEN_MAX} of up \
             to {EXPERTS_MAX}"
        )
    })
}

/// logits [T, E], and a column for the shared expert; `routes` of as many tokens.
pub fn route<B: Backend>(routes: &Routes<B>, logits: &Tensor<B>) -> Result<(), ShapeError> {
    routing("route", routes.routing)?;
    extents("route", "logits", logits, routes.tokens(), routes.routing.logits())?;
    let weights = &routes.weights;
    extents("route", "weights", weights, weights.rows, routes.routing.weights())
}

/// A matrix [rows, cols] for the expert after `pushed` others, of [E, N, K].
pub fn push_expert(
    shape: [usize; 3],
    pushed: usize,
    (rows, cols): (usize, usize),
) -> Result<(), ShapeError> {
    let [experts, n, k] = shape;
    ensure("push_expert", pushed < experts && (rows, cols) == (n, k), || {
        format!("[{rows}, {cols}] after {pushed} of {experts} matrices [{n}, {k}]")
    })
}

/// out [T k, N], x [T, K] or [T k, K], experts [E, N, K].
pub fn expert_linear<B: Backend>(
    out: &Tensor<B>,
    x: &Tensor<B>,
    rows: ExpertRows,
    [experts, n, k]: [usize; 3],
    routes: &Routes<B>,
) -> Result<(), ShapeError> {
    const OP: &str = "expert_linear";
    routing(OP, routes.routing)?;
    let wanted = routes.routing.experts;
    ensure(OP, experts == wanted, || format!("{experts} experts, wanted {wanted}"))?;
    let x_rows = match rows {
        ExpertRows::Tokens => routes.tokens(),
        ExpertRows::Pairs => routes.pairs(),
    };
    extents(OP, "x", x, x_rows, k)?;
    extents(OP, "out", out, routes.pairs(), n)
}

/// out [T, N], x [T k, N], shared [T, N] exactly where there is a shared expert.
pub fn combine<B: Backend>(
    out: &Tensor<B>,
    x: &Tensor<B>,
    shared: Option<&Tensor<B>>,
    routes: &Routes<B>,
) -> Result<(), ShapeError> {
    const OP: &str = "combine";
    routing(OP, routes.routing)?;
    extents(OP, "x", x, routes.pairs(), out.cols)?;
    extents(OP, "out", out, routes.tokens(), out.cols)?;
    ensure(OP, shared.is_some() == routes.routing.shared, || {
        let has = if shared.is_some() { "a" } else { "no" };
        format!("{has} shared expert's result, against the routing")
    })?;
    shared.map_or(Ok(()), |shared| extents(OP, "shared", shared, out.rows, out.cols))
}

/// x [T, H], delta [T, H].
pub fn add<B: Backend>(x: &Tensor<B>, delta: &Tensor<B>) -> Result<(), ShapeError> {
    extents("add", "x", x, x.rows, x.cols)?;
    extents("add", "delta", delta, x.rows, x.cols)
}

/// out [len, H], x [T, H], rows `first..first + len` of the batch's logit rows.
pub fn gather_rows<B: Backend>(
    out: &Tensor<B>,
    x: &Tensor<B>,
    batch: &Batch<B>,
    first: usize,
    len: usize,
) -> Result<(), ShapeError> {
    extents("gather_rows", "x", x, x.rows, x.cols)?;
    extents("gather_rows", "out", out, len, x.cols)?;
    let wanted = batch.logit_rows_len;
    ensure("gather_rows", first.checked_add(len).is_some_and(|end| end <= wanted), || {
        format!("rows {first} to {first} + {len} of {wanted} logit rows")
    })
}

/// A sliding window holds at least the row itself.
pub fn window(window: Option<usize>) -> Result<(), ShapeError> {
    ensure("attention", window != Some(0), || "a window of 0 tokens".into())
}
