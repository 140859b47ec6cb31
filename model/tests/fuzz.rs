//! Damages configurations and checkpoints in every way a seeded generator thinks of. Opening and
//! reading them may refuse, but neither panic nor take memory that the files do not account for.

#[path = "../../formats/tests/common/mod.rs"]
mod common;
#[path = "../../formats/tests/common/damage.rs"]
mod damage;

use std::{
    fs,
    path::{Path, PathBuf},
};

use common::{GgufFile, safetensors};
use damage::{Random, mutate};
use model::{Checkpoint, DecoderConfig, FfnBlock, ModelError};
use peak_alloc::PeakAlloc;
use serde_json::{Value, json};
use tempfile::TempDir;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

const ROUNDS: usize = 600;
/// What a model is expected to have is listed by the layer, of which there are at most 4096.
const BYTES_FIXED: usize = 16 << 20;
/// Tables of contents against their bytes in the file, and rows that are unpacked against those
/// that are packed.
const BYTES_PER_BYTE: usize = 24;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/public").join(name)
}

/// Values that are nobody's setting.
fn odd(random: &mut Random) -> Value {
    let values = [
        json!(null),
        json!(true),
        json!(0),
        json!(-1),
        json!(1),
        json!(3),
        json!(2.5),
        json!(1e300),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(1u64 << 32),
        json!(4096),
        json!(""),
        json!("gptq"),
        json!("x".repeat(5000)),
        json!([]),
        json!([0, 0]),
        json!([128, 128]),
        json!(vec![7; 5000]),
        json!({}),
        json!({ "a": { "weights": { "num_bits": 8 } } }),
    ];
    values[random.below(values.len())].clone()
}

/// One setting, at any depth, becomes something else or vanishes.
fn damage_one(random: &mut Random, config: &mut Value) {
    let Value::Object(fields) = config else { return };
    let Some(key) = fields.keys().nth(random.below(fields.len())).cloned() else { return };
    match random.below(8) {
        0 => drop(fields.remove(&key)),
        1..7 if fields[&key].is_object() => damage_one(random, &mut fields[&key]),
        _ => drop(fields.insert(key, odd(random))),
    }
}

/// One to four settings are damaged.
fn damaged_settings(random: &mut Random, seed: &Value) -> Value {
    let mut config = seed.clone();
    for _ in 0..=random.below(4) {
        damage_one(random, &mut config);
    }
    config
}

/// How often something was taken, and that no attempt took too much.
#[derive(Default)]
struct Outcomes {
    accepted: usize,
}

impl Outcomes {
    fn of<T>(&mut self, bytes: usize, run: impl FnOnce() -> Result<T, ModelError>) {
        let before = ALLOCATOR.current_usage();
        ALLOCATOR.reset_peak_usage();
        let result = run();
        let used = ALLOCATOR.peak_usage().saturating_sub(before);
        assert!(used <= BYTES_FIXED + BYTES_PER_BYTE * bytes, "{used} bytes for {bytes}");
        match result {
            Ok(_) => self.accepted += 1,
            Err(error) => {
                let error = error.to_string();
                assert!(error.len() < 2000, "{} bytes of {:.200}", error.len(), error);
            }
        }
    }
}

/// Opens a model and reads a layer of it.
fn read(path: &Path) -> Result<(), ModelError> {
    let checkpoint = Checkpoint::open(path)?;
    let shard = checkpoint.shard(0, 1)?;
    checkpoint.weight_bytes(&shard)?;
    checkpoint.qkv(0, &shard)?;
    checkpoint.attn_out(0, &shard)?;
    let experts = checkpoint.config().experts.as_ref();
    let block = match experts.is_some_and(|experts| experts.sparse[0]) {
        true => FfnBlock::Expert(0),
        false => FfnBlock::Dense,
    };
    checkpoint.router(0)?;
    checkpoint.gate_up(0, block, &shard)?;
    checkpoint.down(0, block, &shard)?;
    Ok(())
}

