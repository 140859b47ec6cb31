//! Real checkpoint layouts: every rank's slices, put together, are the whole tensors.

use std::path::{Path, PathBuf};

use collective::{Staged, Threads};
use formats::{Tensors, locate};
use kernels::{Format, Stored, WeightPart, plain::Plain};
use model::{
    Checkpoint, DecoderConfig, FfnBlock, Loaded, ModelError, Runner, RunnerOptions, Shard,
};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/public").join(name)
}

fn goldens() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(golden("")).unwrap().map(|entry| entry.unwrap().path());
    let quantised = |path: &PathBuf| {
        std::fs::read_to_string(path.join("config.json")).unwrap().contains("quantization_config")
    };
    let folders = entries.filter(|path| path.is_dir() && !quantised(path));
    let mut folders: Vec<_> = folders.collect();
    folders.sort();
    assert_eq!(folders.len(), 12);
    folders
}

/// A tensor straight from the file.
fn whole(tensors: &Tensors, name: &str) -> Vec<u8> {
    let mut bytes = vec![0; tensors.get(name).unwrap_or_else(|| panic!("{name}")).bytes as usize];
    tensors.read_at(name, 0, &mut bytes).unwrap();
    bytes
}

/// The bytes of parts on top of each other; all these checkpoints are bf16.
fn stacked(parts: impl IntoIterator<Item = WeightPart<'static>>) -> Vec<u8> {
    let whole_rows = |part: WeightPart<'static>| {
        let Stored::Plain { format: Format::Bf16, data } = part.stored else { panic!("not bf16") };
        assert_eq!(data.len(), part.rows * part.cols * 2);
        data.into_owned()
    };
    parts.into_iter().flat_map(whole_rows).collect()
}

fn bf16(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect()
}

struct Split<'a> {
    checkpoint: &'a Checkpoint,
    shards: Vec<Shard>,
}

impl Split<'_> {
    /// What every rank reads, in order of rank; ranks that repeat a KV head count once.
    fn each<T>(&self, read: impl Fn(&Checkpoint, &Shard) -> Result<T, ModelError>) -> Vec<T> {
        self.shards.iter().map(|shard| read(self.checkpoint, shard).unwrap()).collect()
    }

    /// Part `index` of Q, K, V over all ranks.
    fn projection(&self, layer: usize, index: usize) -> Vec<u8> {
        let mut last = None;
        let mut bytes = Vec::new();
        for (shard, parts) in self.shards.iter().zip(self.each(|c, s| c.qkv(layer, s))) {
            let seen =
                index > 0 && last.replace(shard.kv_heads.clone()) == Some(shard.kv_heads.clone());
            if !seen {
                bytes.extend(stacked(parts.into_iter().nth(index)));
            }
        }
        bytes
    }

    fn half_of_gate_up(&self, layer: usize, block: FfnBlock, index: usize) -> Vec<u8> {
        let each = self.each(|c, s| c.gate_up(layer, block, s));
        stacked(each.into_iter().map(|mut parts| parts.swap_remove(index)))
    }

    /// The rows of every rank.
    fn rows(
        &self,
        read: impl Fn(&Checkpoint, &Shard) -> Result<Vec<WeightPart<'static>>, ModelError>,
    ) -> Vec<u8> {
        stacked(self.each(read).into_iter().flatten())
    }
}

/// (q, k, v, o) of a layer.
fn names(family: &str, layer: usize) -> [String; 4] {
    match family {
        "qwen1" => ["c_attn", "c_attn", "c_attn", "c_proj"]
            .map(|name| format!("transformer.h.{layer}.attn.{name}.weight")),
        _ => ["q_proj", "k_proj", "v_proj", "o_proj"]
            .map(|name| format!("model.layers.{layer}.self_attn.{name}.weight")),
    }
}

/// The feed-forward blocks of a layer with (gate, up, down) of each.
fn blocks(config: &DecoderConfig, layer: usize) -> Vec<(FfnBlock, [String; 3])> {
    let named = |block, stem: String| {
        let name = |matrix: &str| format!("model.layers.{layer}.mlp.{stem}{matrix}_proj.weight");
        (block, ["gate", "up", "down"].map(name))
    };
    let Some(experts) = &config.experts else {
        let packed =
            ["w2", "w1", "c_proj"].map(|name| format!("transformer.h.{layer}.mlp.{name}.weight"));
        return match config.family.name {
            "qwen1" => vec![(FfnBlock::Dense, packed)],
            _ => vec![named(FfnBlock::Dense, String::new())],
        };
    };
    let one = |index| named(FfnBlock::Expert(index), format!("experts.{index}."));
    let shared = experts.shared.map(|_| named(FfnBlock::SharedExpert, "shared_expert.".into()));
    (0..experts.count).map(one).chain(shared).collect()
}

