//! What a rank's steps read of its model on a card.

use cuda::{CudaConfig, WeightFormat};
use kernels::{BLOCK_TOKENS, PartShape};
use model::{Checkpoint, ModelError, Shard, Stack};

use super::step_model::{Products, Streams};

/// # Errors
/// As [`Checkpoint::stacks`].
pub(crate) fn streams(
    cuda: CudaConfig,
    fp8_products: bool,
    checkpoint: &Checkpoint,
    shard: &Shard,
) -> Result<Streams, ModelError> {
    let config = checkpoint.config();
    let (mut dense, mut dense_elements, mut tables) = (0, 0, Vec::new());
    for Stack { is_table, parts } in checkpoint.stacks(shard)? {
        if is_table {
            tables.push(parts);
        } else {
            dense += cuda.weights.bytes(&parts);
            dense_elements += elements(&parts);
        }
    }
    // The embedding, and the output matrix where it is another; then routers and experts.
    let of_vocabulary = if config.tied { 1 } else { 2 };
    let (vocabulary, experts) = tables.split_at(of_vocabulary.min(tables.len()));
    let head = vocabulary.last().map_or(0, |parts| WeightFormat::table_bytes(parts));
    let block = config.layers * cuda.kv_format.block_bytes(shard.heads());
    Ok(Streams {
        layers: config.layers,
        hidden: config.hidden,
        products: products(cuda, fp8_products, dense, dense_elements),
        dense,
        dense_elements,
        experts: experts.iter().map(|parts| WeightFormat::table_bytes(parts)).sum(),
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

fn elements(parts: &[PartShape]) -> u64 {
    parts.iter().map(|part| (part.rows * part.cols) as u64).sum()
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
