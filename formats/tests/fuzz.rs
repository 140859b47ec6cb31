//! Damages valid files in every way a seeded generator thinks of. No reader may panic, and none may
//! allocate more than the file's own size allows.

mod common;
#[path = "common/damage.rs"]
mod damage;

use common::{GgufFile, gguf::string, safetensors};
use damage::{Random, mutate};
use formats::{gguf, safetensors as st};
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

const ROUNDS: usize = 200_000;
/// In-memory lists against their bytes in the file: three times for strings, more for JSON.
const BYTES_PER_BYTE: usize = 24;
/// A read buffer and error messages.
const BYTES_FIXED: usize = 100_000;

fn gguf_seeds() -> Vec<Vec<u8>> {
    let mut plain = GgufFile::new();
    plain
        .text("general.architecture", "qwen2")
        .u32("qwen2.block_count", 24)
        .f32("qwen2.rope.freq_base", 1e6)
        .entry("tokenizer.ggml.add_bos_token", 7, &[0])
        .strings("tokenizer.ggml.tokens", &["a", "bc", "def", "Ġg"])
        .tensor("token_embd.weight", &[32, 4], 2, &[3; 72])
        .tensor("output_norm.weight", &[8], 0, &[0; 32])
        .tensor("blk.0.ffn_down.weight", &[256, 1], 14, &[9; 210]);
    let mut experts = GgufFile::new();
    experts
        .text("general.architecture", "qwen2moe")
        .u32("qwen2moe.expert_count", 60)
        .u32("qwen2moe.expert_used_count", 4)
        .u32("qwen2moe.expert_feed_forward_length", 32)
        .u32("qwen2moe.expert_shared_feed_forward_length", 64)
        .f32("qwen2moe.expert_weights_scale", 1.0)
        .entry("qwen2moe.expert_weights_norm", 7, &[1])
        .tensor("blk.0.ffn_gate_inp.weight", &[8, 4], 0, &[2; 128])
        .tensor("blk.0.ffn_gate_exps.weight", &[32, 2, 4], 8, &[4; 272])
        .tensor("blk.0.ffn_gate_inp_shexp.weight", &[8], 0, &[2; 32]);
    let nested = [&9u32.to_le_bytes()[..], &2u64.to_le_bytes()].concat();
    let inner = [&5u32.to_le_bytes()[..], &2u64.to_le_bytes(), &[7; 8]].concat();
    let mut odd = GgufFile::new();
    odd.version = 2;
    odd.u32("general.alignment", 64)
        .entry("nested", 9, &[nested, inner.clone(), inner].concat())
        .entry("u64", 10, &[1; 8])
        .entry("i16", 3, &[1; 2])
        .entry("f64", 12, &[1; 8])
        .entry("bytes", 9, &[&0u32.to_le_bytes()[..], &40u64.to_le_bytes(), &[5; 40]].concat());
    odd.alignment = 64;
    odd.tensor("x", &[1, 2, 3, 4], 30, &[0; 48]);
    vec![plain.bytes(), odd.bytes(), experts.bytes(), GgufFile::new().bytes()]
}

fn safetensors_seeds() -> Vec<Vec<u8>> {
    let header = concat!(
        r#"{"__metadata__":{"format":"pt","a":["b",{"c":null}]},"#,
        r#""model.embed_tokens.weight":{"dtype":"BF16","shape":[4,8],"data_offsets":[0,64]},"#,
        r#""model.norm.weight":{"dtype":"F32","shape":[8],"data_offsets":[64,96]},"#,
        r#""\u0078":{"shape":[],"data_offsets":[96,98],"dtype":"F16"}}   "#
    );
    let quantised = concat!(
        r#"{"model.layers.0.mlp.down_proj.qweight":{"dtype":"I32","shape":[2,4],"#,
        r#""data_offsets":[0,32]},"#,
        r#""model.layers.0.mlp.down_proj.g_idx":{"dtype":"I32","shape":[8],"#,
        r#""data_offsets":[32,64]},"#,
        r#""model.layers.0.self_attn.q_proj.weight":{"dtype":"F8_E4M3","shape":[4,4],"#,
        r#""data_offsets":[64,80]},"#,
        r#""model.layers.0.self_attn.q_proj.weight_scale":{"dtype":"F32","shape":[],"#,
        r#""data_offsets":[80,84]}}"#
    );
    vec![safetensors(header, &[1; 98]), safetensors(quantised, &[1; 84]), safetensors("{}", &[])]
}

/// Bytes of the JSON at the start of a file of ours.
fn st_header_len(file: &[u8]) -> usize {
    file.first_chunk().map_or(0, |len| u64::from_le_bytes(*len) as usize)
}

/// Headers whose length is right again, so that damage reaches the JSON behind it.
fn with_length(file: &[u8], header_len: usize) -> Vec<u8> {
    match file.get(8..8 + header_len.min(file.len().saturating_sub(8))) {
        Some(header) => {
            [&(header.len() as u64).to_le_bytes()[..], header, &file[8 + header.len()..]].concat()
        }
        None => string(""),
    }
}

fn bounded<T>(
    file: &[u8],
    accepted: &mut usize,
    read: impl Fn(&[u8]) -> Result<T, formats::FormatError>,
) {
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let result = read(file);
    let used = ALLOCATOR.peak_usage().saturating_sub(before);
    let allowed = BYTES_FIXED + BYTES_PER_BYTE * file.len();
    assert!(used <= allowed, "{used} bytes for a file of {}: {file:?}", file.len());
    match result {
        Ok(_) => *accepted += 1,
        Err(error) => assert!(error.to_string().len() < 2000, "{error}"),
    }
}

#[test]
fn damaged_files_are_refused_without_panic_or_waste() {
    let mut random = Random(0x5EED);
    let (ggufs, safetensors) = (gguf_seeds(), safetensors_seeds());
    let mut accepted = 0;
    for seed in &ggufs {
        bounded(seed, &mut accepted, gguf::parse);
    }
    for seed in &safetensors {
        bounded(seed, &mut accepted, st::parse);
    }
    assert_eq!(accepted, ggufs.len() + safetensors.len(), "the seeds themselves are sound");
    for _ in 0..ROUNDS {
        let seed = &ggufs[random.below(ggufs.len())];
        let file = mutate(&mut random, seed, &ggufs[0]);
        bounded(&file, &mut accepted, gguf::parse);
        bounded(&file, &mut accepted, gguf::parse_metadata);
        // The empty file seldom: little can be wrong with it.
        let seed = &safetensors[[0, 0, 0, 1, 1, 1, 1, 2][random.below(8)]];
        let mut file = mutate(&mut random, seed, &safetensors[0]);
        if random.next().is_multiple_of(2) {
            file = with_length(&file, st_header_len(seed));
        }
        bounded(&file, &mut accepted, st::parse);
        bounded(file.get(8..).unwrap_or_default(), &mut accepted, st::Index::parse);
    }
    assert!(
        accepted > ROUNDS / 100,
        "only {accepted} accepted: the damage never gets past the door"
    );
}
