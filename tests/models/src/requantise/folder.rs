//! A Hugging Face folder: settings, tokenizer, weights.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::Path,
};

use formats::gguf::{self, Metadata};
use model::RopeScaling;
use serde_json::{Map, Value, json};

use crate::{
    Format, Result,
    quantise::Encoded,
    source::{Source, Tensor},
};

/// Token types of GGUF files.
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
const UNUSED: u64 = 5;

pub fn write(
    out: &Path,
    source: &Source,
    format: Format,
    tensors: &[(Tensor, Vec<Encoded>)],
) -> Result<()> {
    fs::create_dir_all(out)?;
    let mut config = match source.text_files.get("config.json") {
        Some(text) => serde_json::from_slice(text)?,
        None => config(source)?,
    };
    config.remove("quantization_config");
    config.remove("compression_config");
    config.insert("vocab_size".into(), source.vocab.into());
    config.insert(
        "torch_dtype".into(),
        if format == Format::F32 { "float32" } else { "float16" }.into(),
    );
    if let Some(quantisation) = quantisation(format) {
        config.insert("quantization_config".into(), quantisation);
    }
    fs::write(out.join("config.json"), serde_json::to_vec_pretty(&config)?)?;
    match source.text_files.get("metadata.gguf") {
        Some(metadata) => tokenizer(out, &gguf::parse_metadata(metadata)?)?,
        None => {
            for (name, text) in source.text_files.iter().filter(|(name, _)| *name != "config.json")
            {
                let to = out.join(name);
                fs::create_dir_all(to.parent().unwrap_or(out))?;
                fs::write(to, text)?;
            }
        }
    }
    weights(&out.join("model.safetensors"), tensors)
}

/// Settings that a GGUF file has in other words.
fn config(source: &Source) -> Result<Map<String, Value>> {
    let config = source.config();
    if config.rope.scaling != RopeScaling::None {
        return Err(format!("{:?} has no words in config.json here", config.rope.scaling).into());
    }
    let value = json!({
        "architectures": [config.family.architecture],
        "model_type": config.family.gguf_architecture,
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.q_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_max,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.base,
        "tie_word_embeddings": config.tied,
        "eos_token_id": config.eos_ids,
    });
    Ok(serde_json::from_value(value)?)
}

fn quantisation(format: Format) -> Option<Value> {
    Some(match format {
        Format::GptqInt4 => json!({
            "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": false, "desc_act": false,
        }),
        Format::AwqInt4 => json!({
            "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 128,
            "zero_point": true, "modules_to_not_convert": null,
        }),
        Format::Fp8Block128 => json!({
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        }),
        Format::Fp8Row => json!({
            "quant_method": "compressed-tensors", "format": "float-quantized",
            "quantization_status": "frozen", "ignore": ["lm_head"],
            "config_groups": {"group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel",
                            "symmetric": true, "dynamic": false},
                "input_activations": {"num_bits": 8, "type": "float", "strategy": "token",
                                      "symmetric": true, "dynamic": true},
            }},
        }),
        _ => return None,
    })
}

/// The vocabulary in the pair of files that Qwen2 came with, and the answer's ends.
fn tokenizer(out: &Path, metadata: &Metadata) -> Result<()> {
    if metadata.string("tokenizer.ggml.pre")? != Some("qwen2") {
        return Err(
            "a tokenizer other than Qwen2's needs a tokenizer.json, not written here".into()
        );
    }
    let strings = |key: &str| -> Result<&[String]> {
        Ok(metadata.strings(key)?.ok_or_else(|| format!("the file has no {key}"))?)
    };
    let tokens = strings("tokenizer.ggml.tokens")?;
    let kinds = metadata.array("tokenizer.ggml.token_type")?.and_then(|kinds| kinds.to_unsigned());
    let kinds = kinds.filter(|kinds| kinds.len() == tokens.len());
    let kinds = kinds.ok_or("the file does not say of what kind each token is")?;
    let (mut vocab, mut added) = (Map::new(), Map::new());
    for ((id, token), kind) in tokens.iter().enumerate().zip(kinds) {
        match kind {
            UNUSED => {}
            CONTROL | USER_DEFINED => {
                let token = json!({"content": token, "special": kind == CONTROL});
                added.insert(id.to_string(), token);
            }
            _ => {
                vocab.insert(token.clone(), id.into());
            }
        }
    }
    let merges = strings("tokenizer.ggml.merges")?.join("\n");
    let mut config = json!({
        "tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "add_bos_token": false,
    });
    if let Some(template) = metadata.string("tokenizer.chat_template")? {
        config["chat_template"] = template.into();
    }
    let eos = metadata.unsigned("tokenizer.ggml.eos_token_id")?;
    fs::write(out.join("vocab.json"), serde_json::to_vec(&vocab)?)?;
    fs::write(out.join("merges.txt"), merges)?;
    fs::write(out.join("tokenizer_config.json"), serde_json::to_vec_pretty(&config)?)?;
    fs::write(
        out.join("generation_config.json"),
        serde_json::to_vec_pretty(&json!({ "eos_token_id": eos }))?,
    )?;
    Ok(())
}

fn weights(path: &Path, tensors: &[(Tensor, Vec<Encoded>)]) -> Result<()> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut end = 0;
    let each = || tensors.iter().flat_map(|(t, stored)| stored.iter().map(|s| (&t.stems[0], s)));
    for (stem, stored) in each() {
        let start = end;
        end += stored.data.len();
        let entry = json!({
            "dtype": stored.dtype, "shape": stored.shape, "data_offsets": [start, end],
        });
        header.insert(format!("{stem}.{}", stored.ending), entry);
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::new(File::create_new(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    each().try_for_each(|(_, stored)| file.write_all(&stored.data))?;
    Ok(file.flush()?)
}