fn check_layer(split: &Split<'_>, tensors: &Tensors, layer: usize) {
    let config = split.checkpoint.config();
    let [q, k, v, out] = names(config.family.name, layer);
    let projections = [0, 1, 2].map(|index| split.projection(layer, index));
    if config.family.name == "qwen1" {
        assert_eq!(projections.concat(), whole(tensors, &q));
    } else {
        for (found, name) in projections.iter().zip([q, k, v]) {
            assert_eq!(*found, whole(tensors, &name), "{name}");
        }
    }
    assert_eq!(split.rows(|c, s| c.attn_out(layer, s)), whole(tensors, &out));
    for (block, [gate, up, down]) in blocks(config, layer) {
        assert_eq!(split.half_of_gate_up(layer, block, 0), whole(tensors, &gate));
        assert_eq!(split.half_of_gate_up(layer, block, 1), whole(tensors, &up));
        assert_eq!(split.rows(|c, s| c.down(layer, block, s)), whole(tensors, &down));
    }
}

#[test]
fn slices_of_all_ranks_are_the_whole_checkpoint() {
    for folder in goldens() {
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let (tensors, _) = Tensors::open(&locate(&folder).unwrap()).unwrap();
        let config = checkpoint.config().clone();
        assert_eq!(Some(checkpoint.name()), folder.file_name().unwrap().to_str());
        let (embed, head) = match config.family.name {
            "qwen1" => ("transformer.wte.weight", "lm_head.weight"),
            _ => ("model.embed_tokens.weight", "lm_head.weight"),
        };
        let head = if config.tied { embed } else { head };
        for world_size in 1..=config.q_heads.min(3) {
            let shard = |rank| checkpoint.shard(rank, world_size).unwrap();
            let shards = (0..world_size).map(shard).collect();
            let split = Split { checkpoint: &checkpoint, shards };
            assert_eq!(split.rows(Checkpoint::embed), whole(&tensors, embed));
            assert_eq!(split.rows(Checkpoint::lm_head), whole(&tensors, head));
            for layer in 0..config.layers {
                check_layer(&split, &tensors, layer);
            }
        }
        assert!(matches!(
            checkpoint.shard(0, config.q_heads + 1),
            Err(ModelError::Ranks { max, .. }) if max == config.q_heads
        ));
    }
}

#[test]
fn vectors_are_read_as_floats() {
    for folder in goldens() {
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let (tensors, _) = Tensors::open(&locate(&folder).unwrap()).unwrap();
        let config = checkpoint.config();
        let one = checkpoint.shard(0, 1).unwrap();
        for layer in 0..config.layers {
            let [qkv @ .., _] = names(config.family.name, layer);
            let bias = checkpoint.qkv_bias(layer, &one).unwrap();
            assert_eq!(bias.is_some(), config.qkv_bias);
            if let Some(bias) = bias {
                let mut stems: Vec<_> = qkv.iter().map(|n| n.replace(".weight", ".bias")).collect();
                stems.dedup();
                let stored: Vec<u8> = stems.iter().flat_map(|n| whole(&tensors, n)).collect();
                assert_eq!(bf16(&bias), stored);
            }
            let q_norm = checkpoint.q_norm(layer).unwrap();
            assert_eq!(q_norm.map(|n| n.len()), config.qk_norm.then_some(config.head_dim));
            let (input, post) = match config.family.name {
                "qwen1" => (format!("transformer.h.{layer}.ln_1.weight"), "ln_2"),
                _ => (
                    format!("model.layers.{layer}.input_layernorm.weight"),
                    "post_attention_layernorm",
                ),
            };
            assert_eq!(bf16(&checkpoint.input_norm(layer).unwrap()), whole(&tensors, &input));
            let post = input.replace("ln_1", post).replace("input_layernorm", post);
            assert_eq!(bf16(&checkpoint.post_norm(layer).unwrap()), whole(&tensors, &post));
        }
    }
}

#[test]
fn biases_are_cut_like_the_rows_they_belong_to() {
    let checkpoint = Checkpoint::open(&golden("qwen2_gqa4_tied_sharded")).unwrap();
    let dim = checkpoint.config().head_dim;
    let one = checkpoint.qkv_bias(1, &checkpoint.shard(0, 1).unwrap()).unwrap().unwrap();
    let kv = &one[4 * dim..];
    for rank in 0..2 {
        let shard = checkpoint.shard(rank, 2).unwrap();
        let bias = checkpoint.qkv_bias(1, &shard).unwrap().unwrap();
        assert_eq!(bias, [&one[2 * rank * dim..][..2 * dim], kv].concat());
    }
}

