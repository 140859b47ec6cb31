//! Attention over a paged cache: one case for a device and for the oracle.
//!
//! Blocks lie in the cache in no order, NaNs fill every slot that no token owns, and block tables
//! go on with numbers that are no blocks. A sequence's numbers depend on its seed and positions
//! alone, so that cases which cut or mix sequences otherwise can be compared.

use crate::{e4m3, flat::no_turn, noise, rounded};
use cuda::{Cuda, CudaKv, Driver, KvFormat};
use kernels::{
    BLOCK_TOKENS, Backend, Batch, BatchRoom, Heads, KernelError, Rotation, Step, StepSequence,
    TableBlock, Tensor, plain::Plain,
};

/// Queries are as much larger than keys and values, so that few keys have most of the weight and
/// the loss of one shows.
const SHARPNESS: f32 = 6.0;

/// The scale of a token's key (`which` 0) or value (1) of a head in an e4m3 cache: neighbours have
/// others, and what they scale stays exact in bf16.
fn scale(which: usize, token: usize, head: usize) -> f32 {
    let steps = [0.25, 0.5, 0.375, 0.75, 0.4375];
    steps[(3 * token + head) % steps.len()] * [1.0, 4.0][which]
}

/// Keys in a split of the decode kernel.
pub const SPLIT_TOKENS: usize = 512;

/// Rows of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    /// Tells sequences apart.
    pub seed: u64,
    /// Cached tokens before the first row.
    pub prefix: usize,
    pub rows: usize,
}

impl Rows {
    fn context(&self) -> usize {
        self.prefix + self.rows
    }

    fn blocks(&self) -> usize {
        self.context().div_ceil(BLOCK_TOKENS)
    }
}

/// One call of attention.
#[derive(Clone, Debug)]
pub struct Case {
    pub heads: Heads,
    pub window: Option<usize>,
    pub format: KvFormat,
    pub sequences: Vec<Rows>,
    /// Each query is near to one key, at an edge of what its row sees.
    pub needles: bool,
}

impl Case {
    /// bf16, no window; sequences (prefix, rows).
    pub fn new((q, kv, dim): (usize, usize, usize), sequences: &[(usize, usize)]) -> Self {
        let sequences = sequences.iter().zip(1..);
        let sequences = sequences.map(|(&(prefix, rows), seed)| Rows { seed, prefix, rows });
        let heads = Heads { q, kv, dim };
        Self {
            heads,
            window: None,
            format: KvFormat::Bf16,
            sequences: sequences.collect(),
            needles: false,
        }
    }

    /// Queries that find one key each: at the start, the end and the edges of blocks and splits,
    /// and right before a window. One key too few or too many shows, in contexts of any length.
    #[must_use]
    pub fn needles(mut self) -> Self {
        self.needles = true;
        self
    }

    #[must_use]
    pub fn window(mut self, window: usize) -> Self {
        self.window = Some(window);
        self
    }

    #[must_use]
    pub fn format(mut self, format: KvFormat) -> Self {
        self.format = format;
        self
    }

    /// Rows of the call.
    pub fn tokens(&self) -> usize {
        self.sequences.iter().map(|s| s.rows).sum()
    }

    /// out [T, q D] of a device.
    ///
    /// # Errors
    /// The device's own.
    pub fn run<D: Driver>(&self, device: &Cuda<D>) -> Result<Vec<f32>, KernelError> {
        let kv = device.kv(self.layout().1, self.heads)?;
        self.fill(device, &kv)?;
        self.attend(device, &kv)
    }

    /// out [T, q D] of a device's second call on one batch.
    ///
    /// # Errors
    /// The device's own.
    pub fn run_again<D: Driver>(&self, device: &Cuda<D>) -> Result<Vec<f32>, KernelError> {
        let kv = device.kv(self.layout().1, self.heads)?;
        self.fill(device, &kv)?;
        let batch = self.batch(device)?;
        self.attend_to(device, &kv, &batch)?;
        self.attend_to(device, &kv, &batch)
    }

    /// out [T, q D] of the oracle.
    ///
    /// # Errors
    /// The oracle's own.
    pub fn oracle(&self) -> Result<Vec<f32>, KernelError> {
        let mut kv = Plain.kv(self.layout().1, self.heads)?;
        let all: Vec<Rows> = self.sequences.iter().map(|s| self.whole(s)).collect();
        let whole = Self { sequences: all, ..self.clone() };
        let mut qkv = Tensor::from_host(&Plain, self.heads.qkv_cols(), &whole.qkv())?;
        let cos_sin = no_turn(&Plain, self.heads.dim)?;
        let rotation = Rotation { norm: None, cos_sin: &cos_sin, heads: self.heads };
        Plain.rotate_and_store(&mut kv, &mut qkv, &rotation, &whole.batch(&Plain)?)?;
        self.attend(&Plain, &kv)
    }

