//! What a rank takes of a CUDA card. Needs no card: sizes follow from shapes.

use std::time::Duration;

use cuda::{CudaConfig, Element, LOGIT_ROWS_MAX, PeerConfig, StepShape, WeightFormat};
use kernels::PartShape;
use model::{Checkpoint, DecoderConfig, ModelError, Role, RunnerOptions, Shard, Stack};

use super::layout::{KvShare, RankCost};

/// Of a card's free memory, what is left alone for each rank: kernels that the driver and cuBLASLt
/// load as they are first used, and the rest of the 2 MiB pages that larger allocations end in.
const RESERVE_BYTES: u64 = 1 << 30;

/// What ranks can use of `free` bytes.
pub(crate) fn usable(free: u64, ranks: usize) -> u64 {
    free.saturating_sub(RESERVE_BYTES * ranks as u64)
}

/// What the driver takes of a card before anything is allocated: its context, and the kernels.
const CONTEXT_BYTES: u64 = 512 << 20;

/// What one rank can use of a card that nobody else uses.
pub(crate) fn usable_when_idle(memory: u64) -> u64 {
    usable(memory.saturating_sub(CONTEXT_BYTES), 1)
}

/// A card serves one model: the KV pool takes all that is left.
pub(crate) const KV_SHARE: KvShare = KvShare { part: 1, contexts_max: u64::MAX };

/// What a rank holds of a model on a card with `fp8_products`, as `cuda::Facts` tells it.
///
/// # Errors
/// As [`Checkpoint::stacks`].
pub(crate) fn cost(
    cuda: CudaConfig,
    fp8_products: bool,
    checkpoint: &Checkpoint,
    shard: &Shard,
    step_tokens_max: usize,
) -> Result<RankCost, ModelError> {
    let layers = checkpoint.config().layers as u64;
    let block = layers * cuda.kv_format.block_bytes(shard.heads()) as u64;
    let mut cost = RankCost { weights: 0, block, products: 0 };
    for Stack { role, parts } in checkpoint.stacks(shard)? {
        cost.weights += bytes(cuda.weights, role, &parts);
        if role == Role::Weight {
            let products = cuda.product_bytes(&parts, step_tokens_max, fp8_products);
            cost.products = cost.products.max(products);
        }
    }
    Ok(cost)
}

/// Bytes that a card holds of a stack.
pub(super) fn bytes(weights: WeightFormat, role: Role, parts: &[PartShape]) -> u64 {
    match role {
        Role::Table => WeightFormat::table_bytes(parts),
        Role::Expert => weights.expert_bytes(parts),
        Role::Weight => weights.bytes(parts),
    }
}

/// Bytes beside weights and KV cache.
pub(crate) fn scratch(
    cuda: CudaConfig,
    config: &DecoderConfig,
    shard: &Shard,
    cost: &RankCost,
    options: &RunnerOptions,
) -> u64 {
    let sampled = (options.step_tokens_max.min(LOGIT_ROWS_MAX), config.vocab);
    let step = cuda.step_bytes(&StepShape {
        batch: options.room(shard.heads()),
        sampled: (shard.rank == 0).then_some(sampled),
        products: cost.products,
    });
    let exchange = match shard.world_size {
        1 => 0,
        ranks => PeerConfig::new(ranks, Duration::ZERO).region_bytes() as u64,
    };
    model::elements(config, shard, options, LOGIT_ROWS_MAX).bytes(Element::Bf16.bytes())
        + step
        + exchange
}

#[cfg(test)]
mod tests;
