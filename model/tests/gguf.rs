//! GGUF checkpoints, written here by hand: order of rows, packed projections, cuts inside of
//! super-blocks, and what is refused.

#[path = "../../formats/tests/common/mod.rs"]
mod common;
mod run;

use std::{os::unix::fs::FileExt, path::PathBuf};

use common::{GgufFile, safetensors};
use cpu::Precision;
use kernels::{Format, Stored, WeightPart};
use model::{Checkpoint, FfnBlock, ModelError, RopeScaling};

const F32: u32 = 0;
const Q8_0: u32 = 8;
const Q2_K: u32 = 10;
const Q6_K: u32 = 14;

/// One layer: 4 query heads over 2 KV heads of 16 dimensions, hidden size 64, 10 tokens.
struct Tiny {
    architecture: &'static str,
    intermediate: u64,
    file: GgufFile,
}

fn floats(values: impl Iterator<Item = f32>) -> Vec<u8> {
    values.flat_map(f32::to_le_bytes).collect()
}

/// Row r, column c is r + c / 1000.
fn numbered(rows: u64, cols: u64) -> Vec<u8> {
    floats((0..rows).flat_map(|r| (0..cols).map(move |c| r as f32 + c as f32 / 1000.0)))
}

/// As converters do for interleaved rotation: [heads, 2, D/2] becomes [heads, D/2, 2].
fn interleaved(rows: &[u8], row_bytes: usize) -> Vec<u8> {
    let head = |head: &[u8]| -> Vec<u8> {
        let row = |r: usize| head[r * row_bytes..][..row_bytes].to_vec();
        (0..8).flat_map(|i| [row(i), row(8 + i)]).flatten().collect()
    };
    rows.chunks_exact(16 * row_bytes).flat_map(head).collect()
}

impl Tiny {
    fn new(architecture: &'static str, intermediate: u64) -> Self {
        let mut tiny = Self { architecture, intermediate, file: GgufFile::new() };
        tiny.file.text("general.architecture", architecture);
        tiny.file.strings("tokenizer.ggml.tokens", &["a"; 9]);
        let doubled = if architecture == "qwen" { 2 } else { 1 };
        for (key, value) in [
            ("block_count", 1),
            ("embedding_length", 64),
            ("attention.head_count", 4),
            ("attention.head_count_kv", if architecture == "qwen" { 4 } else { 2 }),
            ("context_length", 128),
            ("feed_forward_length", intermediate as u32 * doubled),
        ] {
            tiny.u32(key, value);
        }
        tiny.f32("attention.layer_norm_rms_epsilon", 1e-5);
        tiny
    }

    fn u32(&mut self, key: &str, value: u32) -> &mut Self {
        self.file.u32(&format!("{}.{key}", self.architecture), value);
        self
    }

    fn f32(&mut self, key: &str, value: f32) -> &mut Self {
        self.file.f32(&format!("{}.{key}", self.architecture), value);
        self
    }

    fn matrix(&mut self, name: &str, rows: u64, cols: u64) -> &mut Self {
        self.file.tensor(name, &[cols, rows], F32, &numbered(rows, cols));
        self
    }

    fn vector(&mut self, name: &str, len: u64) -> &mut Self {
        self.file.tensor(name, &[len], F32, &floats((0..len).map(|n| n as f32)));
        self
    }

    /// Everything but attention's input and the down matrix.
    fn rest(&mut self) -> &mut Self {
        let width = self.intermediate;
        self.matrix("token_embd.weight", 10, 64).vector("output_norm.weight", 64);
        self.vector("blk.0.attn_norm.weight", 64).vector("blk.0.ffn_norm.weight", 64);
        self.matrix("blk.0.attn_output.weight", 64, 64);
        self.matrix("blk.0.ffn_gate.weight", width, 64).matrix("blk.0.ffn_up.weight", width, 64)
    }

    fn down(&mut self) -> &mut Self {
        self.matrix("blk.0.ffn_down.weight", 64, self.intermediate)
    }

    fn qkv(&mut self) -> &mut Self {
        self.matrix("blk.0.attn_q.weight", 64, 64);
        self.matrix("blk.0.attn_k.weight", 32, 64).matrix("blk.0.attn_v.weight", 32, 64)
    }

    fn write(&self) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("Tiny-Q8.gguf");
        std::fs::write(&path, self.file.bytes()).unwrap();
        (folder, path)
    }

    fn open(&self) -> Result<Checkpoint, ModelError> {
        let (_folder, path) = self.write();
        Checkpoint::open(&path)
    }

    fn refusal(&self) -> String {
        self.open().err().expect("refused").to_string()
    }
}