/// A small checkpoint whose files are damaged one at a time.
struct Seed {
    folder: TempDir,
    config: Value,
    /// Bytes of the configuration and of the header of the tensors.
    text: Vec<u8>,
    header: Vec<u8>,
    data: Vec<u8>,
}

impl Seed {
    fn new(name: &str) -> Self {
        let text = fs::read(golden(name).join("config.json")).unwrap();
        let file = fs::read(golden(name).join("model.safetensors")).unwrap();
        let header_len = u64::from_le_bytes(*file.first_chunk().unwrap()) as usize;
        let (header, data) = file[8..].split_at(header_len);
        let (header, data) = (header.to_vec(), data.to_vec());
        let config = serde_json::from_slice(&text).unwrap();
        let seed = Self { folder: tempfile::tempdir().unwrap(), config, text, header, data };
        seed.write_config(&seed.text);
        seed.write_tensors(&seed.header);
        seed
    }

    fn write_config(&self, text: &[u8]) {
        fs::write(self.folder.path().join("config.json"), text).unwrap();
    }

    fn write_tensors(&self, header: &[u8]) {
        let file = safetensors(header, &self.data);
        fs::write(self.folder.path().join("model.safetensors"), file).unwrap();
    }

    fn bytes(&self) -> usize {
        self.text.len() + self.header.len() + self.data.len()
    }
}

#[test]
fn damaged_checkpoints_are_refused_without_panic_or_waste() {
    let names = [
        "qwen2_gptq_int4",
        "qwen2_awq_int4",
        "qwen2_fp8_channel",
        "qwen3_fp8_block128",
        "qwen2_moe",
        "qwen3_moe",
    ];
    let seeds = names.map(Seed::new);
    let (mut random, mut outcomes) = (Random(0x5EED), Outcomes::default());
    for seed in &seeds {
        outcomes.of(seed.bytes(), || read(seed.folder.path()));
    }
    assert_eq!(outcomes.accepted, seeds.len(), "the seeds themselves are sound");
    for round in 0..ROUNDS {
        let seed = &seeds[round % seeds.len()];
        // Settings of another method too.
        let other = &seeds[random.below(seeds.len())];
        let mut config = damaged_settings(&mut random, &seed.config);
        if random.below(8) == 0 {
            config["quantization_config"] = other.config["quantization_config"].clone();
        }
        let text = match random.below(4) {
            0 => mutate(&mut random, &seed.text, &other.text),
            _ => serde_json::to_vec(&config).unwrap(),
        };
        seed.write_config(&text);
        outcomes.of(seed.bytes(), || read(seed.folder.path()));
        seed.write_config(&seed.text);
    }
    let configs = outcomes.accepted;
    for round in 0..ROUNDS / 3 {
        let seed = &seeds[round % seeds.len()];
        let other = &seeds[random.below(seeds.len())];
        seed.write_tensors(&mutate(&mut random, &seed.header, &other.header));
        outcomes.of(seed.bytes(), || read(seed.folder.path()));
        seed.write_tensors(&seed.header);
    }
    assert!(configs > ROUNDS / 20, "only {configs} accepted: no damage gets past the door");
}

/// A model with experts, as its configuration describes it.
fn with_experts() -> Value {
    json!({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 384,
        "max_position_embeddings": 4096, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 32, "norm_topk_prob": true,
        "decoder_sparse_step": 1, "mlp_only_layers": [0], "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 64, "tie_word_embeddings": false
    })
}

