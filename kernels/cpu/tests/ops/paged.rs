//! Sequences in a paged cache, for the tests of attention and of wrong plans.

use kernels::{BLOCK_TOKENS, Backend, Batch, Heads, Rotation, Tensor};

use crate::common::{Random, host, ints, no_batch, no_turn};

/// Sequences in one cache whose unused slots hold NaN.
pub struct Paged {
    pub heads: Heads,
    pub blocks: usize,
    /// Packed rows of every token of each sequence.
    pub qkv: Vec<Vec<f32>>,
    pub tables: Vec<Vec<i32>>,
}

impl Paged {
    pub fn new(heads: Heads, contexts: &[usize], seed: u64) -> Self {
        let mut random = Random(seed);
        let needed: usize = contexts.iter().map(|c| c.div_ceil(BLOCK_TOKENS)).sum();
        let blocks = needed + 3;
        let mut free: Vec<i32> = (0..blocks as i32).collect();
        let mut take = |random: &mut Random| free.swap_remove(random.next() as usize % free.len());
        let mut tables = Vec::new();
        for context in contexts {
            let blocks = context.div_ceil(BLOCK_TOKENS);
            tables.push((0..blocks).map(|_| take(&mut random)).collect());
        }
        let qkv = contexts.iter().map(|c| random.floats(c * heads.qkv_cols())).collect();
        Self { heads, blocks, qkv, tables }
    }

    /// The given rows of the given sequences; each context ends where its rows end.
    pub fn batch<B: Backend>(
        &self,
        device: &B,
        rows: &[(usize, std::ops::Range<usize>)],
    ) -> Batch<B> {
        let cols = self.tables.iter().map(Vec::len).max().unwrap_or(0) + 1;
        let (mut positions, mut slots, mut tables) = (vec![], vec![], vec![]);
        let (mut starts, mut contexts) = (vec![0], vec![]);
        for (sequence, rows) in rows {
            let table = &self.tables[*sequence];
            for position in rows.clone() {
                let block = table[position / BLOCK_TOKENS];
                positions.push(position as i32);
                slots.push(block * BLOCK_TOKENS as i32 + (position % BLOCK_TOKENS) as i32);
            }
            starts.push(positions.len() as i32);
            contexts.push(rows.end as i32);
            let used = rows.end.div_ceil(BLOCK_TOKENS);
            // What lies past a sequence's own blocks is nobody's block.
            tables.extend((0..cols).map(|i| if i < used { table[i] } else { i32::MIN }));
        }
        Batch {
            tokens: positions.len(),
            sequences: rows.len(),
            positions: ints(device, &positions),
            rope_rows: ints(device, &vec![0; positions.len()]),
            slots: ints(device, &slots),
            row_starts: ints(device, &starts),
            context_lens: ints(device, &contexts),
            tables: ints(device, &(0..rows.len() as i32).collect::<Vec<_>>()),
            block_tables: ints(device, &tables),
            block_table_cols: cols,
            ..no_batch(device)
        }
    }

    pub fn rows<B: Backend>(
        &self,
        device: &B,
        rows: &[(usize, std::ops::Range<usize>)],
    ) -> Tensor<B> {
        let cols = self.heads.qkv_cols();
        let values: Vec<f32> = rows
            .iter()
            .flat_map(|(s, rows)| &self.qkv[*s][rows.start * cols..rows.end * cols])
            .copied()
            .collect();
        Tensor::from_host(device, cols, &values).unwrap()
    }

    /// A cache of NaN everywhere but in the positions below `ends`.
    pub fn cache<B: Backend>(&self, device: &B, ends: &[usize]) -> B::Kv {
        let heads = self.heads;
        let mut kv = device.kv(self.blocks, heads).unwrap();
        let slots: Vec<i32> = (0..(self.blocks * BLOCK_TOKENS) as i32).collect();
        let batch = Batch {
            tokens: slots.len(),
            slots: ints(device, &slots),
            rope_rows: ints(device, &vec![0; slots.len()]),
            ..no_batch(device)
        };
        let cos_sin = no_turn(device, heads.dim);
        let rotation = Rotation { norm: None, cos_sin: &cos_sin, heads };
        let nan = vec![f32::NAN; slots.len() * heads.qkv_cols()];
        let mut nan = Tensor::from_host(device, heads.qkv_cols(), &nan).unwrap();
        device.rotate_and_store(&mut kv, &mut nan, &rotation, &batch).unwrap();
        for (sequence, &end) in ends.iter().enumerate() {
            // In uneven pieces, so that whole blocks and parts of them are stored.
            for piece in (0..end).step_by(21) {
                let rows = [(sequence, piece..end.min(piece + 21))];
                let (batch, mut qkv) = (self.batch(device, &rows), self.rows(device, &rows));
                device.rotate_and_store(&mut kv, &mut qkv, &rotation, &batch).unwrap();
            }
        }
        kv
    }

    /// Attention of the given rows, the cache holding every sequence's positions up to them.
    pub fn attend<B: Backend>(
        &self,
        device: &B,
        rows: &[(usize, std::ops::Range<usize>)],
        window: Option<usize>,
    ) -> Vec<f32> {
        let mut ends = vec![0; self.qkv.len()];
        rows.iter().for_each(|(s, rows)| ends[*s] = rows.end);
        let kv = self.cache(device, &ends);
        let batch = self.batch(device, rows);
        let qkv = self.rows(device, rows);
        let out_cols = self.heads.q * self.heads.dim;
        let mut out = Tensor::zeros(device, batch.tokens, out_cols).unwrap();
        device.attention(&mut out, &qkv, &kv, &batch, self.heads, window).unwrap();
        host(device, &out)
    }
}

pub const fn heads(q: usize, kv: usize, dim: usize) -> Heads {
    Heads { q, kv, dim }
}
