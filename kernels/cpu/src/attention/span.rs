//! A tile of queries against one span of keys and values.

use super::TILE_QUERIES;
use crate::{
    kv::{Element, padded},
    simd::{LANES, Simd},
};
use kernels::BLOCK_TOKENS;

/// Positions between two looks at the largest score. Spans start at multiples of it.
pub(super) const SPAN: usize = 64;
const SPAN_BLOCKS: usize = SPAN / BLOCK_TOKENS;
/// Below every score, and far enough from the end of f32 that differences stay finite.
const NO_SCORE: f32 = -1e30;
/// Value vectors summed at a time.
const VALUE_VECTORS: usize = 4;

/// The blocks of positions `start..start + 64`; those that no query of the tile needs are empty.
pub(super) struct Span<'a, E> {
    start: usize,
    keys: [&'a [[E; LANES]]; SPAN_BLOCKS],
    values: [&'a [[E; LANES]]; SPAN_BLOCKS],
}

impl<'a, E: Element> Span<'a, E> {
    #[inline(always)]
    pub fn new(start: usize) -> Self {
        Self { start, keys: [&[]; SPAN_BLOCKS], values: [&[]; SPAN_BLOCKS] }
    }

    /// keys [D], values [16, padded D / 16].
    #[inline(always)]
    pub fn set(&mut self, block: usize, keys: &'a [[E; LANES]], values: &'a [[E; LANES]]) {
        self.keys[block] = keys;
        self.values[block] = values;
    }

    /// The part of a query's keys in this span, as places 0 to 64.
    #[inline(always)]
    fn places(&self, (from, to): (usize, usize)) -> (usize, usize) {
        let place = |position: usize| position.clamp(self.start, self.start + SPAN) - self.start;
        (place(from), place(to))
    }
}

/// The state of up to `TILE_QUERIES` queries, in the order of their rows.
pub(super) struct Queries<'a, V> {
    pub dim: usize,
    /// First key and the key after the last of each query; both rise with the row.
    pub ranges: &'a [(usize, usize)],
    /// Scaled by 1 / sqrt(D). Groups of up to `SCORE_QUERIES`, each [D, group].
    pub queries: &'a mut [f32],
    /// [queries, padded D]: values so far, weighted relative to `max`.
    pub sums: &'a mut [f32],
    /// [queries, 64]: scores of the span, then their weights.
    pub weights: &'a mut [[f32; SPAN]],
    pub max: [f32; TILE_QUERIES],
    /// Weights so far, in lanes.
    pub totals: [V; TILE_QUERIES],
}

/// How many of `left` queries go through one inner loop that has room for `most`.
#[inline(always)]
fn group(left: usize, most: usize) -> usize {
    match left.min(most) {
        8.. => 8,
        4.. => 4,
        few => few,
    }
}