/// Format and bytes of a part as GGUF files have them.
fn plain<'a>(part: &'a WeightPart<'_>) -> (Format, &'a [u8]) {
    let Stored::Plain { format, data } = &part.stored else { panic!("{part:?}") };
    (*format, data)
}

#[test]
fn rows_of_llama_files_are_put_back_into_order() {
    let mut tiny = Tiny::new("llama", 96);
    tiny.rest().down();
    for (name, rows) in [("q", 64), ("k", 32)] {
        let weight = interleaved(&numbered(rows, 64), 256);
        tiny.file.tensor(&format!("blk.0.attn_{name}.weight"), &[64, rows], F32, &weight);
        let bias = interleaved(&floats((0..rows).map(|n| n as f32)), 4);
        tiny.file.tensor(&format!("blk.0.attn_{name}.bias"), &[rows], F32, &bias);
    }
    tiny.matrix("blk.0.attn_v.weight", 32, 64).vector("blk.0.attn_v.bias", 32);
    let checkpoint = tiny.open().unwrap();
    assert_eq!(checkpoint.name(), "Tiny-Q8");
    let config = checkpoint.config();
    assert_eq!((config.family.name, config.tied, config.qkv_bias), ("llama", true, true));
    assert_eq!((config.vocab, config.sampled_vocab), (10, 9));
    for (rank, world_size, q, kv) in
        [(0, 1, 0..64, 0..32), (1, 2, 32..64, 16..32), (3, 4, 48..64, 16..32)]
    {
        let shard = checkpoint.shard(rank, world_size).unwrap();
        let parts = checkpoint.qkv(0, &shard).unwrap();
        for (part, range) in parts.iter().zip([q.clone(), kv.clone(), kv.clone()]) {
            let bytes = range.start * 256..range.end * 256;
            assert_eq!(plain(part).1[..], numbered(64, 64)[bytes]);
        }
        let bias = checkpoint.qkv_bias(0, &shard).unwrap().unwrap();
        let expected = q.chain(kv.clone()).chain(kv).map(|n| n as f32);
        assert_eq!(bias, expected.collect::<Vec<_>>());
    }
}

#[test]
fn the_original_qwen_packs_q_k_and_v() {
    let mut tiny = Tiny::new("qwen", 96);
    tiny.rest().down().matrix("output.weight", 10, 64);
    tiny.matrix("blk.0.attn_qkv.weight", 192, 64).vector("blk.0.attn_qkv.bias", 192);
    let checkpoint = tiny.open().unwrap();
    let config = checkpoint.config();
    assert_eq!((config.family.name, config.intermediate), ("qwen1", 96));
    assert!(!checkpoint.config().tied);
    let shard = checkpoint.shard(1, 2).unwrap();
    let rows = [32..64, 96..128, 160..192];
    for (part, rows) in checkpoint.qkv(0, &shard).unwrap().iter().zip(&rows) {
        assert_eq!(plain(part).1[..], numbered(192, 64)[rows.start * 256..rows.end * 256]);
    }
    let bias = checkpoint.qkv_bias(0, &shard).unwrap().unwrap();
    assert_eq!(bias, rows.into_iter().flatten().map(|n| n as f32).collect::<Vec<_>>());
}

#[test]
fn rows_of_blocks_are_dealt_out_whole() {
    let mut tiny = Tiny::new("qwen2", 768);
    tiny.matrix("token_embd.weight", 10, 64).vector("output_norm.weight", 64);
    tiny.vector("blk.0.attn_norm.weight", 64).vector("blk.0.ffn_norm.weight", 64);
    tiny.matrix("blk.0.ffn_gate.weight", 768, 64).matrix("blk.0.ffn_up.weight", 768, 64).qkv();
    let stored: Vec<u8> = (0..64 * 3 * 210usize).map(|n| (n * 31 % 251) as u8).collect();
    tiny.file.tensor("blk.0.ffn_down.weight", &[768, 64], Q6_K, &stored);
    // A head has half a block.
    tiny.file.tensor("blk.0.attn_output.weight", &[64, 64], Q8_0, &stored[..64 * 2 * 34]);
    let checkpoint = tiny.open().unwrap();
    let bytes = |rank, of| checkpoint.weight_bytes(&checkpoint.shard(rank, of).unwrap()).unwrap();
    for world_size in 1..=4 {
        let shards = (0..world_size).map(|rank| checkpoint.shard(rank, world_size).unwrap());
        let (mut down, mut out) = (Vec::new(), Vec::new());
        for shard in shards {
            for (read, format, cols, all) in [
                (checkpoint.down(0, FfnBlock::Dense, &shard), Format::Q6K, 768, &mut down),
                (checkpoint.attn_out(0, &shard), Format::Q8_0, 64, &mut out),
            ] {
                let [part] = &read.unwrap()[..] else { panic!("{shard:?}") };
                let (found, data) = plain(part);
                assert_eq!((found, part.rows, part.cols), (format, shard.hidden.len(), cols));
                all.extend_from_slice(data);
            }
        }
        assert_eq!(down, stored);
        assert_eq!(out, stored[..64 * 2 * 34]);
    }
    assert_eq!(bytes(0, 2) + bytes(1, 2), bytes(0, 1), "nothing is held twice");
}

