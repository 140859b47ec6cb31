//! The plain, obviously correct ops: the oracle that tests compare every backend with.
//!
//! Each op is its definition in loops, sums in f64, weights dequantised to f32 at load. It is meant
//! to be read, not to be fast, and keeps every number in full precision.

pub mod dequant;
mod experts;

use crate::{
    BLOCK_TOKENS, Backend, Batch, BatchRoom, ExpertRows, Heads, KernelError, PartShape, Rotation,
    Routes, Step, Tensor, WeightPart,
    host::{self, BatchSequence},
    shape,
};
pub use experts::PlainExperts;
use std::{convert::Infallible, ops::Range};

/// The oracle backend. Stateless.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plain;

/// A weight matrix [N, K] in f32.
pub struct PlainWeight {
    rows: usize,
    cols: usize,
    values: Vec<f32>,
}

impl PlainWeight {
    /// The K values of output `n`.
    fn row(&self, n: usize) -> &[f32] {
        &self.values[n * self.cols..][..self.cols]
    }
}

/// K and V of one layer, each [slots, kv heads, D].
pub struct PlainKv {
    heads: Heads,
    blocks: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl PlainKv {
    /// Where head `head` of the token in `slot` starts, in `keys` and in `values`.
    fn at(&self, slot: usize, head: usize) -> Range<usize> {
        let start = (slot * self.heads.kv + head) * self.heads.dim;
        start..start + self.heads.dim
    }

    /// Where the token at `position` of a sequence lies.
    fn slot(sequence: &BatchSequence<'_>, position: usize) -> usize {
        sequence.blocks[position / BLOCK_TOKENS] as usize * BLOCK_TOKENS + position % BLOCK_TOKENS
    }
}

/// Row `row` of a tensor.
fn row(tensor: &Tensor<Plain>, row: usize) -> &[f32] {
    &tensor.data[row * tensor.cols..][..tensor.cols]
}

/// Row `row` of a tensor, to be written.
fn row_mut(tensor: &mut Tensor<Plain>, row: usize) -> &mut [f32] {
    &mut tensor.data[row * tensor.cols..][..tensor.cols]
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// 1 / sqrt(mean(x²) + eps).
fn inverse_rms(x: &[f32], eps: f32) -> f64 {
    (dot(x, x) / x.len() as f64 + f64::from(eps)).sqrt().recip()
}

/// `out` = softmax(q kᵀ / sqrt(D)) v over the cached keys at `positions`.
fn attend(
    out: &mut [f32],
    q: &[f32],
    kv: &PlainKv,
    sequence: &BatchSequence<'_>,
    (head, positions): (usize, Range<usize>),
) {
    let scale = (q.len() as f64).sqrt().recip();
    let score = |p| dot(q, &kv.keys[kv.at(PlainKv::slot(sequence, p), head)]) * scale;
    let scores: Vec<f64> = positions.clone().map(score).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let total: f64 = weights.iter().sum();
    for (d, out) in out.iter_mut().enumerate() {
        let value = |p| f64::from(kv.values[kv.at(PlainKv::slot(sequence, p), head)][d]);
        let sum: f64 = positions.clone().zip(&weights).map(|(p, w)| w * value(p)).sum();
        *out = (sum / total) as f32;
    }
}

/// Norms the query heads of a packed row with `q` [D] and its key heads with `k` [D].
fn norm_heads(qkv: &mut [f32], (q, k): (&[f32], &[f32]), eps: f32, heads: Heads) {
    for (h, x) in qkv.chunks_exact_mut(heads.dim).take(heads.q + heads.kv).enumerate() {
        let weight = if h < heads.q { q } else { k };
        let factor = inverse_rms(x, eps);
        for (x, &w) in x.iter_mut().zip(weight) {
            *x = (f64::from(*x) * factor * f64::from(w)) as f32;
        }
    }
}

/// Rotates the query and key heads of a packed row, queries times `q_scale`.
fn rotate(qkv: &mut [f32], cos_sin: &[f32], q_scale: f32, heads: Heads) {
    let (cos, sin) = cos_sin.split_at(heads.dim / 2);
    for (h, x) in qkv.chunks_exact_mut(heads.dim).take(heads.q + heads.kv).enumerate() {
        let scale = if h < heads.q { q_scale } else { 1.0 };
        let (low, high) = x.split_at_mut(heads.dim / 2);
        for i in 0..low.len() {
            let (a, b) = (low[i], high[i]);
            low[i] = (a * cos[i] - b * sin[i]) * scale;
            high[i] = (b * cos[i] + a * sin[i]) * scale;
        }
    }
}

/// Copies the key and value heads of a packed row to `slot`.
fn store(kv: &mut PlainKv, qkv: &[f32], slot: usize, heads: Heads) {
    for head in 0..heads.kv {
        let to = kv.at(slot, head);
        let from = &qkv[(heads.q + head) * heads.dim..];
        kv.keys[to.clone()].copy_from_slice(&from[..heads.dim]);
        let from = &from[heads.kv * heads.dim..];
        kv.values[to].copy_from_slice(&from[..heads.dim]);
    }
}

impl Backend for Plain {
    type Floats = Vec<f32>;
    type Ints = Vec<i32>;
    type Weight = PlainWeight;
    type Experts = PlainExperts;
    type Kv = PlainKv;
    type Cuts = ();
    type Mark = ();
    type Sampling = Infallible;

    fn floats(&self, len: usize) -> Result<Vec<f32>, KernelError> {
        host::zeroed("activations", len)
    }

    fn ints(&self, len: usize) -> Result<Vec<i32>, KernelError> {
        host::zeroed("indices", len)
    }

    fn write_floats(&self, to: &mut Vec<f32>, values: &[f32]) -> Result<(), KernelError> {
        Ok(host::write(to, values)?)
    }

    fn write_ints(&self, to: &mut Vec<i32>, values: &[i32]) -> Result<(), KernelError> {
        Ok(host::write(to, values)?)
    }

    fn read_floats(&self, to: &mut [f32], from: &Vec<f32>) -> Result<(), KernelError> {
        Ok(host::read(to, from)?)
    }

    fn host_floats<'a>(&self, floats: &'a mut Vec<f32>) -> Option<&'a mut [f32]> {
        Some(floats)
    }