impl<V: Copy> Queries<'_, V> {
    /// Takes the queries over, scaled and grouped; nothing is summed yet.
    #[inline(always)]
    pub fn begin<'q, S: Simd<V = V>>(&mut self, query: impl Fn(usize) -> &'q [f32]) {
        let scale = (self.dim as f32).sqrt().recip();
        let (mut first, dim) = (0, self.dim);
        while first < self.ranges.len() {
            let group = group(self.ranges.len() - first, S::SCORE_QUERIES);
            let to = &mut self.queries[first * dim..(first + group) * dim];
            for m in 0..group {
                for (to, x) in to[m..].iter_mut().step_by(group).zip(query(first + m)) {
                    *to = x * scale;
                }
            }
            first += group;
        }
        self.sums.fill(0.0);
        self.max.fill(NO_SCORE);
    }

    /// weights = q · k for every key of the span's blocks.
    #[inline(always)]
    pub fn scores<S: Simd<V = V>, E: Element>(&mut self, s: S, span: &Span<'_, E>) {
        let mut first = 0;
        while first < self.ranges.len() {
            let group = group(self.ranges.len() - first, S::SCORE_QUERIES);
            let queries = &self.queries[first * self.dim..(first + group) * self.dim];
            let to = &mut self.weights[first..first + group];
            match group {
                8 => score::<S, E, 8>(s, queries, span, to),
                4 => score::<S, E, 4>(s, queries, span, to),
                3 => score::<S, E, 3>(s, queries, span, to),
                2 => score::<S, E, 2>(s, queries, span, to),
                _ => score::<S, E, 1>(s, queries, span, to),
            }
            first += group;
        }
    }

    /// Scores to weights: e^(score − max), 0 for keys that a query does not see. What was summed
    /// before is scaled where the largest score grew.
    #[inline(always)]
    pub fn soften<S: Simd<V = V>, E: Element>(&mut self, s: S, span: &Span<'_, E>) {
        let wide = padded(self.dim);
        for (i, &range) in self.ranges.iter().enumerate() {
            let (from, to) = span.places(range);
            if from == to {
                continue;
            }
            let weights = &mut self.weights[i];
            weights[..from].fill(NO_SCORE);
            weights[to..].fill(NO_SCORE);
            let vectors = weights.as_chunks_mut::<LANES>().0;
            let mut max = s.load(&vectors[0]);
            for vector in &vectors[1..] {
                max = s.max(max, s.load(vector));
            }
            let (before, found) = (self.max[i], s.max_lane(max));
            let max = if found > before { found } else { before };
            if max > before {
                self.max[i] = max;
                let factor = s.exp(s.splat(before - max));
                self.totals[i] = s.mul(self.totals[i], factor);
                for sum in self.sums[i * wide..(i + 1) * wide].as_chunks_mut::<LANES>().0 {
                    let scaled = s.mul(s.load(sum), factor);
                    s.store(sum, scaled);
                }
            }
            let max = s.splat(max);
            for vector in vectors.iter_mut() {
                let weight = s.exp(s.sub(s.load(vector), max));
                s.store(vector, weight);
            }
            weights[..from].fill(0.0);
            weights[to..].fill(0.0);
            for vector in weights.as_chunks::<LANES>().0 {
                self.totals[i] = s.add(self.totals[i], s.load(vector));
            }
        }
    }

    /// sums += weights · values, keys in order, each query only the keys that it sees.
    #[inline(always)]
    pub fn add_values<S: Simd<V = V>, E: Element>(&mut self, s: S, span: &Span<'_, E>) {
        let mut first = 0;
        while first < self.ranges.len() {
            let group = group(self.ranges.len() - first, S::VALUE_QUERIES);
            // Ranges rise: the last query starts last, the first one ends first.
            let from = span.places(self.ranges[first + group - 1]).0;
            let to = span.places(self.ranges[first]).1.max(from);
            // Alone up to where all look, together, alone from where the first one stops looking.
            for part in 0..2 * group + 1 {
                let (queries, places) = if part == group {
                    ((first, group), (from, to))
                } else {
                    let i = first + part % (group + 1);
                    let (own, end) = span.places(self.ranges[i]);
                    let places =
                        if part < group { (own, from.min(end)) } else { (to.max(own), end) };
                    ((i, 1), places)
                };
                self.values::<S, E>(s, span, queries, places);
            }
            first += group;
        }
    }

    /// The places `from..to` for `group` queries from `first` on.
    #[inline(always)]
    fn values<S: Simd<V = V>, E: Element>(
        &mut self,
        s: S,
        span: &Span<'_, E>,
        (first, group): (usize, usize),
        places: (usize, usize),
    ) {
        if places.0 >= places.1 {
            return;
        }
        let wide = padded(self.dim);
        let sums = &mut self.sums[first * wide..(first + group) * wide];
        let weights = &self.weights[first..first + group];
        match group {
            4 => weigh::<S, E, 4>(s, sums, weights, span, places),
            3 => weigh::<S, E, 3>(s, sums, weights, span, places),
            2 => weigh::<S, E, 2>(s, sums, weights, span, places),
            _ => weigh::<S, E, 1>(s, sums, weights, span, places),
        }
    }

    /// out [D] = sums / total of query `i`.
    #[inline(always)]
    pub fn finish<S: Simd<V = V>>(&self, s: S, i: usize, out: &mut [f32]) {
        let total = s.splat(s.sum_lanes(self.totals[i]).recip());
        let sums = &self.sums[i * padded(self.dim)..];
        for (out, sum) in out.chunks_mut(LANES).zip(sums.as_chunks::<LANES>().0) {
            s.store_some(out, s.mul(s.load(sum), total));
        }
    }
}