#[test]
fn scaled_rotations() {
    let whole = |edit: &dyn Fn(&mut Tiny)| {
        let mut tiny = Tiny::new("llama", 96);
        tiny.rest().qkv().down();
        edit(&mut tiny);
        tiny
    };
    let yarn = whole(&|tiny| {
        tiny.file.text("llama.rope.scaling.type", "yarn");
        tiny.f32("rope.scaling.factor", 4.0).u32("rope.scaling.original_context_length", 128);
    });
    let config = yarn.open().unwrap().config().clone();
    assert_eq!(config.context_max, 512);
    assert!(matches!(config.rope.scaling, RopeScaling::Yarn { original_context: 128, .. }));

    let divided = whole(&|tiny| {
        tiny.file.tensor("rope_freqs.weight", &[8], F32, &floats((1..9).map(|n| n as f32)));
    });
    let scaling = divided.open().unwrap().config().rope.scaling.clone();
    assert_eq!(scaling, RopeScaling::Divisors((1..9).map(|n| n as f32).collect()));

    let long = whole(&|tiny| {
        tiny.file.text("llama.rope.scaling.type", "longrope");
        tiny.f32("rope.scaling.factor", 4.0);
    });
    assert!(long.refusal().contains("longrope"));
    let zero = whole(&|tiny| {
        tiny.file.tensor("rope_freqs.weight", &[8], F32, &[0; 32]);
    });
    assert!(zero.refusal().contains("rope divisor of 0"));
    let partial = whole(&|tiny| {
        tiny.u32("rope.dimension_count", 8);
    });
    assert!(partial.refusal().contains("llama.rope.dimension_count of 8"));
    let experts = whole(&|tiny| {
        tiny.u32("expert_count", 8);
    });
    assert!(experts.refusal().contains("mixture of experts"));
}

#[test]
fn tensors_must_be_those_of_the_architecture() {
    let mut tiny = Tiny::new("qwen2", 96);
    tiny.rest().qkv();
    assert!(tiny.refusal().contains("tensor blk.0.ffn_down.weight [64, 96] is missing"));
    tiny.matrix("blk.0.ffn_down.weight", 96, 64);
    assert!(tiny.refusal().contains("ffn_down.weight has shape [96, 64], expected is [64, 96]"));

    let mut tiny = Tiny::new("qwen2", 96);
    tiny.rest().qkv().down().matrix("blk.1.ffn_down.weight", 64, 96);
    assert!(tiny.refusal().contains("tensor blk.1.ffn_down.weight has no place"));

    let mut tiny = Tiny::new("qwen2", 256);
    tiny.rest().qkv();
    tiny.file.tensor("blk.0.ffn_down.weight", &[256, 64], Q2_K, &[0; 64 * 84]);
    let refusal = tiny.refusal();
    assert!(
        refusal.contains("blk.0.ffn_down.weight is stored as Q2_K; use a file in"),
        "{refusal}"
    );

    let mut tiny = Tiny::new("bert", 96);
    tiny.rest();
    assert!(tiny.refusal().contains("GGUF architecture \"bert\""));
}

#[test]
fn truncated_files_are_noticed_at_open() {
    let mut tiny = Tiny::new("qwen2", 96);
    tiny.rest().qkv().down();
    let (_folder, path) = tiny.write();
    Checkpoint::open(&path).unwrap();
    let len = std::fs::metadata(&path).unwrap().len();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(len - 1).unwrap();
    let refusal = Checkpoint::open(&path).err().unwrap().to_string();
    assert!(refusal.contains("truncated") && refusal.contains("Tiny-Q8.gguf"), "{refusal}");
}

