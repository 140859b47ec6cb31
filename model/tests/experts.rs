//! Mixtures of experts in both file formats, layers without experts among them, and what is
//! refused.

#[path = "../../formats/tests/common/mod.rs"]
mod common;
mod run;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use common::{GgufFile, safetensors};
use cpu::Precision;
use model::{Checkpoint, ModelError};
use serde_json::{Value, json};

const BF16: u32 = 30;
const F32: u32 = 0;

/// A checkpoint in memory, every tensor in bf16.
struct Folder {
    config: Value,
    tensors: BTreeMap<String, (Vec<u64>, Vec<u8>)>,
}

impl Folder {
    fn golden(name: &str) -> Self {
        let folder = Path::new("../tests/goldens/public").join(name);
        let config = fs::read(folder.join("config.json")).unwrap();
        let file = fs::read(folder.join("model.safetensors")).unwrap();
        let tensors = formats::safetensors::parse(&file).unwrap().into_iter().map(|tensor| {
            assert_eq!(tensor.dtype.name, "BF16");
            let bytes = &file[tensor.offset as usize..][..tensor.bytes as usize];
            (tensor.name, (tensor.shape, bytes.to_vec()))
        });
        Self { config: serde_json::from_slice(&config).unwrap(), tensors: tensors.collect() }
    }

    fn size(&self, key: &str) -> u32 {
        self.config[key].as_u64().unwrap() as u32
    }

    /// Numbers of about the size of the others.
    fn add(&mut self, name: &str, shape: [u64; 2]) {
        let value = |at: u64| half::bf16::from_f32((at * 7919 % 997) as f32 / 4985.0 - 0.1);
        let data = (0..shape[0] * shape[1]).flat_map(|at| value(at).to_le_bytes()).collect();
        self.tensors.insert(name.into(), (shape.into(), data));
    }

    fn open(&self) -> Result<Checkpoint, ModelError> {
        let folder = tempfile::tempdir().unwrap();
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for (name, (shape, bytes)) in &self.tensors {
            let start = data.len();
            data.extend(bytes);
            let offsets = [start, data.len()];
            let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": offsets});
            header.insert(name.clone(), entry);
        }
        let header = Value::Object(header).to_string();
        fs::write(folder.path().join("model.safetensors"), safetensors(&header, &data)).unwrap();
        fs::write(folder.path().join("config.json"), self.config.to_string()).unwrap();
        Checkpoint::open(folder.path())
    }

    fn refusal(&self) -> String {
        self.open().err().expect("refused").to_string()
    }

    /// The same model as converters write it: experts' matrices merged, vectors and routers in f32.
    fn gguf(&self, architecture: &str) -> GgufFile {
        let mut file = GgufFile::new();
        file.text("general.architecture", architecture);
        file.strings("tokenizer.ggml.tokens", &vec!["a"; self.size("vocab_size") as usize]);
        for (key, from) in [
            ("block_count", "num_hidden_layers"),
            ("embedding_length", "hidden_size"),
            ("attention.head_count", "num_attention_heads"),
            ("attention.head_count_kv", "num_key_value_heads"),
            ("attention.key_length", "head_dim"),
            ("context_length", "max_position_embeddings"),
            ("feed_forward_length", "intermediate_size"),
            ("expert_count", "num_experts"),
            ("expert_used_count", "num_experts_per_tok"),
        ] {
            if self.config.get(from).is_some() {
                file.u32(&format!("{architecture}.{key}"), self.size(from));
            }
        }
        file.f32(&format!("{architecture}.rope.freq_base"), 1e6);
        file.f32(&format!("{architecture}.attention.layer_norm_rms_epsilon"), 1e-6);
        let mut merged: BTreeMap<String, (Vec<u64>, Vec<u8>)> = BTreeMap::new();
        for (name, (shape, data)) in &self.tensors {
            let (name, expert) = gguf_name(name);
            let (merged_shape, all) = merged.entry(name).or_default();
            all.extend(data);
            if expert.is_some() {
                // Experts come by name, below ten of them in order.
                let count = merged_shape.first().map_or(1, |count| count + 1);
                *merged_shape = [&[count], &shape[..]].concat();
            } else {
                merged_shape.clone_from(shape);
            }
        }
        for (name, (mut shape, data)) in merged {
            shape.reverse();
            if shape == [u64::from(self.size("hidden_size")), 1] {
                shape.pop();
            }
            if shape.len() == 1 || name.contains("ffn_gate_inp") {
                let wide = data.as_chunks().0.iter();
                let wide = wide.flat_map(|b| half::bf16::from_le_bytes(*b).to_f32().to_le_bytes());
                file.tensor(&name, &shape, F32, &wide.collect::<Vec<u8>>());
            } else {
                file.tensor(&name, &shape, BF16, &data);
            }
        }
        file
    }
}

