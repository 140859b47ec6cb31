//! What a rank's steps read of its model on a card.

use cuda::{CudaConfig, WeightFormat};
use kernels::{BLOCK_TOKENS, PartShape};
use model::{Checkpoint, ModelError, Role, Shard, Stack};

use super::{
    card,
    step_model::{Products, Streams},
};

/// # Errors
/// As [`Checkpoint::stacks`].
pub(crate) fn streams(
    cuda: CudaConfig,
    fp8_products: bool,
    checkpoint: &Checkpoint,
    shard: &Shard,
) -> Result<Streams, ModelError> {
    let config = checkpoint.config();
    let stacks = checkpoint.stacks(shard)?;
    // Tables come first: the embedding, and the output matrix where it is another.
    let of_vocabulary = if config.tied { 1 } else { 2 };
    let (vocabulary, layers) = stacks.split_at(of_vocabulary.min(stacks.len()));
    let sums = |are_experts: bool| {
        let some = layers.iter().filter(|stack| (stack.role == Role::Expert) == are_experts);
        some.fold((0, 0), |(bytes, elements), Stack { role, parts }| {
            let (rows, cols) = PartShape::stacked(parts);
            (bytes + card::bytes(cuda.weights, *role, parts), elements + (rows * cols) as u64)
        })
    };
    let ((dense, dense_elements), (experts, expert_elements)) = (sums(false), sums(true));
    let head = vocabulary.last().map_or(0, |stack| WeightFormat::table_bytes(&stack.parts));
    let block = config.layers * cuda.kv_format.block_bytes(shard.heads());
    let (bytes, elements) = (dense + experts, dense_elements + expert_elements);
    Ok(Streams {
        layers: config.layers,
        hidden: config.hidden,
        products: products(cuda, fp8_products, bytes, elements),
        dense,
        dense_elements,
        experts,
        expert_elements,
        expert_share: config
            .experts
            .as_ref()
            .map_or(0.0, |experts| experts.per_token as f64 / experts.count as f64),
        head,
        kv_token: (block / BLOCK_TOKENS) as u64,
        attention: shard.heads().q * shard.heads().dim,
        ranks: shard.world_size,
    })
}

/// By what most of the matrices take.
fn products(cuda: CudaConfig, fp8_products: bool, bytes: u64, elements: u64) -> Products {
    match cuda.weights {
        _ if 4 * bytes < 3 * elements => Products::Int4,
        WeightFormat::Fp8 if fp8_products => Products::Fp8,
        WeightFormat::Fp8 => Products::Fp8Widened,
        WeightFormat::Bf16 => Products::Bf16,
    }
}
