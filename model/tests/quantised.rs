//! Checkpoints in GPTQ, AWQ and fp8: the slices of all ranks are the whole, and what contradicts
//! itself is refused by name. What their numbers mean, the reference logits prove elsewhere.

mod files;

use files::{Files, golden};
use kernels::{Join, WeightPart, plain::dequant::part_row};
use model::{Checkpoint, FfnBlock, ModelError, Shard};
use serde_json::json;

const NAMES: [&str; 4] =
    ["qwen2_awq_int4", "qwen2_fp8_channel", "qwen2_gptq_int4", "qwen3_fp8_block128"];

fn rows(parts: Vec<WeightPart<'static>>) -> Vec<Vec<f32>> {
    let mut rows = Vec::new();
    for part in &parts {
        for n in 0..part.rows {
            let mut row = vec![0.0; part.cols];
            part_row(part, n, &mut row);
            rows.push(row);
        }
    }
    rows
}

type Read = fn(&Checkpoint, usize, &Shard) -> Result<Vec<WeightPart<'static>>, ModelError>;

#[test]
fn slices_of_all_ranks_are_the_whole() {
    let down: Read = |checkpoint, layer, shard| checkpoint.down(layer, FfnBlock::Dense, shard);
    let reads: [Read; 2] = [Checkpoint::attn_out, down];
    for name in NAMES {
        let checkpoint = Checkpoint::open(&golden(name)).unwrap();
        for read in reads {
            let of = |world_size: usize| -> Vec<Vec<f32>> {
                let shard = |rank| checkpoint.shard(rank, world_size).unwrap();
                let part = |rank| read(&checkpoint, 1, &shard(rank)).unwrap();
                (0..world_size).flat_map(|rank| rows(part(rank))).collect()
            };
            let whole = of(1);
            assert!(whole.iter().flatten().any(|value| *value != 0.0));
            assert_eq!(of(2), whole, "{name}");
            assert_eq!(of(3), whole, "{name}");
        }
    }
}

/// Where results are summed, ranks hold columns: side by side, they are the whole.
#[test]
fn columns_of_all_ranks_are_the_whole() {
    for name in NAMES.into_iter().chain(["qwen2_gqa2_hd128", "qwen1_plain_hd128"]) {
        let checkpoint = Checkpoint::open(&golden(name)).unwrap();
        let config = checkpoint.config();
        let down: Read = |checkpoint, layer, shard| checkpoint.down(layer, FfnBlock::Dense, shard);
        for read in [Checkpoint::attn_out, down] {
            let of = |world_size: usize| -> Vec<Vec<f32>> {
                let shard = |rank| {
                    let shard = checkpoint.shard(rank, world_size).unwrap();
                    shard.joined_by(Join::Sum, config)
                };
                let part = |rank| rows(read(&checkpoint, 1, &shard(rank)).unwrap());
                let parts: Vec<Vec<Vec<f32>>> = (0..world_size).map(part).collect();
                let row = |n: usize| parts.iter().flat_map(|part| part[n].clone()).collect();
                (0..config.hidden).map(row).collect()
            };
            let bytes = |world_size: usize| -> u64 {
                let shard = |rank| checkpoint.shard(rank, world_size).unwrap();
                let shards = (0..world_size).map(|rank| shard(rank).joined_by(Join::Sum, config));
                shards.map(|shard| checkpoint.weight_bytes(&shard).unwrap()).sum()
            };
            let whole = of(1);
            assert_eq!(of(2), whole, "{name}");
            assert!(bytes(2) >= bytes(1), "{name}");
            if checkpoint.shard(0, 3).is_ok() {
                assert_eq!(of(3), whole, "{name}");
            }
        }
    }
}

/// The bytes of a tensor.
fn bytes<'a>(files: &'a mut Files, name: &str) -> &'a mut Vec<u8> {
    &mut files.tensors.get_mut(name).unwrap_or_else(|| panic!("no {name}")).2
}

const DOWN: &str = "model.layers.0.mlp.down_proj";

#[test]
fn integers_that_contradict_themselves_are_refused_by_name() {
    let gptq = || Files::of("qwen2_gptq_int4");
    gptq().outcome().unwrap();

    let mut files = gptq();
    files.config["quantization_config"]["quant_method"] = json!("awq");
    files.refused("qweight has shape");
    let mut files = gptq();
    files.config.as_object_mut().unwrap().remove("quantization_config");
    files.refused("quantization_config does not say gptq or awq");
    let mut files = gptq();
    files.config["quantization_config"]["group_size"] = json!(64);
    files.refused("qzeros has shape");
    let mut files = gptq();
    files.tensors.remove(&format!("{DOWN}.scales"));
    files.refused(&format!("tensor {DOWN}.scales [3, 256] is missing"));
    let mut files = gptq();
    files.tensors.get_mut(&format!("{DOWN}.qzeros")).unwrap().0 = "F32".into();
    files.refused("qzeros is stored as F32, not I32");
    let mut files = gptq();
    bytes(&mut files, &format!("{DOWN}.g_idx"))[4..8].copy_from_slice(&3i32.to_le_bytes());
    files.refused(&format!("{DOWN}.g_idx names group 3 of 3"));
    let mut files = gptq();
    bytes(&mut files, &format!("{DOWN}.g_idx"))[4..8].copy_from_slice(&(-1i32).to_le_bytes());
    files.refused("names group -1 of 3");
    for scale in [0u16, 0x7e00, 0x7c00] {
        let mut files = gptq();
        bytes(&mut files, &format!("{DOWN}.scales"))[8..10].copy_from_slice(&scale.to_le_bytes());
        files.refused(&format!("tensor {DOWN}.scales has a scale that is zero"));
    }
}

