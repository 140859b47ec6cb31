//! Reads the stored cases: tiny checkpoints in the layouts of real ones, and what the reference
//! implementations made of them.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

pub const NAMES: [&str; 16] = [
    "llama_smollm2",
    "qwen1_ntk_logn",
    "qwen1_plain_hd128",
    "qwen2_awq_int4",
    "qwen2_fp8_channel",
    "qwen2_gptq_int4",
    "qwen2_gqa2_hd128",
    "qwen2_gqa4_tied_sharded",
    "qwen2_mha_hd64",
    "qwen2_moe",
    "qwen2_swa_off",
    "qwen2_swa_on",
    "qwen2_yarn4",
    "qwen3_fp8_block128",
    "qwen3_gqa4_hd128_tied",
    "qwen3_moe",
];

/// Where they lie, from the repository's root.
const FOLDER: &str = "tests/goldens/public";

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

/// The checkpoint's folder, wherever in the repository this runs.
///
/// # Errors
/// Where this runs outside it.
pub fn folder(name: &str) -> Result<PathBuf, String> {
    let above = ["", "..", "../.."];
    let mut folders = above.iter().map(|up| Path::new(up).join(FOLDER).join(name));
    let found = folders.find(|folder| folder.is_dir());
    found.ok_or_else(|| format!("no {FOLDER}/{name}; run this in the repository's root"))
}

fn read(name: &str, file: &str) -> Result<Vec<u8>, String> {
    let path = folder(name)?.join(file);
    fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))
}

/// # Errors
/// Where the stored cases cannot be read.
pub fn prompts(name: &str) -> Result<Vec<Prompt>, String> {
    let file = read(name, "goldens.safetensors")?;
    let parsed = formats::safetensors::parse(&file).map_err(|error| error.to_string())?;
    let tensors: HashMap<String, &[u8]> = parsed
        .into_iter()
        .map(|t| (t.name, &file[t.offset as usize..][..t.bytes as usize]))
        .collect();
    let prompt = |index: usize| {
        let ids = tensors.get(&format!("p{index}.input_ids"))?;
        let ids = ids.as_chunks().0.iter().map(|&id| i64::from_le_bytes(id) as u32).collect();
        let logits = tensors.get(&format!("p{index}.logits"))?.as_chunks().0;
        Some(Prompt { ids, logits: logits.iter().map(|&x| f32::from_le_bytes(x)).collect() })
    };
    Ok((0..).map_while(prompt).collect())
}

/// # Errors
/// Where the stored cases cannot be read.
pub fn continuations(name: &str) -> Result<Vec<Continuation>, String> {
    let text = read(name, "goldens.json")?;
    let cases: serde_json::Value =
        serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    let list = |case: &serde_json::Value, key: &str| case[key].as_array().cloned();
    let ids = |case: &serde_json::Value, key: &str| -> Option<Vec<u32>> {
        list(case, key)?.iter().map(|id| Some(id.as_u64()? as u32)).collect()
    };
    let continuation = |case: &serde_json::Value| {
        Some(Continuation {
            prompt: ids(case, "prompt")?,
            tokens: ids(case, "greedy32")?,
            margins: list(case, "margins")?.iter().map(|m| m.as_f64()).collect::<Option<_>>()?,
        })
    };
    let all = list(&cases, "greedy").unwrap_or_default().iter().map(continuation).collect();
    Option::ok_or(all, format!("{name}: goldens.json is not as expected"))
}
