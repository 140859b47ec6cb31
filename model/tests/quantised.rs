//! Checkpoints in GPTQ, AWQ and fp8: the slices of all ranks are the whole, and what contradicts
//! itself is refused by name. What their numbers mean, the reference logits prove elsewhere.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use collective::{Staged, Threads};
use kernels::{
    WeightPart,
    plain::{Plain, dequant::part_row},
};
use model::{Checkpoint, ModelError, Runner, RunnerOptions, Shard};
use serde_json::{Value, json};
use tempfile::TempDir;

const NAMES: [&str; 4] =
    ["qwen2_awq_int4", "qwen2_fp8_channel", "qwen2_gptq_int4", "qwen3_fp8_block128"];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/public").join(name)
}

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
    let reads: [Read; 2] = [Checkpoint::attn_out, Checkpoint::down];
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

/// A checkpoint in memory, to be damaged.
struct Files {
    config: Value,
    /// Dtype, shape and bytes by name.
    tensors: BTreeMap<String, (String, Vec<u64>, Vec<u8>)>,
}

impl Files {
    fn of(name: &str) -> Self {
        let config = fs::read(golden(name).join("config.json")).unwrap();
        let file = fs::read(golden(name).join("model.safetensors")).unwrap();
        let parsed = formats::safetensors::parse(&file).unwrap();
        let tensors = parsed.into_iter().map(|tensor| {
            let bytes = file[tensor.offset as usize..][..tensor.bytes as usize].to_vec();
            (tensor.name, (tensor.dtype.name.to_owned(), tensor.shape, bytes))
        });
        Self { config: serde_json::from_slice(&config).unwrap(), tensors: tensors.collect() }
    }

    fn bytes(&mut self, name: &str) -> &mut Vec<u8> {
        &mut self.tensors.get_mut(name).unwrap_or_else(|| panic!("no {name}")).2
    }

    fn write(&self) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for (name, (dtype, shape, bytes)) in &self.tensors {
            let offsets = [data.len(), data.len() + bytes.len()];
            let entry = json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets });
            header.insert(name.clone(), entry);
            data.extend_from_slice(bytes);
        }
        let header = serde_json::to_vec(&header).unwrap();
        let file = [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat();
        fs::write(folder.path().join("model.safetensors"), file).unwrap();
        fs::write(folder.path().join("config.json"), self.config.to_string()).unwrap();
        folder
    }

    /// What opening and loading says, and how many bytes of weights had been taken by then.
    fn outcome(&self) -> Result<(), (String, u64)> {
        const OPTIONS: RunnerOptions =
            RunnerOptions { blocks: 1, step_tokens_max: 1, sequences_max: 1, context_max: 16 };
        let folder = self.write();
        let mut taken = 0;
        let mut load = || -> Result<(), ModelError> {
            let checkpoint = Checkpoint::open(folder.path())?;
            let alone = Staged::new(Threads::group(1).remove(0));
            Runner::load(Plain, alone, &checkpoint, OPTIONS, &mut |done, _| taken = done)?;
            Ok(())
        };
        load().map_err(|error| (error.to_string(), taken))
    }

    /// Refused with this in the message, before any memory is taken.
    #[track_caller]
    fn refused(&self, named: &str) {
        let (error, taken) = self.outcome().expect_err("refused");
        assert!(error.contains(named), "{error}");
        assert_eq!(taken, 0, "bytes were loaded before: {error}");
    }
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
    files.bytes(&format!("{DOWN}.g_idx"))[4..8].copy_from_slice(&3i32.to_le_bytes());
    files.refused(&format!("{DOWN}.g_idx names group 3 of 3"));
    let mut files = gptq();
    files.bytes(&format!("{DOWN}.g_idx"))[4..8].copy_from_slice(&(-1i32).to_le_bytes());
    files.refused("names group -1 of 3");
    for scale in [0u16, 0x7e00, 0x7c00] {
        let mut files = gptq();
        files.bytes(&format!("{DOWN}.scales"))[8..10].copy_from_slice(&scale.to_le_bytes());
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
        rows(checkpoint.down(0, &checkpoint.shard(0, 1).unwrap()).unwrap())
    };
    let mut files = Files::of("qwen2_gptq_int4");
    let before = whole(&files);
    // Columns 0 and 200 change their groups, 0 and 1, and so their scales.
    let order = files.bytes(&format!("{DOWN}.g_idx"));
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
    files.bytes(&format!("{DOWN}.weight"))[7] = 0xff;
    // The weights themselves are looked at as they are read.
    let (error, taken) = files.outcome().expect_err("refused");
    let named = format!("tensor {DOWN}.weight has values that are no numbers");
    assert!(error.contains(&named) && taken > 0, "{error}");
    let mut files = Files::of("qwen3_fp8_block128");
    files.bytes(&format!("{DOWN}.weight_scale_inv"))[..2].copy_from_slice(&[0x80, 0x7f]);
    files.refused("weight_scale_inv has a scale of inf");
    let mut files = Files::of("qwen2_fp8_channel");
    files.outcome().unwrap();
    files.bytes(&format!("{DOWN}.weight_scale"))[..2].fill(0);
    files.refused("weight_scale has a scale of 0");
    // One scale for all, without dimensions.
    let mut files = Files::of("qwen2_fp8_channel");
    let one = ("F32".to_owned(), vec![], 0.5f32.to_le_bytes().to_vec());
    files.tensors.insert(format!("{DOWN}.weight_scale"), one.clone());
    files.tensors.insert(format!("{DOWN}.input_scale"), one);
    files.outcome().unwrap();
}
