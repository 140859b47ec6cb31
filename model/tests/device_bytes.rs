//! What a card is reckoned to hold of a checkpoint is what it holds.

#[path = "../../kernels/cuda/tests/common/counting.rs"]
mod counting;

use std::path::Path;

use counting::Counting;
use cuda::{Cuda, CudaConfig, WeightFormat};
use kernels::{Backend, Join, WeightPart};
use model::{Checkpoint, FfnBlock, ModelError, Role, Shard};

/// Bytes of every weight of a rank, once all are on the device.
fn held(checkpoint: &Checkpoint, shard: &Shard, weights: WeightFormat) -> Result<u64, ModelError> {
    let device = Cuda::new(Counting::new(), CudaConfig { weights, ..CudaConfig::default() });
    let mut kept = vec![device.table(&checkpoint.embed(shard)?)?];
    let mut experts = Vec::new();
    let config = checkpoint.config();
    if !config.tied {
        kept.push(device.table(&checkpoint.lm_head(shard)?)?);
    }
    for layer in 0..config.layers {
        kept.push(device.weight(&checkpoint.qkv(layer, shard)?)?);
        kept.push(device.weight(&checkpoint.attn_out(layer, shard)?)?);
        let mut blocks = vec![FfnBlock::Dense];
        if let Some(mixture) = &config.experts {
            kept.push(device.table(&checkpoint.router(layer)?)?);
            for expert in (0..mixture.count).map(FfnBlock::Expert) {
                for parts in [
                    checkpoint.gate_up(layer, expert, shard)?,
                    checkpoint.down(layer, expert, shard)?,
                ] {
                    let shapes: Vec<_> = parts.iter().map(WeightPart::shape).collect();
                    let mut one = device.experts(1, &shapes)?;
                    device.push_expert(&mut one, &parts)?;
                    experts.push(one);
                }
            }
            blocks = mixture.shared.map(|_| FfnBlock::SharedExpert).into_iter().collect();
        }
        for block in blocks {
            kept.push(device.weight(&checkpoint.gate_up(layer, block, shard)?)?);
            kept.push(device.weight(&checkpoint.down(layer, block, shard)?)?);
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
        "qwen2_moe",
        "qwen3_fp8_block128",
    ] {
        let checkpoint = Checkpoint::open(&goldens.join(name)).unwrap();
        for (rank, world_size) in [(0, 1), (0, 2), (1, 2)] {
            let shard = checkpoint.shard(rank, world_size).unwrap();
            let shard = shard.joined_by(Join::Sum, checkpoint.config());
            for format in [WeightFormat::Bf16, WeightFormat::Fp8] {
                let stacks = checkpoint.stacks(&shard).unwrap();
                let bytes = stacks.iter().map(|stack| match stack.role {
                    Role::Table => WeightFormat::table_bytes(&stack.parts),
                    Role::Expert => format.expert_bytes(&stack.parts),
                    Role::Weight => format.bytes(&stack.parts),
                });
                let held = held(&checkpoint, &shard, format).unwrap();
                assert_eq!(bytes.sum::<u64>(), held, "{name}, {rank} of {world_size}, {format:?}");
            }
        }
    }
}