/// Scores of `M` queries against each block: even and odd dimensions summed apart, in order.
#[inline(always)]
fn score<S: Simd, E: Element, const M: usize>(
    s: S,
    queries: &[f32],
    span: &Span<'_, E>,
    to: &mut [[f32; SPAN]],
) {
    let queries = queries.as_chunks::<M>().0.as_chunks::<2>().0;
    for (block, keys) in span.keys.iter().enumerate() {
        let mut even = [s.splat(0.0); M];
        let mut odd = [s.splat(0.0); M];
        for ([k0, k1], [q0, q1]) in keys.as_chunks::<2>().0.iter().zip(queries) {
            let (k0, k1) = (E::load(s, k0), E::load(s, k1));
            for m in 0..M {
                even[m] = s.fma(k0, s.splat(q0[m]), even[m]);
                odd[m] = s.fma(k1, s.splat(q1[m]), odd[m]);
            }
        }
        for (m, to) in to.iter_mut().take(M).enumerate() {
            s.store(&mut to.as_chunks_mut().0[block], s.add(even[m], odd[m]));
        }
    }
}

/// sums [M, padded D] += weights [M, 64] · values at `places`, a few vectors of D at a time.
#[inline(always)]
fn weigh<S: Simd, E: Element, const M: usize>(
    s: S,
    sums: &mut [f32],
    weights: &[[f32; SPAN]],
    span: &Span<'_, E>,
    places: (usize, usize),
) {
    let vectors = sums.len() / (M * LANES);
    let mut at = 0;
    while at < vectors {
        if vectors - at >= VALUE_VECTORS {
            weigh_vectors::<S, E, M, VALUE_VECTORS>(s, sums, weights, span, (at, places));
            at += VALUE_VECTORS;
        } else {
            weigh_vectors::<S, E, M, 1>(s, sums, weights, span, (at, places));
            at += 1;
        }
    }
}

/// Vectors `at..at + N` of every query's sums.
#[inline(always)]
fn weigh_vectors<S: Simd, E: Element, const M: usize, const N: usize>(
    s: S,
    sums: &mut [f32],
    weights: &[[f32; SPAN]],
    span: &Span<'_, E>,
    (at, (from, to)): (usize, (usize, usize)),
) {
    let sums = sums.as_chunks_mut::<LANES>().0;
    let vectors = sums.len() / M;
    let mut sum = [[s.splat(0.0); N]; M];
    for m in 0..M {
        for n in 0..N {
            sum[m][n] = s.load(&sums[m * vectors + at + n]);
        }
    }
    let weights: [&[f32; SPAN]; M] = std::array::from_fn(|m| &weights[m]);
    for block in from / BLOCK_TOKENS..to.div_ceil(BLOCK_TOKENS) {
        let start = block * BLOCK_TOKENS;
        let (low, high) = (from.max(start), to.min(start + BLOCK_TOKENS));
        let values = span.values[block].chunks_exact(vectors).skip(low - start);
        for (place, row) in (low..high).zip(values) {
            let row = &row[at..at + N];
            for n in 0..N {
                let value = E::load(s, &row[n]);
                for m in 0..M {
                    sum[m][n] = s.fma(value, s.splat(weights[m][place]), sum[m][n]);
                }
            }
        }
    }
    for m in 0..M {
        for n in 0..N {
            s.store(&mut sums[m * vectors + at + n], sum[m][n]);
        }
    }
}
