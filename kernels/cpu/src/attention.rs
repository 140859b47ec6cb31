//! Attention over paged K and V: prefill and decode rows of many sequences in one call.
//!
//! Work is cut into (rows of one sequence × query heads that share a key head), so that a block
//! read once serves every query in the cut. Each query walks the keys in order in spans of 64
//! positions, the softmax kept relative to the largest score so far. Spans lie at fixed positions
//! and every sum runs in one order, so a row's bits never depend on the cut, on its neighbours or
//! on the threads.

mod span;

use super::{
    kv::{Blocks, Element, padded},
    memory::{Aligned, Disjoint},
    pool::Pool,
    simd::{Kernel, Level, Simd, dispatch},
};
use kernels::{BLOCK_TOKENS, Heads, KernelError, host::BatchSequence};
use span::{Queries, SPAN, Span};
use std::{
    ops::Range,
    sync::{Mutex, PoisonError},
};

/// Queries worked on together: their state and a span of K and V stay in the nearest cache.
const TILE_QUERIES: usize = 32;
/// Score and value operations below which the calling thread works alone.
const INLINE_WORK: usize = 64 * 1024;

/// What one thread needs for one cut.
pub(super) struct Scratch {
    queries: Aligned<f32>,
    sums: Aligned<f32>,
    weights: Aligned<f32>,
    dim: usize,
}

impl Scratch {
    pub fn new() -> Result<Self, KernelError> {
        Self::sized(0)
    }

    fn sized(dim: usize) -> Result<Self, KernelError> {
        let zeroed = |cols| Aligned::zeroed("attention scratch", TILE_QUERIES * cols);
        let (queries, sums, weights) = (zeroed(dim)?, zeroed(padded(dim))?, zeroed(SPAN)?);
        Ok(Self { queries, sums, weights, dim })
    }

    /// Makes room for heads of `dim`.
    pub fn fit(&mut self, dim: usize) -> Result<(), KernelError> {
        if self.dim < dim {
            *self = Self::sized(dim)?;
        }
        Ok(())
    }
}

/// One call's inputs.
pub(super) struct Attention<'a, E> {
    pub qkv: &'a [f32],
    pub kv: &'a Blocks<E>,
    pub sequences: &'a [BatchSequence<'a>],
    pub heads: Heads,
    pub window: Option<usize>,
}

/// Rows of one sequence that are worked on together.
struct Tile {
    sequence: usize,
    rows: Range<usize>,
}

/// Rows × query heads that share a key head.
struct Cut<'a, E> {
    call: &'a Attention<'a, E>,
    sequence: &'a BatchSequence<'a>,
    /// Of the batch.
    rows: Range<usize>,
    /// Query heads.
    q: Range<usize>,
    out: &'a Disjoint<'a, f32>,
    scratch: &'a mut Scratch,
}

