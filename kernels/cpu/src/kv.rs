//! The K and V blocks of one layer, laid out for attention.
//!
//! Keys of a block lie in lanes, [block][head][D][16 tokens], so that one query meets sixteen keys
//! without sums across lanes; values lie [block][head][16 tokens][D], D filled up to whole vectors.

use super::{
    memory::{Aligned, Disjoint, Number},
    simd::{Kernel, LANES, Simd},
};
use kernels::{BLOCK_TOKENS, Heads, KernelError};

const _: () = assert!(BLOCK_TOKENS == LANES, "a block's keys are one vector");

/// How K and V are kept.
pub(super) trait Element: Number + Default {
    fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::V;
    fn store<S: Simd>(s: S, to: &mut [Self; LANES], v: S::V);
}

impl Element for f32 {
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::V {
        s.load(from)
    }
    #[inline(always)]
    fn store<S: Simd>(s: S, to: &mut [Self; LANES], v: S::V) {
        s.store(to, v);
    }
}

/// IEEE half-precision bits.
impl Element for u16 {
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::V {
        s.load_half(from)
    }
    /// Saturates: an infinite key would make every later answer of its sequence NaN.
    #[inline(always)]
    fn store<S: Simd>(s: S, to: &mut [Self; LANES], v: S::V) {
        let max = s.splat(65504.0);
        let v = s.max(s.sub(s.splat(0.0), max), s.min(max, v));
        s.store_half(to, v);
    }
}

/// Blocks of elements `E`.
pub(super) struct Blocks<E> {
    pub heads: Heads,
    pub count: usize,
    keys: Aligned<E>,
    values: Aligned<E>,
}

/// The K and V blocks of one layer: half precision for the fast path, full for the exact one.
pub struct CpuKv(pub(super) Stored);

pub(super) enum Stored {
    Half(Blocks<u16>),
    Full(Blocks<f32>),
}

impl CpuKv {
    pub(super) fn heads(&self) -> Heads {
        match &self.0 {
            Stored::Half(blocks) => blocks.heads,
            Stored::Full(blocks) => blocks.heads,
        }
    }

    pub(super) fn blocks(&self) -> usize {
        match &self.0 {
            Stored::Half(blocks) => blocks.count,
            Stored::Full(blocks) => blocks.count,
        }
    }
}

/// D filled up to whole vectors.
pub(super) fn padded(dim: usize) -> usize {
    dim.next_multiple_of(LANES)
}

/// Elements of one block's keys and values.
pub(super) fn block_elements(heads: Heads) -> usize {
    heads.kv * (heads.dim + padded(heads.dim)) * BLOCK_TOKENS
}

impl<E: Element> Blocks<E> {
    pub fn new(count: usize, heads: Heads) -> Result<Self, KernelError> {
        let len = |dim: usize| count.saturating_mul(heads.kv * dim * BLOCK_TOKENS);
        let keys = Aligned::zeroed("the KV cache", len(heads.dim))?;
        let values = Aligned::zeroed("the KV cache", len(padded(heads.dim)))?;
        Ok(Self { heads, count, keys, values })
    }

    /// [D] vectors of sixteen tokens.
    #[inline(always)]
    pub fn keys(&self, block: usize, head: usize) -> &[[E; LANES]] {
        let len = self.heads.dim * BLOCK_TOKENS;
        self.keys[(block * self.heads.kv + head) * len..][..len].as_chunks().0
    }

    /// [16 tokens, padded D / 16] vectors of sixteen dimensions.
    #[inline(always)]
    pub fn values(&self, block: usize, head: usize) -> &[[E; LANES]] {
        let len = padded(self.heads.dim) * BLOCK_TOKENS;
        self.values[(block * self.heads.kv + head) * len..][..len].as_chunks().0
    }

    /// The parts that `Store` writes.
    pub fn writers(&mut self) -> (Disjoint<'_, E>, Disjoint<'_, E>) {
        (Disjoint::new(&mut self.keys), Disjoint::new(&mut self.values))
    }
}

