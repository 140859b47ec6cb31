//! Ops that treat each row by itself: norms, rope, activations, sums.

use super::{
    memory::Disjoint,
    pool::Pool,
    simd::{Kernel, LANES, Simd},
};
use kernels::Heads;

/// Element operations below which waking the other threads costs more than it saves.
const INLINE_WORK: usize = 32 * 1024;

/// Calls `f(first_row, rows)` for runs of rows that together are `out`, on as many threads as the
/// work is worth: `cost` is about how many vector operations each element takes.
pub(super) fn split(
    pool: &Pool,
    out: &mut [f32],
    (cols, cost): (usize, usize),
    f: &(dyn Fn(usize, &mut [f32]) + Sync),
) {
    let rows = out.len() / cols.max(1);
    if rows <= 1 || out.len() * cost < INLINE_WORK {
        return f(0, out);
    }
    let shares = (2 * pool.threads()).min(rows);
    let out = Disjoint::new(out);
    pool.for_each(shares, &|_, at| {
        let mine = rows * at / shares..rows * (at + 1) / shares;
        // SAFETY: each share's rows end where the next one's begin.
        f(mine.start, unsafe { out.part(mine.start * cols..mine.end * cols) });
    });
}

/// 1 / sqrt(mean(x²) + eps). Four sums side by side, whatever the length.
#[inline(always)]
fn inverse_rms<S: Simd>(s: S, x: &[f32], eps: f32) -> f32 {
    let mut sums = [s.splat(0.0); 4];
    let (quads, rest) = x.as_chunks::<{ 4 * LANES }>();
    for quad in quads {
        for (sum, x) in sums.iter_mut().zip(quad.as_chunks::<LANES>().0) {
            let x = s.load(x);
            *sum = s.fma(x, x, *sum);
        }
    }
    for (sum, x) in sums.iter_mut().zip(rest.chunks(LANES)) {
        let x = s.load_some(x);
        *sum = s.fma(x, x, *sum);
    }
    let sum = s.sum_lanes(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])));
    (sum / x.len() as f32 + eps).sqrt().recip()
}

/// x = x · factor · weight.
#[inline(always)]
fn scale<S: Simd>(s: S, x: &mut [f32], factor: f32, weight: &[f32]) {
    let factor = s.splat(factor);
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    let (weights, last) = weight.as_chunks::<LANES>();
    for (x, w) in chunks.iter_mut().zip(weights) {
        let v = s.mul(s.mul(s.load(x), factor), s.load(w));
        s.store(x, v);
    }
    if !rest.is_empty() {
        let v = s.mul(s.mul(s.load_some(rest), factor), s.load_some(last));
        s.store_some(rest, v);
    }
}

/// out = x / rms(x) · weight, rows of `weight.len()`.
pub(super) struct RmsNorm<'a> {
    pub out: &'a mut [f32],
    pub x: &'a [f32],
    pub weight: &'a [f32],
    pub eps: f32,
}

impl Kernel for RmsNorm<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let cols = self.weight.len();
        for (out, x) in self.out.chunks_exact_mut(cols).zip(self.x.chunks_exact(cols)) {
            out.copy_from_slice(x);
            scale(s, out, inverse_rms(s, x, self.eps), self.weight);
        }
    }
}

/// Norms the query heads of packed rows with `q` and the key heads with `k`.
pub(super) struct QkNorm<'a> {
    pub qkv: &'a mut [f32],
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub eps: f32,
    pub heads: Heads,
}

impl Kernel for QkNorm<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Heads { q, kv, dim } = self.heads;
        for row in self.qkv.chunks_exact_mut(self.heads.qkv_cols()) {
            for (h, x) in row.chunks_exact_mut(dim).take(q + kv).enumerate() {
                let weight = if h < q { self.q } else { self.k };
                let factor = inverse_rms(s, x, self.eps);
                scale(s, x, factor, weight);
            }
        }
    }
}

/// Rotates the query and key heads of packed rows, one `table_rows` and factor for each row.
pub(super) struct Rope<'a> {
    pub qkv: &'a mut [f32],
    pub cos_sin: &'a [f32],
    pub table_rows: &'a [i32],
    pub q_scale: Option<&'a [f32]>,
    pub heads: Heads,
}

impl Kernel for Rope<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Heads { q, kv, dim } = self.heads;
        let rows = self.qkv.chunks_exact_mut(self.heads.qkv_cols()).zip(self.table_rows);
        for (t, (row, &at)) in rows.enumerate() {
            let (cos, sin) = self.cos_sin[at as usize * dim..][..dim].split_at(dim / 2);
            let q_scale = self.q_scale.map_or(1.0, |scale| scale[t]);
            for (h, x) in row.chunks_exact_mut(dim).take(q + kv).enumerate() {
                rotate(s, x.split_at_mut(dim / 2), (cos, sin), if h < q { q_scale } else { 1.0 });
            }
        }
    }
}