#[test]
fn damaged_settings_are_refused_without_panic_or_waste() {
    let (mut random, mut outcomes) = (Random(0xC0DE), Outcomes::default());
    let files = ["qwen1_ntk_logn", "qwen2_yarn4", "qwen2_swa_on", "llama_smollm2"];
    let mut seeds: Vec<Value> = files
        .iter()
        .map(|name| fs::read(golden(name).join("config.json")).unwrap())
        .map(|text| serde_json::from_slice(&text).unwrap())
        .collect();
    seeds.push(with_experts());
    for round in 0..8 * ROUNDS {
        let text = damaged_settings(&mut random, &seeds[round % seeds.len()]).to_string();
        outcomes.of(text.len(), || DecoderConfig::from_json(text.as_bytes()));
    }
    let accepted = outcomes.accepted;
    assert!(accepted > ROUNDS, "only {accepted} accepted: no damage gets past the door");
}

/// One layer of 4 query heads over 2 KV heads of 16, hidden size 64, 10 tokens; keys of experts.
fn gguf(architecture: &str) -> Vec<u8> {
    let mut file = GgufFile::new();
    file.text("general.architecture", architecture);
    file.strings("tokenizer.ggml.tokens", &["a"; 10]);
    for (key, value) in [
        ("block_count", 1),
        ("embedding_length", 64),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("context_length", 128),
        ("feed_forward_length", 96),
        ("expert_count", 4),
        ("expert_used_count", 2),
        ("expert_feed_forward_length", 32),
        ("expert_shared_feed_forward_length", 64),
    ] {
        if architecture.ends_with("moe") || !key.starts_with("expert") {
            file.u32(&format!("{architecture}.{key}"), value);
        }
    }
    file.f32(&format!("{architecture}.attention.layer_norm_rms_epsilon"), 1e-5);
    let shapes: &[(&str, &[u64])] = &[
        ("token_embd", &[64, 10]),
        ("output_norm", &[64]),
        ("blk.0.attn_norm", &[64]),
        ("blk.0.ffn_norm", &[64]),
        ("blk.0.attn_q", &[64, 64]),
        ("blk.0.attn_k", &[64, 32]),
        ("blk.0.attn_v", &[64, 32]),
        ("blk.0.attn_output", &[64, 64]),
        ("blk.0.ffn_gate", &[64, 96]),
        ("blk.0.ffn_up", &[64, 96]),
        ("blk.0.ffn_down", &[96, 64]),
        ("blk.0.ffn_gate_inp", &[64, 4]),
        ("blk.0.ffn_gate_exps", &[64, 32, 4]),
        ("blk.0.ffn_up_exps", &[64, 32, 4]),
        ("blk.0.ffn_down_exps", &[32, 64, 4]),
    ];
    let dense = |name: &str| ["ffn_gate", "ffn_up", "ffn_down"].iter().any(|f| name.ends_with(f));
    let experts = |name: &str| name.ends_with("_exps") || name.ends_with("_inp");
    let moe = architecture.ends_with("moe");
    for (name, dims) in shapes.iter().filter(|(name, _)| match moe {
        true => !dense(name),
        false => !experts(name),
    }) {
        // f16, whole matrices of small numbers.
        let data = [0, 0x20].repeat(dims.iter().product::<u64>() as usize);
        file.tensor(&format!("{name}.weight"), dims, 1, &data);
    }
    file.bytes()
}

#[test]
fn damaged_gguf_files_are_refused_without_panic_or_waste() {
    let (mut random, mut outcomes) = (Random(0xBAD), Outcomes::default());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let seeds = ["qwen2", "qwen2moe", "qwen3moe"].map(gguf);
    fs::write(&path, &seeds[0]).unwrap();
    outcomes.of(seeds[0].len(), || read(&path));
    assert_eq!(outcomes.accepted, 1, "the seed itself is sound");
    for round in 0..ROUNDS {
        let seed = &seeds[round % seeds.len()];
        // Metadata and names come first: the rest are numbers, and any will do.
        let (head, numbers) = seed.split_at(seed.len().min(2048));
        let head = mutate(&mut random, head, &seeds[1][..1024]);
        let file = [&head[..], numbers].concat();
        fs::write(&path, &file).unwrap();
        outcomes.of(file.len(), || read(&path));
    }
}
