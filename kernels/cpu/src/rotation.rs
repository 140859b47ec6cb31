//! The steps of `rotate_and_store`.

use super::{
    Cpu,
    kv::{Blocks, Element, Store},
    rows::{self, QkNorm, Rope},
    simd::dispatch,
    used, used_mut,
};
use kernels::{Heads, Tensor};

/// Rows whose K and V one thread stores faster than several wake up.
const STORE_INLINE_ROWS: usize = 32;

impl Cpu {
    /// Norms query heads with the first weight and key heads with the second.
    pub(super) fn norm_heads(
        &self,
        qkv: &mut Tensor<Self>,
        (q, k, eps): (&Tensor<Self>, &Tensor<Self>, f32),
        heads: Heads,
    ) {
        const COST: usize = 3;
        let (cols, q, k) = (qkv.cols, used(q), used(k));
        rows::split(&self.pool, used_mut(qkv), (cols, COST), &|_, qkv| {
            dispatch(self.level, QkNorm { qkv, q, k, eps, heads });
        });
    }

    /// Rotates each row by its row of `cos_sin`, queries times their factors.
    pub(super) fn rotate(
        &self,
        qkv: &mut Tensor<Self>,
        cos_sin: &[f32],
        (table_rows, q_scale): (&[i32], Option<&[f32]>),
        heads: Heads,
    ) {
        const COST: usize = 2;
        let cols = qkv.cols;
        rows::split(&self.pool, used_mut(qkv), (cols, COST), &|first, qkv| {
            let (table_rows, q_scale) = (&table_rows[first..], q_scale.map(|s| &s[first..]));
            dispatch(self.level, Rope { qkv, cos_sin, table_rows, q_scale, heads });
        });
    }

    pub(super) fn store<E: Element>(
        &self,
        blocks: &mut Blocks<E>,
        qkv: &[f32],
        slots: &[i32],
        heads: Heads,
    ) {
        let (keys, values) = blocks.writers();
        let (keys, values) = (&keys, &values);
        let one = |_: usize, head: usize| {
            dispatch(self.level, Store { keys, values, qkv, slots, heads, head });
        };
        if slots.len() < STORE_INLINE_ROWS {
            (0..heads.kv).for_each(|head| one(0, head));
        } else {
            self.pool.for_each(heads.kv, &one);
        }
    }
}