#[inline(always)]
fn rotate<S: Simd>(
    s: S,
    (low, high): (&mut [f32], &mut [f32]),
    (cos, sin): (&[f32], &[f32]),
    scale: f32,
) {
    let scale = s.splat(scale);
    let (lows, low) = low.as_chunks_mut::<LANES>();
    let (highs, high) = high.as_chunks_mut::<LANES>();
    let ((coses, cos), (sins, sin)) = (cos.as_chunks::<LANES>(), sin.as_chunks::<LANES>());
    for ((a, b), (cos, sin)) in lows.iter_mut().zip(highs).zip(coses.iter().zip(sins)) {
        let (x, y, cos, sin) = (s.load(a), s.load(b), s.load(cos), s.load(sin));
        s.store(a, s.mul(s.neg_fma(y, sin, s.mul(x, cos)), scale));
        s.store(b, s.mul(s.fma(x, sin, s.mul(y, cos)), scale));
    }
    if low.is_empty() {
        return;
    }
    let (x, y, cos, sin) =
        (s.load_some(low), s.load_some(high), s.load_some(cos), s.load_some(sin));
    s.store_some(low, s.mul(s.neg_fma(y, sin, s.mul(x, cos)), scale));
    s.store_some(high, s.mul(s.fma(x, sin, s.mul(y, cos)), scale));
}

/// out [T, I] = silu(gate) · up, x rows being gate, then up.
pub(super) struct SiluMul<'a> {
    pub out: &'a mut [f32],
    pub x: &'a [f32],
    pub cols: usize,
}

impl Kernel for SiluMul<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let rows = self.x.chunks_exact(2 * self.cols);
        for (out, x) in self.out.chunks_exact_mut(self.cols).zip(rows) {
            let (gate, up) = x.split_at(self.cols);
            let (outs, out) = out.as_chunks_mut::<LANES>();
            let ((gates, gate), (ups, up)) = (gate.as_chunks::<LANES>(), up.as_chunks::<LANES>());
            for (out, (gate, up)) in outs.iter_mut().zip(gates.iter().zip(ups)) {
                let v = silu_mul(s, s.load(gate), s.load(up));
                s.store(out, v);
            }
            if !out.is_empty() {
                let v = silu_mul(s, s.load_some(gate), s.load_some(up));
                s.store_some(out, v);
            }
        }
    }
}

/// gate / (1 + e^-gate) · up.
#[inline(always)]
fn silu_mul<S: Simd>(s: S, gate: S::V, up: S::V) -> S::V {
    let e = s.exp(s.sub(s.splat(0.0), gate));
    s.mul(s.div(gate, s.add(s.splat(1.0), e)), up)
}

/// x += delta.
pub(super) struct Add<'a> {
    pub x: &'a mut [f32],
    pub delta: &'a [f32],
}

impl Kernel for Add<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (chunks, rest) = self.x.as_chunks_mut::<LANES>();
        let (deltas, last) = self.delta.as_chunks::<LANES>();
        for (x, delta) in chunks.iter_mut().zip(deltas) {
            let v = s.add(s.load(x), s.load(delta));
            s.store(x, v);
        }
        if !rest.is_empty() {
            let v = s.add(s.load_some(rest), s.load_some(last));
            s.store_some(rest, v);
        }
    }
}

/// out [T, N] = Σ weight · x over each row's `k` places in x, and last its row of `shared`.
pub(super) struct Combine<'a> {
    pub out: &'a mut [f32],
    pub x: &'a [f32],
    pub shared: Option<&'a [f32]>,
    /// [T, k]
    pub places: &'a [i32],
    /// [T, k], or [T, k + 1] where there is `shared`.
    pub weights: &'a [f32],
    pub cols: usize,
    pub k: usize,
}

impl Kernel for Combine<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { cols, k, .. } = self;
        let width = k + usize::from(self.shared.is_some());
        let rows = self.places.chunks_exact(k).zip(self.weights.chunks_exact(width));
        for (t, (out, (places, weights))) in self.out.chunks_exact_mut(cols).zip(rows).enumerate() {
            out.fill(0.0);
            for (&place, &weight) in places.iter().zip(weights) {
                accumulate(s, out, weight, &self.x[place as usize * cols..][..cols]);
            }
            if let Some(shared) = self.shared {
                accumulate(s, out, weights[k], &shared[t * cols..][..cols]);
            }
        }
    }
}

/// out += factor · x.
#[inline(always)]
fn accumulate<S: Simd>(s: S, out: &mut [f32], factor: f32, x: &[f32]) {
    let factor = s.splat(factor);
    let (chunks, rest) = out.as_chunks_mut::<LANES>();
    let (xs, last) = x.as_chunks::<LANES>();
    for (out, x) in chunks.iter_mut().zip(xs) {
        let v = s.fma(s.load(x), factor, s.load(out));
        s.store(out, v);
    }
    if !rest.is_empty() {
        let v = s.fma(s.load_some(last), factor, s.load_some(rest));
        s.store_some(rest, v);
    }
}