    fn whole(&self, rows: &Rows) -> Rows {
        Rows { prefix: 0, rows: rows.context(), ..*rows }
    }

    fn attend<B: Backend>(&self, device: &B, kv: &B::Kv) -> Result<Vec<f32>, KernelError> {
        self.attend_to(device, kv, &self.batch(device)?)
    }

    fn attend_to<B: Backend>(
        &self,
        device: &B,
        kv: &B::Kv,
        batch: &Batch<B>,
    ) -> Result<Vec<f32>, KernelError> {
        let qkv = Tensor::from_host(device, self.heads.qkv_cols(), &self.qkv())?;
        let out_cols = self.heads.q * self.heads.dim;
        let mut out = Tensor::zeros(device, self.tokens(), out_cols)?;
        // What no kernel writes shows.
        device.write_floats(&mut out.data, &vec![f32::NAN; self.tokens() * out_cols])?;
        device.attention(&mut out, &qkv, kv, batch, self.heads, self.window)?;
        let mut got = vec![0.0; self.tokens() * out_cols];
        device.read_floats(&mut got, &out.data)?;
        Ok(got)
    }

    /// Every token's packed row, as the cache's format holds keys and values.
    fn tokens_of(&self, rows: &Rows) -> Vec<f32> {
        let Heads { q, kv, dim } = self.heads;
        let cols = self.heads.qkv_cols();
        let mut all = rounded(&noise(rows.seed, rows.context() * cols));
        for (token, row) in all.chunks_exact_mut(cols).enumerate() {
            let (queries, cached) = row.split_at_mut(q * dim);
            let sharp = |v: f32| half::bf16::from_f32(v * SHARPNESS).to_f32();
            queries.iter_mut().for_each(|v| *v = sharp(*v));
            if self.format == KvFormat::Fp8 {
                for (at, cached) in cached.chunks_exact_mut(dim).enumerate() {
                    let scale = scale(at / kv, token, at % kv);
                    let held = |v: f32| {
                        let value = e4m3::nearest(v / scale).and_then(e4m3::value);
                        value.map_or(f32::NAN, |value| value as f32 * scale)
                    };
                    cached.iter_mut().for_each(|v| *v = held(*v));
                }
            }
        }
        if self.needles {
            self.point(&mut all, rows.prefix);
        }
        all
    }

    /// Makes the queries of rows from `first` on needles.
    fn point(&self, all: &mut [f32], first: usize) {
        let Heads { q, kv, dim } = self.heads;
        let cols = self.heads.qkv_cols();
        for p in first..all.len() / cols {
            let start = self.window.map_or(0, |window| (p + 1).saturating_sub(window));
            let (block, split) = (p - p % BLOCK_TOKENS, p - p % SPLIT_TOKENS);
            let edges = [start, p, block, split, start + 1, p / 2, start + 15, p - p % 3];
            let places = edges.into_iter().flat_map(|edge| [edge, edge.saturating_sub(1)]);
            let places: Vec<usize> = places.map(|place| place.min(p)).collect();
            for h in 0..q {
                let key = places[(p + h) % places.len()] * cols + (q + h / (q / kv)) * dim;
                for d in 0..dim {
                    let (near, noise) = (all[key + d], all[p * cols + h * dim + d] / SHARPNESS);
                    let query = half::bf16::from_f32(3.0 * near + noise);
                    all[p * cols + h * dim + d] = query.to_f32();
                }
            }
        }
    }

    /// [T, (q + 2 kv) D]
    pub(crate) fn qkv(&self) -> Vec<f32> {
        let cols = self.heads.qkv_cols();
        let rows = |s: &Rows| self.tokens_of(s)[s.prefix * cols..].to_vec();
        self.sequences.iter().flat_map(rows).collect()
    }

    /// The blocks of each sequence, and how many the cache has: some that nobody owns as well.
    pub(crate) fn layout(&self) -> (Vec<Vec<i32>>, usize) {
        let owned: usize = self.sequences.iter().map(Rows::blocks).sum();
        let blocks = owned + 5;
        let mut order: Vec<i32> = (0..blocks as i32).collect();
        let draws = noise(blocks as u64 + 77, blocks);
        order.sort_by(|&a, &b| draws[a as usize].total_cmp(&draws[b as usize]));
        let mut free = order.into_iter();
        let take = |s: &Rows| free.by_ref().take(s.blocks()).collect();
        (self.sequences.iter().map(take).collect(), blocks)
    }