#[test]
fn configurations_of_the_goldens() {
    let config = |name: &str| Checkpoint::open(&golden(name)).unwrap().config().clone();
    let ntk = config("qwen1_ntk_logn");
    assert_eq!((ntk.logn, ntk.rope.dynamic_ntk, ntk.context_max), (Some(48), Some(48), 32768));
    let window = config("qwen2_swa_on").window;
    assert_eq!(window, [None, Some(16)]);
    assert_eq!(config("qwen2_swa_off").window, [None, None]);
    assert_eq!(config("qwen2_yarn4").context_max, 256);
    let qwen3 = config("qwen3_gqa4_hd128_tied");
    assert_eq!(
        (qwen3.head_dim, qwen3.qk_norm, qwen3.qkv_bias, qwen3.tied),
        (128, true, false, true)
    );
    assert_eq!(config("llama_smollm2").rope.base, 100_000.0);
}

#[test]
fn memory_by_rank_adds_up() {
    for folder in goldens() {
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let bytes =
            |rank, of| checkpoint.weight_bytes(&checkpoint.shard(rank, of).unwrap()).unwrap();
        let whole = bytes(0, 1);
        // Norms and biases, all below 1 % of the file, are not counted.
        let total = checkpoint.total_bytes();
        assert!(whole <= total && whole > total - total / 100, "{whole} of {total}");
        assert!(bytes(0, 2) + bytes(1, 2) >= whole, "KV heads may be held twice");
        assert!(bytes(0, 2) < whole * 2 / 3);
    }
}

/// Of a file that opened whole and then lost its second half.
#[test]
fn what_can_no_longer_be_read_is_named_and_ends_the_load() {
    const OPTIONS: RunnerOptions =
        RunnerOptions { blocks: 1, step_tokens_max: 1, sequences_max: 1, context_max: 16 };
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(golden("qwen2_mha_hd64").join(file), folder.path().join(file)).unwrap();
    }
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let path = folder.path().join("model.safetensors");
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    let mut last = Loaded::default();
    let alone = Staged::new(Threads::group(1).remove(0));
    let loaded = Runner::load(Plain, alone, &checkpoint, OPTIONS, &mut |loaded| last = loaded);
    let error = loaded.map(drop).expect_err("half a file").to_string();
    assert!(error.contains(path.to_str().unwrap()), "{error}");
    assert!(last.uploaded < checkpoint.weight_bytes(&checkpoint.shard(0, 1).unwrap()).unwrap());
}

#[test]
fn a_fingerprint_follows_weights_and_text_and_nothing_else() {
    let fingerprint = |path: &Path| {
        let text = formats::text_files(path).unwrap();
        Checkpoint::open(path).unwrap().fingerprint(&text).unwrap()
    };
    let mut all: Vec<String> = goldens().iter().map(|path| fingerprint(path)).collect();
    let first = all[0].clone();
    assert!(first.len() == 32 && first.bytes().all(|digit| digit.is_ascii_hexdigit()), "{first}");
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 12, "every model has its own");

    let copy = tempfile::tempdir().unwrap();
    let path = copy.path();
    for entry in std::fs::read_dir(&goldens()[0]).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), path.join(entry.file_name())).unwrap();
    }
    assert_eq!(fingerprint(path), first, "where it lies does not matter");
    let config = std::fs::read(path.join("config.json")).unwrap();
    std::fs::write(path.join("config.json"), [&config[..], b"\n"].concat()).unwrap();
    let other_text = fingerprint(path);
    assert_ne!(other_text, first);
    // The last tensor's middle.
    let Ok(formats::Layout::Safetensors { files, .. }) = locate(path) else { panic!("a folder") };
    let (tensors, _) = Tensors::open(&locate(path).unwrap()).unwrap();
    let name = tensors.names().last().unwrap().to_owned();
    let tensor = tensors.get(&name).unwrap();
    let file = files.iter().find(|file| {
        let bytes = std::fs::read(file).unwrap();
        bytes.windows(name.len()).any(|window| window == name.as_bytes())
    });
    let file = file.unwrap();
    let mut bytes = std::fs::read(file).unwrap();
    bytes[(tensor.offset + tensor.bytes / 2) as usize] ^= 1;
    std::fs::write(file, bytes).unwrap();
    assert_ne!(fingerprint(path), other_text);
}
