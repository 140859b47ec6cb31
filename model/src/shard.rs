//! Which part of a model each rank holds.
//!
//! Attention is split by groups of query heads that share a KV head, in contiguous uneven runs.
//! More ranks than KV heads hold copies of them and split their query heads. Feed-forward columns
//! are split where the weight format lets them be cut, vocabulary rows anywhere. No rank is idle.

use std::ops::Range;

use kernels::Heads;

use crate::{DecoderConfig, ModelError};

/// Columns that belong together because a quantisation block may not be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SplitUnits {
    /// Inputs of the attention output matrix.
    pub attention: usize,
    /// Inputs of the down matrix.
    pub ffn: usize,
}

impl Default for SplitUnits {
    fn default() -> Self {
        Self { attention: 1, ffn: 1 }
    }
}

/// One rank's part of every layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    pub rank: usize,
    pub world_size: usize,
    /// Query heads of the model.
    pub q_heads: Range<usize>,
    /// KV heads of the model; other ranks may hold the same one.
    pub kv_heads: Range<usize>,
    /// Columns of the feed-forward layer.
    pub ffn: Range<usize>,
    /// Rows of the embedding table and of the output matrix.
    pub vocab: Range<usize>,
    head_dim: usize,
}

impl Shard {
    pub(crate) fn new(
        config: &DecoderConfig,
        units: SplitUnits,
        rank: usize,
        world_size: usize,
    ) -> Result<Self, ModelError> {
        if rank >= world_size {
            return Err(ModelError::Options(format!("there is no rank {rank} of {world_size}")));
        }
        match split(config, units, world_size) {
            Ok(mut shards) => Ok(shards.swap_remove(rank)),
            Err(reason) => {
                let works = |n: &usize| split(config, units, *n).is_ok();
                let max = (1..=config.q_heads).rev().find(works).unwrap_or(1);
                Err(ModelError::Ranks { world_size, max, reason })
            }
        }
    }

    /// The rank's attention heads as the kernels count them.
    pub fn heads(&self) -> Heads {
        Heads { q: self.q_heads.len(), kv: self.kv_heads.len(), dim: self.head_dim }
    }
}

/// The shards of every rank, or why there can be none.
fn split(
    config: &DecoderConfig,
    units: SplitUnits,
    world_size: usize,
) -> Result<Vec<Shard>, String> {
    let DecoderConfig { q_heads, kv_heads, head_dim, intermediate, vocab, .. } = *config;
    if world_size > q_heads {
        return Err(format!("the model has {q_heads} attention heads"));
    }
    let ffn_unit = preferred_unit(intermediate, units.ffn, world_size).ok_or_else(|| {
        format!("{intermediate} feed-forward columns can only be cut every {}", units.ffn)
    })?;
    let vocab_unit = preferred_unit(vocab, 1, world_size)
        .ok_or_else(|| format!("the vocabulary has {vocab} rows"))?;
    (0..world_size)
        .map(|rank| {
            let (q_heads, kv_heads) = heads(q_heads, kv_heads, rank, world_size);
            let cut = q_heads.end * head_dim;
            if !cut.is_multiple_of(units.attention) {
                return Err(format!(
                    "a cut at attention column {cut} would split a block of {}",
                    units.attention
                ));
            }
            let scaled = |share: Range<usize>, unit: usize| share.start * unit..share.end * unit;
            Ok(Shard {
                rank,
                world_size,
                q_heads,
                kv_heads,
                ffn: scaled(share(intermediate / ffn_unit, rank, world_size), ffn_unit),
                vocab: scaled(share(vocab / vocab_unit, rank, world_size), vocab_unit),
                head_dim,
            })
        })
        .collect()
}

/// The query and KV heads of one rank.
fn heads(q: usize, kv: usize, rank: usize, world_size: usize) -> (Range<usize>, Range<usize>) {
    let group = q / kv;
    if world_size <= kv {
        let kv_heads = share(kv, rank, world_size);
        return (kv_heads.start * group..kv_heads.end * group, kv_heads);
    }
    let kv_head = rank * kv / world_size;
    let first_rank = (kv_head * world_size).div_ceil(kv);
    let next_rank = ((kv_head + 1) * world_size).div_ceil(kv);
    let within = share(group, rank - first_rank, next_rank - first_rank);
    let first = kv_head * group;
    (first + within.start..first + within.end, kv_head..kv_head + 1)
}

/// The share of `rank` when `count` things are dealt out in runs; the first ranks get one more.
fn share(count: usize, rank: usize, world_size: usize) -> Range<usize> {
    let (each, more) = (count / world_size, count % world_size);
    let start = rank * each + rank.min(more);
    start..start + each + usize::from(rank < more)
}

/// The widest run, up to 32 columns, that divides `count`, respects `unit` and leaves no rank
/// without: vector instructions like whole runs.
fn preferred_unit(count: usize, unit: usize, world_size: usize) -> Option<usize> {
    [32, 16, 8, 4, 2, 1].into_iter().find(|wide| {
        count.is_multiple_of(*wide) && wide.is_multiple_of(unit) && count / wide >= world_size
    })
}

#[cfg(test)]
mod tests;