    /// Room for the call, and for tables that it does not use.
    pub(crate) fn room(&self) -> BatchRoom {
        let context = self.sequences.iter().map(Rows::context).max().unwrap_or(0);
        BatchRoom {
            tokens: self.tokens(),
            sequences: self.sequences.len(),
            tables: self.sequences.len() + 3,
            context: context + 2 * BLOCK_TOKENS,
            heads: self.heads,
        }
    }

    /// The call as a step. Tables are the sequences' in another order.
    pub(crate) fn step(&self) -> Step {
        let mut step = Step::default();
        for ((s, blocks), at) in self.sequences.iter().zip(self.layout().0).zip(0..) {
            let table = self.sequences.len() + 1 - at;
            let (start, rows) = (s.prefix, s.rows);
            step.sequences.push(StepSequence { table, start, rows, rope_start: 0 });
            step.ids.extend(vec![0; rows]);
            let block = |(index, block)| TableBlock { table, index, block: block as usize };
            step.new_blocks.extend(blocks.into_iter().enumerate().map(block));
        }
        step
    }

    /// The call's batch, as it is before a step: tables hold numbers that are no blocks.
    pub(crate) fn empty<B: Backend>(&self, device: &B) -> Result<Batch<B>, KernelError> {
        let room = self.room();
        let mut batch = Batch::new(device, room, None)?;
        let nobodys = vec![i32::MAX; room.tables * room.table_cols()];
        device.write_ints(&mut batch.block_tables, &nobodys)?;
        Ok(batch)
    }

    /// The call's batch.
    pub(crate) fn batch<B: Backend>(&self, device: &B) -> Result<Batch<B>, KernelError> {
        let mut batch = self.empty(device)?;
        device.lay_out(&mut batch, &self.step())?;
        // One row of the cos/sin table for all.
        device.write_ints(&mut batch.rope_rows, &vec![0; self.tokens()])?;
        batch.rope_rows_end = 1;
        Ok(batch)
    }

    /// Writes the cache's own bytes: NaNs, then the tokens.
    pub(crate) fn fill<D: Driver>(
        &self,
        device: &Cuda<D>,
        kv: &CudaKv<D>,
    ) -> Result<(), KernelError> {
        let Heads { q, kv: kv_heads, dim } = self.heads;
        let width = self.format.element_bytes();
        let (tables, _) = self.layout();
        let pools = [kv.keys(), kv.values()];
        for (which, pool) in pools.into_iter().enumerate() {
            // All ones are a NaN in both formats, and in a scale.
            let mut bytes = vec![0xff; pool.bytes()];
            let (row_bytes, scale_bytes) = (dim * width, self.format.scale_bytes());
            for (s, table) in self.sequences.iter().zip(&tables) {
                let tokens = self.tokens_of(s);
                for (p, row) in tokens.chunks_exact(self.heads.qkv_cols()).enumerate() {
                    for head in 0..kv_heads {
                        let block = table[p / BLOCK_TOKENS] as usize * kv_heads + head;
                        let start = block * BLOCK_TOKENS * (row_bytes + scale_bytes);
                        let from = &row[(q + which * kv_heads + head) * dim..][..dim];
                        let scale = scale(which, p, head);
                        let at = start + p % BLOCK_TOKENS * row_bytes;
                        let to = bytes[at..][..row_bytes].chunks_exact_mut(width);
                        to.zip(from).for_each(|(to, &v)| self.store(to, v, scale));
                        let at = start + BLOCK_TOKENS * row_bytes + p % BLOCK_TOKENS * scale_bytes;
                        bytes[at..][..scale_bytes]
                            .copy_from_slice(&scale.to_le_bytes()[..scale_bytes]);
                    }
                }
            }
            pool.write(device.driver(), &bytes)?;
        }
        Ok(())
    }

    fn store(&self, to: &mut [u8], value: f32, scale: f32) {
        match self.format {
            KvFormat::Bf16 => {
                to.copy_from_slice(&half::bf16::from_f32(value).to_le_bytes());
            }
            // Without a code for it, one that is NaN.
            KvFormat::Fp8 => to[0] = e4m3::nearest(value / scale).unwrap_or(0x7f),
        }
    }
}
