//! Mixtures of experts in both file formats, layers without experts among them, and what is
//! refused.

mod files;
#[path = "../../formats/tests/common/gguf.rs"]
mod gguf_file;
mod run;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use cpu::Precision;
use files::Files;
use gguf_file::GgufFile;
use model::Checkpoint;
use serde_json::json;

const BF16: u32 = 30;
const F32: u32 = 0;

fn size(files: &Files, key: &str) -> u32 {
    files.config[key].as_u64().unwrap() as u32
}

/// Adds numbers of about the size of the others.
fn add(files: &mut Files, name: &str, shape: [u64; 2]) {
    let value = |at: u64| half::bf16::from_f32((at * 7919 % 997) as f32 / 4985.0 - 0.1);
    let data = (0..shape[0] * shape[1]).flat_map(|at| value(at).to_le_bytes()).collect();
    files.tensors.insert(name.into(), ("BF16".into(), shape.into(), data));
}

/// The same model as converters write it: experts' matrices merged, vectors and routers in f32.
fn gguf(files: &Files, architecture: &str) -> GgufFile {
    let mut file = GgufFile::new();
    file.text("general.architecture", architecture);
    file.strings("tokenizer.ggml.tokens", &vec!["a"; size(files, "vocab_size") as usize]);
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
        if files.config.get(from).is_some() {
            file.u32(&format!("{architecture}.{key}"), size(files, from));
        }
    }
    file.f32(&format!("{architecture}.rope.freq_base"), 1e6);
    file.f32(&format!("{architecture}.attention.layer_norm_rms_epsilon"), 1e-6);
    let mut merged: BTreeMap<String, (Vec<u64>, Vec<u8>)> = BTreeMap::new();
    for (name, (_, shape, data)) in &files.tensors {
        let (name, is_expert) = gguf_name(name);
        let (merged_shape, all) = merged.entry(name).or_default();
        all.extend(data);
        if is_expert {
            // Experts come by name, below ten of them in order.
            let count = merged_shape.first().map_or(1, |count| count + 1);
            *merged_shape = [&[count], &shape[..]].concat();
        } else {
            merged_shape.clone_from(shape);
        }
    }
    for (name, (mut shape, data)) in merged {
        shape.reverse();
        if shape == [u64::from(size(files, "hidden_size")), 1] {
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

/// What converters call a tensor, and whether it is an expert's.
fn gguf_name(name: &str) -> (String, bool) {
    let name = name.strip_prefix("model.").unwrap_or(name);
    let (layer, rest) = match name.strip_prefix("layers.").and_then(|rest| rest.split_once('.')) {
        Some((layer, rest)) => (format!("blk.{layer}."), rest),
        None => (String::new(), name),
    };
    let expert = rest.strip_prefix("mlp.experts.").and_then(|rest| rest.split_once('.'));
    let rest = expert.map_or(rest.to_owned(), |(_, matrix)| format!("mlp.experts.{matrix}"));
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
    (rest.replacen(from, &format!("{layer}{to}"), 1), expert.is_some())
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

fn open(path: &Path) -> Checkpoint {
    Checkpoint::open(path).unwrap()
}

#[test]
fn both_file_formats_hold_the_same_model() {
    for (name, architecture) in [("qwen2_moe", "qwen2moe"), ("qwen3_moe", "qwen3moe")] {
        let golden = Files::of(name);
        let (_folder, path) = written(&gguf(&golden, architecture));
        let folder = golden.write();
        let (folder, file) = (open(folder.path()), open(&path));
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
    let mut folder = Files::of("qwen2_moe");
    folder.config["mlp_only_layers"] = json!([1]);
    folder.tensors.retain(|name, _| !name.starts_with("model.layers.1.mlp"));
    folder.refused("tensor model.layers.1.mlp.gate_proj.weight [192, 128] is missing");
    for (matrix, shape) in [("gate", [192, 128]), ("up", [192, 128]), ("down", [128, 192])] {
        add(&mut folder, &format!("model.layers.1.mlp.{matrix}_proj.weight"), shape);
    }
    let checkpoint = open(folder.write().path());
    let logits = |precision, ranks| run::logits(&checkpoint, &ids(), precision, ranks);
    for precision in [Precision::Exact, Precision::Fast] {
        let one = logits(precision, 1);
        assert!(one.iter().all(|logit| logit.is_normal()));
        assert_eq!(one, logits(precision, 2));
    }
}

#[test]
fn incomplete_mixtures_are_refused_by_name() {
    for name in [
        "model.layers.1.mlp.experts.6.up_proj.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.1.mlp.shared_expert_gate.weight",
        "model.layers.0.mlp.shared_expert.down_proj.weight",
    ] {
        let mut fewer = Files::of("qwen2_moe");
        fewer.tensors.remove(name).unwrap();
        fewer.refused(&format!("tensor {name} ["));
        fewer.refused("is missing");
    }
    let mut fewer = Files::of("qwen3_moe");
    fewer.config["num_experts"] = json!(7);
    fewer.refused("model.layers.0.mlp.gate.weight has shape [8, 128], expected is [7, 128]");
    let mut more = Files::of("qwen2_moe");
    add(&mut more, "model.layers.0.mlp.experts.8.up_proj.weight", [48, 128]);
    more.refused("experts.8.up_proj.weight has no place");
}

#[test]
fn gguf_files_that_contradict_themselves_are_refused() {
    let golden = Files::of("qwen3_moe");
    let refusal = |file: &GgufFile| {
        let (_folder, path) = written(file);
        Checkpoint::open(&path).err().expect("refused").to_string()
    };
    let dense = refusal(&gguf(&golden, "qwen3"));
    assert!(dense.contains("qwen3.expert_count = 8"), "{dense}");
    let mut fewer = gguf(&golden, "qwen3moe");
    fewer.u32("qwen3moe.expert_count", 7);
    let fewer = refusal(&fewer);
    assert!(fewer.contains("expert_count") || fewer.contains("ffn_gate_inp"), "{fewer}");
    let mut none = Files::of("qwen3_moe");
    none.tensors.retain(|name, _| !name.contains(".mlp."));
    let none = refusal(&gguf(&none, "qwen3moe"));
    assert!(none.contains("tensor blk.0.ffn_gate_exps.weight"), "{none}");
}
