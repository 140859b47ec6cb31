//! Which part of a model each rank holds.
//!
//! Attention is split by groups of query heads that share a KV head, in contiguous uneven runs.
//! More ranks than KV heads hold copies of them and split their query heads. Every matrix is cut
//! between rows, which any format allows. No rank is idle.

use std::ops::Range;

use kernels::{Heads, Join};

use crate::{DecoderConfig, ModelError, decoder::Width};

/// One rank's part of every layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    pub rank: usize,
    pub world_size: usize,
    /// Query heads of the model.
    pub q_heads: Range<usize>,
    /// KV heads of the model; other ranks may hold the same one.
    pub kv_heads: Range<usize>,
    /// Columns of the hidden state that the rank's rows of the attention output and down matrices
    /// compute: all of them where results are summed.
    pub hidden: Range<usize>,
    /// Columns of the feed-forward layer.
    pub ffn: Range<usize>,
    /// Columns of every expert; none where there are no experts.
    pub expert: Range<usize>,
    /// Columns of the shared expert; none where there is none.
    pub shared_expert: Range<usize>,
    /// Rows of the embedding table and of the output matrix.
    pub vocab: Range<usize>,
    /// How the ranks join the results of attention and of feed-forward blocks.
    pub join: Join,
    head_dim: usize,
}

impl Shard {
    pub(crate) fn new(
        config: &DecoderConfig,
        rank: usize,
        world_size: usize,
    ) -> Result<Self, ModelError> {
        if rank >= world_size {
            return Err(ModelError::Options(format!("there is no rank {rank} of {world_size}")));
        }
        match split(config, world_size) {
            Ok(mut shards) => Ok(shards.swap_remove(rank)),
            Err(reason) => {
                let works = |n: &usize| split(config, *n).is_ok();
                let max = (1..=config.q_heads).rev().find(works).unwrap_or(1);
                Err(ModelError::Ranks { world_size, max, reason })
            }
        }
    }

    /// The same share of the model for ranks that join results otherwise.
    #[must_use]
    pub fn joined_by(self, join: Join, config: &DecoderConfig) -> Self {
        let hidden = match join {
            Join::Gather => run_share(config.hidden, self.rank, self.world_size),
            Join::Sum => 0..config.hidden,
        };
        Self { hidden, join, ..self }
    }

    /// How many columns of an input of the products that end half a layer there are here, of
    /// `whole` in all, of which `local` are this rank's own.
    pub(crate) fn gathered(&self, local: usize, whole: usize) -> Width {
        match self.join {
            Join::Gather => Width { local, whole },
            Join::Sum => Width { local, whole: local },
        }
    }

    /// The rank's attention heads as the kernels count them.
    pub fn heads(&self) -> Heads {
        Heads { q: self.q_heads.len(), kv: self.kv_heads.len(), dim: self.head_dim }
    }
}

/// The shards of every rank, or why there can be none.
fn split(config: &DecoderConfig, world_size: usize) -> Result<Vec<Shard>, String> {
    let DecoderConfig { q_heads, kv_heads, head_dim, hidden, intermediate, vocab, .. } = *config;
    let expert = config.experts.as_ref().map(|experts| experts.intermediate);
    let shared_expert = config.experts.as_ref().and_then(|experts| experts.shared);
    let dense = config.has_dense_layers().then_some(intermediate);
    for (count, what) in [
        (Some(q_heads), "attention heads"),
        (Some(hidden), "hidden columns"),
        (dense, "feed-forward columns"),
        (expert, "columns in an expert"),
        (shared_expert, "columns in its shared expert"),
        (Some(vocab), "rows in its vocabulary"),
    ] {
        if let Some(count) = count.filter(|count| world_size > *count) {
            return Err(format!("the model has {count} {what}"));
        }
    }
    let shard = |rank| {
        let (q_heads, kv_heads) = heads(q_heads, kv_heads, rank, world_size);
        let ffn = |cols: Option<usize>| cols.map_or(0..0, |cols| run_share(cols, rank, world_size));
        Shard {
            rank,
            world_size,
            q_heads,
            kv_heads,
            hidden: run_share(hidden, rank, world_size),
            ffn: ffn(dense),
            expert: ffn(expert),
            shared_expert: ffn(shared_expert),
            vocab: run_share(vocab, rank, world_size),
            join: Join::Gather,
            head_dim,
        }
    };
    Ok((0..world_size).map(shard).collect())
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

/// As [`share`], in the widest runs, up to 16, that divide `count` and leave no rank without:
/// vector instructions like whole runs.
fn run_share(count: usize, rank: usize, world_size: usize) -> Range<usize> {
    let fits = |run: &usize| count.is_multiple_of(*run) && count / run >= world_size;
    let run = [16, 8, 4, 2].into_iter().find(fits).unwrap_or(1);
    let runs = share(count / run, rank, world_size);
    runs.start * run..runs.end * run
}

#[cfg(test)]
mod tests;