#[test]
fn scales_may_be_stored_in_other_formats_that_f16_holds() {
    let with = |dtype: &str, number: f32| {
        let mut files = Files::of("qwen2_gptq_int4");
        let scales = files.tensors.get_mut(&format!("{DOWN}.scales")).unwrap();
        let bytes = number.to_le_bytes();
        // bf16 is the upper half of f32.
        let bytes = if dtype == "F32" { &bytes[..] } else { &bytes[2..] };
        *scales = (dtype.to_owned(), vec![3, 256], bytes.repeat(3 * 256));
        files
    };
    for dtype in ["F32", "BF16"] {
        with(dtype, 0.375).outcome().unwrap();
        for number in [-0.0, 1e9, 1e-9, f32::NAN] {
            with(dtype, number).refused("or no f16");
        }
    }
    with("F32", 0.1).refused("or no f16");
}

#[test]
fn a_bias_of_zeros_beside_integers_is_no_bias() {
    let mut files = Files::of("qwen2_gptq_int4");
    let bias = |byte| ("F16".to_owned(), vec![256], vec![byte; 512]);
    files.tensors.insert(format!("{DOWN}.bias"), bias(0));
    files.outcome().unwrap();
    files.tensors.insert(format!("{DOWN}.bias"), bias(1));
    files.refused(&format!("tensor {DOWN}.bias has no place"));
}

#[test]
fn columns_may_be_of_any_group() {
    let whole = |files: &Files| {
        let folder = files.write();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        rows(checkpoint.down(0, FfnBlock::Dense, &checkpoint.shard(0, 1).unwrap()).unwrap())
    };
    let mut files = Files::of("qwen2_gptq_int4");
    let before = whole(&files);
    // Columns 0 and 200 change their groups, 0 and 1, and so their scales.
    let order = bytes(&mut files, &format!("{DOWN}.g_idx"));
    order[..4].copy_from_slice(&1i32.to_le_bytes());
    order[800..804].copy_from_slice(&0i32.to_le_bytes());
    let after = whole(&files);
    let differ: Vec<usize> =
        (0..384).filter(|k| before.iter().zip(&after).any(|(a, b)| a[*k] != b[*k])).collect();
    assert_eq!(differ, [0, 200]);
}

#[test]
fn fp8_that_contradicts_itself_is_refused_by_name() {
    let mut files = Files::of("qwen3_fp8_block128");
    files.outcome().unwrap();
    files.config["quantization_config"]["weight_block_size"] = json!([64, 64]);
    files.refused("weight_scale_inv has shape");
    let mut files = Files::of("qwen3_fp8_block128");
    files.tensors.remove(&format!("{DOWN}.weight_scale_inv"));
    files.refused("down_proj.weight is stored as F8_E4M3");
    let mut files = Files::of("qwen3_fp8_block128");
    bytes(&mut files, &format!("{DOWN}.weight"))[7] = 0xff;
    // The weights themselves are looked at as they are read.
    let (error, taken) = files.outcome().expect_err("refused");
    let named = format!("tensor {DOWN}.weight has values that are no numbers");
    assert!(error.contains(&named) && taken > 0, "{error}");
    let mut files = Files::of("qwen3_fp8_block128");
    bytes(&mut files, &format!("{DOWN}.weight_scale_inv"))[..2].copy_from_slice(&[0x80, 0x7f]);
    files.refused("weight_scale_inv has a scale of inf");
    let mut files = Files::of("qwen2_fp8_channel");
    files.outcome().unwrap();
    bytes(&mut files, &format!("{DOWN}.weight_scale"))[..2].fill(0);
    files.refused("weight_scale has a scale of 0");
    // One scale for all, without dimensions.
    let mut files = Files::of("qwen2_fp8_channel");
    let one = ("F32".to_owned(), vec![], 0.5f32.to_le_bytes().to_vec());
    files.tensors.insert(format!("{DOWN}.weight_scale"), one.clone());
    files.tensors.insert(format!("{DOWN}.input_scale"), one);
    files.outcome().unwrap();
}
