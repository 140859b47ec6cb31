//! Reads the stored cases.

use crate::common::golden_folder;
use std::collections::HashMap;

pub const NAMES: [&str; 10] = [
    "llama_smollm2",
    "qwen1_ntk_logn",
    "qwen1_plain_hd128",
    "qwen2_gqa2_hd128",
    "qwen2_gqa4_tied_sharded",
    "qwen2_mha_hd64",
    "qwen2_swa_off",
    "qwen2_swa_on",
    "qwen2_yarn4",
    "qwen3_gqa4_hd128_tied",
];

/// A prompt and the logits at each of its positions, row-major.
pub struct Prompt {
    pub ids: Vec<u32>,
    pub logits: Vec<f32>,
}

/// A greedy continuation, and at each token the distance to the second best.
pub struct Continuation {
    pub prompt: Vec<u32>,
    pub tokens: Vec<u32>,
    pub margins: Vec<f64>,
}

pub fn prompts(name: &str) -> Vec<Prompt> {
    let file = std::fs::read(golden_folder(name).join("goldens.safetensors")).unwrap();
    let tensors: HashMap<String, &[u8]> = formats::safetensors::parse(&file)
        .unwrap()
        .into_iter()
        .map(|t| (t.name, &file[t.offset as usize..][..t.bytes as usize]))
        .collect();
    let prompt = |index: usize| {
        let ids = tensors.get(&format!("p{index}.input_ids"))?;
        let ids = ids.as_chunks().0.iter().map(|&id| i64::from_le_bytes(id) as u32).collect();
        let logits = tensors[&format!("p{index}.logits")].as_chunks().0;
        Some(Prompt { ids, logits: logits.iter().map(|&x| f32::from_le_bytes(x)).collect() })
    };
    (0..).map_while(prompt).collect()
}

pub fn continuations(name: &str) -> Vec<Continuation> {
    let text = std::fs::read(golden_folder(name).join("goldens.json")).unwrap();
    let cases: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let ids = |case: &serde_json::Value, key: &str| -> Vec<u32> {
        case[key].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    };
    let continuation = |case: &serde_json::Value| Continuation {
        prompt: ids(case, "prompt"),
        tokens: ids(case, "greedy32"),
        margins: case["margins"].as_array().unwrap().iter().map(|m| m.as_f64().unwrap()).collect(),
    };
    cases["greedy"].as_array().unwrap().iter().map(continuation).collect()
}
