//! What a card is reckoned to hold of a checkpoint is what it holds.

#[path = "../../kernels/cuda/tests/common/counting.rs"]
mod counting;

use std::path::Path;

use counting::Counting;
use cuda::{Cuda, CudaConfig, WeightFormat};
use kernels::{Backend, WeightPart};
use model::{Checkpoint, ModelError, Shard};

/// Bytes of every weight of a rank, once all are on the device.
fn held(checkpoint: &Checkpoint, shard: &Shard, weights: WeightFormat) -> Result<u64, ModelError> {
    let device = Cuda::new(Counting::new(), CudaConfig { weights, ..CudaConfig::default() });
    let mut kept = vec![device.table(&checkpoint.embed(shard)?)?];
    if !checkpoint.config().tied {
        kept.push(device.table(&checkpoint.lm_head(shard)?)?);
    }
    for layer in 0..checkpoint.config().layers {
        let stacks: [Vec<WeightPart<'_>>; 4] = [
            checkpoint.qkv(layer, shard)?,
            checkpoint.attn_out(layer, shard)?,
            checkpoint.gate_up(layer, shard)?,
            checkpoint.down(layer, shard)?,
        ];
        for parts in stacks {
            kept.push(device.weight(&parts)?);
        }
    }
    Ok(device.driver().held() as u64)
}

#[test]
fn cards_hold_what_they_are_reckoned_to() {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/public");
    for name in [
        "qwen1_plain_hd128",
        "qwen2_awq_int4",
        "qwen2_gptq_int4",
        "qwen2_gqa4_tied_sharded",
        "qwen3_fp8_block128",
    ] {
        let checkpoint = Checkpoint::open(&goldens.join(name)).unwrap();
        for (rank, world_size) in [(0, 1), (0, 2), (1, 2)] {
            let shard = checkpoint.shard(rank, world_size).unwrap();
            for format in [WeightFormat::Bf16, WeightFormat::Fp8] {
                let stacks = checkpoint.stacks(&shard).unwrap();
                let bytes = stacks.iter().map(|stack| match stack.is_table {
                    true => WeightFormat::table_bytes(&stack.parts),
                    false => format.bytes(&stack.parts),
                });
                let held = held(&checkpoint, &shard, format).unwrap();
                assert_eq!(bytes.sum::<u64>(), held, "{name}, {rank} of {world_size}, {format:?}");
            }
        }
    }
}