/// What converters call a tensor, and whose it is.
fn gguf_name(name: &str) -> (String, Option<usize>) {
    let name = name.strip_prefix("model.").unwrap_or(name);
    let (layer, rest) = match name.strip_prefix("layers.").and_then(|rest| rest.split_once('.')) {
        Some((layer, rest)) => (format!("blk.{layer}."), rest),
        None => (String::new(), name),
    };
    let (rest, expert) = match rest.strip_prefix("mlp.experts.") {
        Some(rest) => {
            let (expert, matrix) = rest.split_once('.').unwrap();
            (format!("mlp.experts.{matrix}"), Some(expert.parse().unwrap()))
        }
        None => (rest.to_owned(), None),
    };
    let named = [
        ("embed_tokens.", "token_embd."),
        ("lm_head.", "output."),
        ("norm.", "output_norm."),
        ("input_layernorm.", "attn_norm."),
        ("post_attention_layernorm.", "ffn_norm."),
        ("self_attn.q_norm.", "attn_q_norm."),
        ("self_attn.k_norm.", "attn_k_norm."),
        ("self_attn.q_proj.", "attn_q."),
        ("self_attn.k_proj.", "attn_k."),
        ("self_attn.v_proj.", "attn_v."),
        ("self_attn.o_proj.", "attn_output."),
        ("mlp.gate.", "ffn_gate_inp."),
        ("mlp.experts.gate_proj.", "ffn_gate_exps."),
        ("mlp.experts.up_proj.", "ffn_up_exps."),
        ("mlp.experts.down_proj.", "ffn_down_exps."),
        ("mlp.shared_expert_gate.", "ffn_gate_inp_shexp."),
        ("mlp.shared_expert.gate_proj.", "ffn_gate_shexp."),
        ("mlp.shared_expert.up_proj.", "ffn_up_shexp."),
        ("mlp.shared_expert.down_proj.", "ffn_down_shexp."),
    ];
    let (from, to) = named.iter().find(|(from, _)| rest.starts_with(from)).expect(&rest);
    (rest.replacen(from, &format!("{layer}{to}"), 1), expert)
}

fn written(file: &GgufFile) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("experts.gguf");
    fs::write(&path, file.bytes()).unwrap();
    (folder, path)
}

fn ids() -> Vec<u32> {
    (0..25).map(|at| at * 37 % 380).collect()
}

#[test]
fn both_file_formats_hold_the_same_model() {
    for (name, architecture) in [("qwen2_moe", "qwen2moe"), ("qwen3_moe", "qwen3moe")] {
        let golden = Folder::golden(name);
        let (_folder, path) = written(&golden.gguf(architecture));
        let (folder, file) = (golden.open().unwrap(), Checkpoint::open(&path).unwrap());
        let of_file = file.config().experts.as_ref();
        assert_eq!(folder.config().experts.as_ref(), of_file, "{name}");
        let logits = |checkpoint, ranks| run::logits(checkpoint, &ids(), Precision::Exact, ranks);
        let one = logits(&folder, 1);
        assert!(one.iter().all(|logit| logit.is_normal()), "{name}");
        for ranks in 1..=3 {
            if file.shard(0, ranks).is_ok() {
                assert_eq!(one, logits(&file, ranks), "{name} on {ranks} ranks");
            }
        }
    }
}

#[test]
fn layers_without_experts_run_beside_layers_with_them() {
    let mut folder = Folder::golden("qwen2_moe");
    folder.config["mlp_only_layers"] = json!([1]);
    folder.tensors.retain(|name, _| !name.starts_with("model.layers.1.mlp"));
    assert!(folder.refusal().contains("tensor model.layers.1.mlp.gate_proj.weight [192, 128]"));
    for (matrix, shape) in [("gate", [192, 128]), ("up", [192, 128]), ("down", [128, 192])] {
        folder.add(&format!("model.layers.1.mlp.{matrix}_proj.weight"), shape);
    }
    let checkpoint = folder.open().unwrap();
    let logits = |precision, ranks| run::logits(&checkpoint, &ids(), precision, ranks);
    for precision in [Precision::Exact, Precision::Fast] {
        let one = logits(precision, 1);
        assert!(one.iter().all(|logit| logit.is_normal()));
        assert_eq!(one, logits(precision, 2));
    }
}

#[test]
fn incomplete_mixtures_are_refused_by_name() {
    let without = |name: &str| {
        let mut folder = Folder::golden("qwen2_moe");
        folder.tensors.remove(name).unwrap();
        folder.refusal()
    };
    for name in [
        "model.layers.1.mlp.experts.6.up_proj.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.1.mlp.shared_expert_gate.weight",
        "model.layers.0.mlp.shared_expert.down_proj.weight",
    ] {
        let refusal = without(name);
        assert!(refusal.contains(&format!("tensor {name} [")), "{refusal}");
        assert!(refusal.contains("is missing"), "{refusal}");
    }
    let mut fewer = Folder::golden("qwen3_moe");
    fewer.config["num_experts"] = json!(7);
    let refusal = fewer.refusal();
    assert!(refusal.contains("model.layers.0.mlp.gate.weight has shape [8, 128]"), "{refusal}");
    let mut more = Folder::golden("qwen2_moe");
    more.add("model.layers.0.mlp.experts.8.up_proj.weight", [48, 128]);
    assert!(more.refusal().contains("experts.8.up_proj.weight has no place"), "{}", more.refusal());
}

#[test]
fn gguf_files_that_contradict_themselves_are_refused() {
    let golden = Folder::golden("qwen3_moe");
    let refusal = |file: &GgufFile| {
        let (_folder, path) = written(file);
        Checkpoint::open(&path).err().expect("refused").to_string()
    };
    let dense = refusal(&golden.gguf("qwen3"));
    assert!(dense.contains("qwen3.expert_count = 8"), "{dense}");
    let mut fewer = golden.gguf("qwen3moe");
    fewer.u32("qwen3moe.expert_count", 7);
    let fewer = refusal(&fewer);
    assert!(fewer.contains("expert_count") || fewer.contains("ffn_gate_inp"), "{fewer}");
    let mut none = Folder::golden("qwen3_moe");
    none.tensors.retain(|name, _| !name.contains(".mlp."));
    let none = refusal(&none.gguf("qwen3moe"));
    assert!(none.contains("tensor blk.0.ffn_gate_exps.weight"), "{none}");
}
