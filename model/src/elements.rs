//! What a rank allocates beside matrices and KV cache, counted before it does.

use kernels::BLOCK_TOKENS;

use crate::{DecoderConfig, RunnerOptions, Shard, rope::RopeTables, runner::scratch_shape};

/// Numbers by how devices keep them. Counts end at the largest that there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Elements {
    /// In the device's format of activations.
    pub floats: usize,
    /// In f32 everywhere.
    pub exact: usize,
    /// Indices of 32 bits.
    pub ints: usize,
}

impl Elements {
    pub(crate) fn floats(floats: usize) -> Self {
        Self { floats, ..Self::default() }
    }

    pub(crate) fn exact(exact: usize) -> Self {
        Self { exact, ..Self::default() }
    }

    pub(crate) fn ints(ints: usize) -> Self {
        Self { ints, ..Self::default() }
    }

    pub(crate) fn and(self, more: Self) -> Self {
        Self {
            floats: self.floats.saturating_add(more.floats),
            exact: self.exact.saturating_add(more.exact),
            ints: self.ints.saturating_add(more.ints),
        }
    }

    pub(crate) fn times(self, n: usize) -> Self {
        let Self { floats, exact, ints } = self;
        let [floats, exact, ints] = [floats, exact, ints].map(|count| count.saturating_mul(n));
        Self { floats, exact, ints }
    }

    /// Where an activation takes `float_bytes`.
    pub fn bytes(self, float_bytes: usize) -> u64 {
        let words = (self.exact as u64).saturating_add(self.ints as u64);
        (self.floats as u64)
            .saturating_mul(float_bytes as u64)
            .saturating_add(words.saturating_mul(4))
    }
}

/// What a rank with `shard` allocates beside matrices, KV cache and what its device needs of its
/// own: activations, a step's indices, rope tables, norms and biases. It computes up to
/// `logit_rows_max` rows of logits at once.
pub fn elements(
    config: &DecoderConfig,
    shard: &Shard,
    options: &RunnerOptions,
    logit_rows_max: usize,
) -> Elements {
    let tables = RopeTables::new(&config.rope, options.context_max);
    let rope = tables.rows().saturating_mul(config.head_dim);
    scratch_shape(config, shard, options, logit_rows_max)
        .elements()
        .and(batch(config, options))
        .and(Elements::exact(rope))
        .and(Elements::floats(vectors(config, shard)))
}

/// Of `BatchBuilder`, without the device's cuts.
fn batch(config: &DecoderConfig, options: &RunnerOptions) -> Elements {
    let RunnerOptions { step_tokens_max: tokens, sequences_max, context_max, .. } = *options;
    // ids, positions, rope rows, slots and rows of logits; of sequences the first row, the length,
    // the table, its blocks, and the last id.
    let blocks = context_max.div_ceil(BLOCK_TOKENS);
    let sequence = Elements::ints(3 + blocks).and(Elements::exact(1));
    let logn = usize::from(config.logn.is_some_and(|trained| trained < context_max));
    Elements::ints(5)
        .and(Elements::exact(logn))
        .times(tokens)
        .and(sequence.times(sequences_max))
        .and(Elements::ints(1))
        .and(Elements::exact(logn).times(context_max))
}

/// Norms and biases.
fn vectors(config: &DecoderConfig, shard: &Shard) -> usize {
    let bias = if config.qkv_bias { shard.heads().qkv_cols() } else { 0 };
    let head_norms = if config.qk_norm { 2 * config.head_dim } else { 0 };
    config.layers * (2 * config.hidden + bias + head_norms) + config.hidden
}