impl<E: Element> Attention<'_, E> {
    /// out [T, q D]. `scratch` holds one for each thread, fitted to D.
    pub fn run(&self, pool: &Pool, level: Level, scratch: &[Mutex<Scratch>], out: &mut [f32]) {
        let per = self.heads_per_cut(pool.threads());
        let tiles = self.tiles(per);
        let shares = self.heads.q / self.heads.kv;
        let cuts = shares.div_ceil(per);
        let out = Disjoint::new(out);
        let item = |thread: usize, item: usize| {
            // The longest contexts first: what is left for last is short.
            let tile = &tiles[tiles.len() - 1 - item / (self.heads.kv * cuts)];
            let (head, cut) = (item / cuts % self.heads.kv, item % cuts);
            let first = head * shares;
            let q = first + cut * per..first + shares.min((cut + 1) * per);
            let mut scratch = scratch[thread].lock().unwrap_or_else(PoisonError::into_inner);
            let sequence = &self.sequences[tile.sequence];
            let rows = tile.rows.clone();
            dispatch(
                level,
                Cut { call: self, sequence, rows, q, out: &out, scratch: &mut scratch },
            );
        };
        let items = tiles.len() * self.heads.kv * cuts;
        if self.work() < INLINE_WORK {
            (0..items).for_each(|i| item(0, i));
        } else {
            pool.for_each(items, &item);
        }
    }

    /// Multiplications in all, roughly.
    fn work(&self) -> usize {
        let keys = |s: &BatchSequence<'_>| {
            let context = s.start + s.rows.len();
            s.rows.len() * context.min(self.window.unwrap_or(context))
        };
        let pairs: usize = self.sequences.iter().map(keys).sum();
        pairs.saturating_mul(2 * self.heads.q * self.heads.dim)
    }

    /// Query heads in one cut: all that share a key head, unless the threads would not all have
    /// work.
    fn heads_per_cut(&self, threads: usize) -> usize {
        let shares = self.heads.q / self.heads.kv;
        let rows: usize = self.sequences.iter().map(|s| s.rows.len()).sum();
        let even = (rows * self.heads.kv).is_multiple_of(threads);
        if even || rows * self.heads.kv >= 4 * threads { shares.min(TILE_QUERIES) } else { 1 }
    }

    fn tiles(&self, heads_per_cut: usize) -> Vec<Tile> {
        let rows_max = TILE_QUERIES / heads_per_cut;
        let mut tiles = Vec::new();
        for (sequence, s) in self.sequences.iter().enumerate() {
            for start in s.rows.clone().step_by(rows_max) {
                tiles.push(Tile { sequence, rows: start..s.rows.end.min(start + rows_max) });
            }
        }
        tiles
    }
}

impl<E: Element> Cut<'_, E> {
    /// The keys that batch row `row` looks at.
    #[inline(always)]
    fn keys(&self, row: usize) -> Range<usize> {
        let end = self.sequence.start + (row - self.sequence.rows.start) + 1;
        self.call.window.map_or(0, |window| end.saturating_sub(window))..end
    }
}

impl<E: Element> Kernel for Cut<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Heads { q: q_heads, kv: kv_heads, dim } = self.call.heads;
        let (heads, rows) = (self.q.len(), self.rows.len());
        let head = self.q.start / (q_heads / kv_heads);
        let mut ranges = [(0, 0); TILE_QUERIES];
        for (i, range) in ranges[..rows * heads].iter_mut().enumerate() {
            let keys = self.keys(self.rows.start + i / heads);
            *range = (keys.start, keys.end);
        }
        let Scratch { queries, sums, weights, .. } = &mut *self.scratch;
        let wide = padded(dim);
        let mut state = Queries {
            dim,
            ranges: &ranges[..rows * heads],
            queries: &mut queries[..rows * heads * dim],
            sums: &mut sums[..rows * heads * wide],
            weights: weights.as_chunks_mut::<SPAN>().0,
            max: [0.0; TILE_QUERIES],
            totals: [s.splat(0.0); TILE_QUERIES],
        };
        let cols = self.call.heads.qkv_cols();
        state.begin::<S>(|i| {
            let row = (self.rows.start + i / heads) * cols;
            &self.call.qkv[row + (self.q.start + i % heads) * dim..][..dim]
        });
        let (first, end) = (ranges[0].0, ranges[rows * heads - 1].1);
        for start in (first / SPAN * SPAN..end).step_by(SPAN) {
            let mut span = Span::<E>::new(start);
            for block in
                start.max(first) / BLOCK_TOKENS..end.min(start + SPAN).div_ceil(BLOCK_TOKENS)
            {
                let id = self.sequence.blocks[block] as usize;
                let kv = self.call.kv;
                span.set(block % (SPAN / BLOCK_TOKENS), kv.keys(id, head), kv.values(id, head));
            }
            state.scores(s, &span);
            state.soften(s, &span);
            state.add_values(s, &span);
        }
        let out_cols = q_heads * dim;
        for row in 0..rows {
            let at = (self.rows.start + row) * out_cols + self.q.start * dim;
            // SAFETY: no two cuts of a call share a row and a query head.
            let out = unsafe { self.out.part(at..at + heads * dim) };
            for (h, out) in out.chunks_exact_mut(dim).enumerate() {
                state.finish(s, row * heads + h, out);
            }
        }
    }
}