/// Stores one head of every row.
pub(super) struct Store<'a, E> {
    pub keys: &'a Disjoint<'a, E>,
    pub values: &'a Disjoint<'a, E>,
    pub qkv: &'a [f32],
    pub slots: &'a [i32],
    pub heads: Heads,
    /// Which key head; no other thread stores it.
    pub head: usize,
}

impl<E: Element> Kernel for Store<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut row = 0;
        while row < self.slots.len() {
            let slot = self.slots[row] as usize;
            let run = self.run_length(row, slot);
            self.store_run(s, row, slot, run);
            row += run;
        }
    }
}

impl<E: Element> Store<'_, E> {
    /// How many rows from `row` on go to neighbouring slots of one block.
    #[inline(always)]
    fn run_length(&self, row: usize, slot: usize) -> usize {
        let most = (BLOCK_TOKENS - slot % BLOCK_TOKENS).min(self.slots.len() - row);
        let in_order = |n: &usize| self.slots[row + n] as usize == slot + n;
        (1..most).take_while(in_order).count() + 1
    }

    #[inline(always)]
    fn store_run<S: Simd>(&self, s: S, row: usize, slot: usize, run: usize) {
        let Heads { q, kv, dim } = self.heads;
        let (block, lane) = (slot / BLOCK_TOKENS, slot % BLOCK_TOKENS);
        let at = block * kv + self.head;
        let (wide, len) = (padded(dim), dim * BLOCK_TOKENS);
        // SAFETY: this head's part of the block is written by this call's thread alone.
        let keys = unsafe { self.keys.part(at * len..(at + 1) * len) };
        let len = wide * BLOCK_TOKENS;
        // SAFETY: as above.
        let values = unsafe { self.values.part(at * len..(at + 1) * len) };
        let cols = self.heads.qkv_cols();
        let rows = &self.qkv[row * cols..(row + run) * cols];
        let keys = keys.as_chunks_mut::<LANES>().0;
        let first = (q + self.head) * dim;
        if run == BLOCK_TOKENS {
            turn_block(s, keys, rows, (cols, first));
        } else {
            for (lane, row) in (lane..).zip(rows.chunks_exact(cols)) {
                turn_row(s, keys, &row[first..first + dim], lane);
            }
        }
        let first = first + kv * dim;
        let tokens = values.chunks_exact_mut(wide).skip(lane);
        for (to, row) in tokens.zip(rows.chunks_exact(cols)) {
            let (from, last) = row[first..first + dim].as_chunks::<LANES>();
            let mut to = to.as_chunks_mut::<LANES>().0.iter_mut();
            for (from, to) in from.iter().zip(&mut to) {
                E::store(s, to, s.load(from));
            }
            if let Some(to) = to.next() {
                E::store(s, to, s.load_some(last));
            }
        }
    }
}

/// A whole block of keys: each dimension of sixteen rows, from column `first` on, becomes a vector.
#[inline(always)]
fn turn_block<S: Simd, E: Element>(
    s: S,
    keys: &mut [[E; LANES]],
    rows: &[f32],
    (cols, first): (usize, usize),
) {
    for (d, keys) in keys.iter_mut().enumerate() {
        let mut lanes = [0.0; LANES];
        for (lane, row) in lanes.iter_mut().zip(rows.chunks_exact(cols)) {
            *lane = row[first + d];
        }
        E::store(s, keys, s.load(&lanes));
    }
}

/// One row of keys [D] into its lane.
#[inline(always)]
fn turn_row<S: Simd, E: Element>(s: S, keys: &mut [[E; LANES]], row: &[f32], lane: usize) {
    let mut stored = [E::default(); LANES];
    let (chunks, last) = row.as_chunks::<LANES>();
    let mut keys = keys.chunks_mut(LANES);
    for (from, keys) in chunks.iter().zip(&mut keys) {
        E::store(s, &mut stored, s.load(from));
        keys.iter_mut().zip(stored).for_each(|(key, x)| key[lane] = x);
    }
    if let Some(keys) = keys.next() {
        E::store(s, &mut stored, s.load_some(last));
        keys.iter_mut().zip(stored).for_each(|(key, x)| key[lane] = x);
    }
}