    fn host_view<'a>(&self, floats: &'a Vec<f32>) -> Option<&'a [f32]> {
        Some(floats)
    }

    fn weight(&self, parts: &[WeightPart<'_>]) -> Result<PlainWeight, KernelError> {
        let (rows, cols) = WeightPart::check(parts)?;
        let mut values = host::zeroed("a weight", rows * cols)?;
        let mut to = values.chunks_exact_mut(cols);
        for part in parts {
            for (n, to) in (0..part.rows).zip(&mut to) {
                dequant::part_row(part, n, to);
            }
        }
        Ok(PlainWeight { rows, cols, values })
    }

    fn experts(&self, count: usize, stack: &[PartShape]) -> Result<PlainExperts, KernelError> {
        let (rows, cols) = PartShape::stacked(stack);
        Ok(PlainExperts { shape: [count, rows, cols], each: Vec::new() })
    }

    fn push_expert(
        &self,
        to: &mut PlainExperts,
        parts: &[WeightPart<'_>],
    ) -> Result<(), KernelError> {
        to.push(self.weight(parts)?)
    }

    fn kv(&self, blocks: usize, heads: Heads) -> Result<PlainKv, KernelError> {
        shape::heads("kv", heads)?;
        let len = blocks * BLOCK_TOKENS * heads.kv * heads.dim;
        let keys = host::zeroed("the KV cache", len)?;
        Ok(PlainKv { heads, blocks, keys, values: host::zeroed("the KV cache", len)? })
    }

    fn kv_block_bytes(&self, heads: Heads) -> usize {
        2 * BLOCK_TOKENS * heads.kv * heads.dim * size_of::<f32>()
    }

    fn cuts(&self, _room: &BatchRoom) -> Result<(), KernelError> {
        Ok(())
    }

    fn lay_out(&self, batch: &mut Batch<Self>, step: &Step) -> Result<(), KernelError> {
        Ok(host::lay_out(batch, step)?)
    }

    fn embed(
        &self,
        out: &mut Tensor<Self>,
        table: &PlainWeight,
        first_id: usize,
        batch: &Batch<Self>,
    ) -> Result<(), KernelError> {
        shape::embed(out, table.cols, batch)?;
        for (t, &id) in host::ids(batch)?.iter().enumerate() {
            let local = usize::try_from(id).ok().and_then(|id| id.checked_sub(first_id));
            match local.filter(|&local| local < table.rows) {
                Some(local) => row_mut(out, t).copy_from_slice(table.row(local)),
                None => row_mut(out, t).fill(0.0),
            }
        }
        Ok(())
    }

    fn rms_norm(
        &self,
        out: &mut Tensor<Self>,
        x: &Tensor<Self>,
        weight: &Tensor<Self>,
        eps: f32,
    ) -> Result<(), KernelError> {
        shape::rms_norm(out, x, weight)?;
        for t in 0..x.rows {
            let x = row(x, t);
            let factor = inverse_rms(x, eps);
            for ((out, &x), &w) in row_mut(out, t).iter_mut().zip(x).zip(&weight.data) {
                *out = (f64::from(x) * factor * f64::from(w)) as f32;
            }
        }
        Ok(())
    }

    fn linear(
        &self,
        out: &mut Tensor<Self>,
        x: &Tensor<Self>,
        weight: &PlainWeight,
        bias: Option<&Tensor<Self>>,
    ) -> Result<(), KernelError> {
        shape::linear(out, x, (weight.rows, weight.cols), bias)?;
        for t in 0..x.rows {
            for (n, out) in row_mut(out, t).iter_mut().enumerate() {
                let bias = bias.map_or(0.0, |bias| f64::from(bias.data[n]));
                *out = (dot(row(x, t), weight.row(n)) + bias) as f32;
            }
        }
        Ok(())
    }

    fn rotate_and_store(
        &self,
        kv: &mut PlainKv,
        qkv: &mut Tensor<Self>,
        rotation: &Rotation<'_, Self>,
        batch: &Batch<Self>,
    ) -> Result<(), KernelError> {
        shape::rotate_and_store(qkv, kv.heads, rotation, batch)?;
        let table_rows = host::rope_rows(batch, rotation.cos_sin.rows)?;
        let q_scale = host::q_scale(batch)?;
        let slots = host::slots(batch, kv.blocks)?;
        for t in 0..qkv.rows {
            let x = row_mut(qkv, t);
            if let Some((q, k, eps)) = rotation.norm {
                norm_heads(x, (&q.data, &k.data), eps, rotation.heads);
            }
            let cos_sin = row(rotation.cos_sin, table_rows[t] as usize);
            rotate(x, cos_sin, q_scale.map_or(1.0, |scale| scale[t]), rotation.heads);
            store(kv, x, slots[t] as usize, rotation.heads);
        }
        Ok(())
    }

    fn attention(
        &self,
        out: &mut Tensor<Self>,
        qkv: &Tensor<Self>,
        kv: &PlainKv,
        batch: &Batch<Self>,
        heads: Heads,
        window: Option<usize>,
    ) -> Result<(), KernelError> {
        shape::attention(out, qkv, kv.heads, batch, heads)?;
        shape::window(window)?;
        for sequence in host::sequences(batch, kv.blocks)? {
            for (i, t) in sequence.rows.clone().enumerate() {
                let end = sequence.start + i + 1;
                let positions = window.map_or(0, |w| end.saturating_sub(w))..end;
                for h in 0..heads.q {
                    let q = &row(qkv, t)[h * heads.dim..][..heads.dim];
                    let out = &mut row_mut(out, t)[h * heads.dim..][..heads.dim];
                    let keys = (h / (heads.q / heads.kv), positions.clone());
                    attend(out, q, kv, &sequence, keys);
                }
            }
        }
        Ok(())
    }

    fn silu_mul(&self, out: &mut Tensor<Self>, x: &Tensor<Self>) -> Result<(), KernelError> {
        shape::silu_mul(out, x)?;
        for t in 0..x.rows {
            let (gate, up) = row(x, t).split_at(out.cols);
            for ((out, &gate), &up) in row_mut(out, t).iter_mut().zip(gate).zip(up) {
                let gate = f64::from(gate);
                *out = (gate / (1.0 + (-gate).exp()) * f64::from(up)) as f32;
            }
        }
        Ok(())
    }

    fn route(&self, routes: &mut Routes<Self>, logits: &Tensor<Self>) -> Result<(), KernelError> {
        experts::route(routes, logits)
    }

    fn expert_linear(
        &self,
        out: &mut Tensor<Self>,
        x: &Tensor<Self>,
        rows: ExpertRows,
        experts: &PlainExperts,
        routes: &Routes<Self>,
    ) -> Result<(), KernelError> {
        experts::expert_linear(out, x, rows, experts, routes)
    }

    fn combine(
        &self,
        out: &mut Tensor<Self>,
        x: &Tensor<Self>,
        shared: Option<&Tensor<Self>>,
        routes: &Routes<Self>,
    ) -> Result<(), KernelError> {
        experts::combine(out, x, shared, routes)
    }

    fn add(&self, x: &mut Tensor<Self>, delta: &Tensor<Self>) -> Result<(), KernelError> {
        shape::add(x, delta)?;
        for t in 0..x.rows {
            for (x, &delta) in row_mut(x, t).iter_mut().zip(row(delta, t)) {
                *x += delta;
            }
        }
        Ok(())
    }

    fn gather_rows(
        &self,
        out: &mut Tensor<Self>,
        x: &Tensor<Self>,
        batch: &Batch<Self>,
        first: usize,
        len: usize,
    ) -> Result<(), KernelError> {
        shape::gather_rows(out, x, batch, first, len)?;
        for (r, &from) in host::logit_rows(batch, first..first + len, x.rows)?.iter().enumerate() {
            row_mut(out, r).copy_from_slice(row(x, from as usize));
        }
        Ok(())
    }

    fn mark(&self) -> Result<(), KernelError> {
        Ok(())
    }

    fn wait(&self, (): ()) -> Result<(), KernelError> {
        Ok(())
    }
}