#[test]
fn damaged_files_are_refused_or_read_without_panic() {
    let mut tiny = Tiny::new("llama", 96);
    tiny.rest().qkv().down().f32("rope.freq_base", 1e4).u32("attention.key_length", 16);
    let (_folder, path) = tiny.write();
    let whole = tiny.file.bytes();
    let described = whole.windows(20).rposition(|w| w == b"blk.0.ffn_down.weigh").unwrap() + 64;
    let disk = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    let (mut state, mut opened) = (0x5EED_u64, 0);
    for _ in 0..2000 {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (at, bit) = ((state >> 33) as usize % described, (state >> 24) % 8);
        disk.write_all_at(&[whole[at] ^ (1 << bit)], at as u64).unwrap();
        let damaged = Checkpoint::open(&path);
        disk.write_all_at(&whole[at..=at], at as u64).unwrap();
        let Ok(checkpoint) = damaged else { continue };
        opened += 1;
        for rank in 0..2 {
            let Ok(shard) = checkpoint.shard(rank, 2) else { continue };
            checkpoint.weight_bytes(&shard).unwrap();
            checkpoint.qkv(0, &shard).unwrap();
            checkpoint.attn_out(0, &shard).unwrap();
            checkpoint.down(0, FfnBlock::Dense, &shard).unwrap();
            checkpoint.embed(&shard).unwrap();
        }
    }
    assert!(opened > 30, "only {opened} got as far as being read");
}

#[test]
fn safetensors_must_fit_their_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let entry = r#"{"model.norm.weight":{"dtype":"I64","shape":[8],"data_offsets":[0,64]}}"#;
    std::fs::write(folder.path().join("model.safetensors"), safetensors(entry, &[0; 64])).unwrap();
    let open = |config: &str| {
        std::fs::write(folder.path().join("config.json"), config).unwrap();
        Checkpoint::open(folder.path()).err().unwrap().to_string()
    };
    assert!(open("{").contains("config.json"));
    assert!(open(r#"{"architectures":["GPT2LMHeadModel"]}"#).contains("GPT2LMHeadModel"));
    let config = r#"{"architectures":["Qwen2ForCausalLM"],"hidden_size":8,"vocab_size":4,
        "num_hidden_layers":1,"num_attention_heads":1,"intermediate_size":8,
        "max_position_embeddings":16}"#;
    assert!(open(config).contains("tensor model.embed_tokens.weight [4, 8] is missing"));
}

/// As `Tiny::matrix`, in blocks of 32 pseudo-random bytes behind a scale.
fn quantised(tiny: &mut Tiny, name: &str, rows: u64, cols: u64) {
    let scale = half::f16::from_f32(1.0 / 512.0).to_le_bytes();
    let mut state = name.len() as u32 + 1;
    let mut byte = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    let mut block = || scale.into_iter().chain(std::array::from_fn::<u8, 32, _>(|_| byte()));
    let data: Vec<u8> = (0..rows * cols / 32).flat_map(|_| block()).collect();
    tiny.file.tensor(name, &[cols, rows], Q8_0, &data);
}

#[test]
fn quantised_logits_are_the_same_on_any_number_of_ranks() {
    let mut tiny = Tiny::new("qwen2", 96);
    tiny.vector("output_norm.weight", 64);
    tiny.vector("blk.0.attn_norm.weight", 64).vector("blk.0.ffn_norm.weight", 64);
    for (name, rows, cols) in [
        ("token_embd", 10, 64),
        ("blk.0.attn_q", 64, 64),
        ("blk.0.attn_k", 32, 64),
        ("blk.0.attn_v", 32, 64),
        ("blk.0.attn_output", 64, 64),
        ("blk.0.ffn_gate", 96, 64),
        ("blk.0.ffn_up", 96, 64),
        ("blk.0.ffn_down", 64, 96),
    ] {
        quantised(&mut tiny, &format!("{name}.weight"), rows, cols);
    }
    let (_folder, path) = tiny.write();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let ids: Vec<u32> = (0..10).chain(0..9).collect();
    let logits = |world_size| run::logits(&checkpoint, &ids, Precision::Fast, world_size);
    let one = logits(1);
    assert_eq!(one.len(), 19 * 10);
    assert!(one.iter().all(|logit| logit.is_normal()));
    for world_size in 2..=4 {
        assert_eq!(one, logits(world_size), "{world_size} ranks");
    }
}
