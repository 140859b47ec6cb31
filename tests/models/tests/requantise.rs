//! The tool that writes checkpoints in other formats: what it writes is what it was given, but for
//! the rounding of the format, and the product's packed products agree with the dequantised ones.

#[path = "../../../formats/tests/common/mod.rs"]
#[expect(dead_code, reason = "safetensors are written by the tool itself")]
mod common;

use common::GgufFile;
use cpu::{Cpu, CpuConfig, Isa, Precision};
use engine::plan::Want;
use kernels::{WeightPart, plain::dequant::part_row};
use model::{Checkpoint, FfnBlock};
use models::{Driven, GREEDY, Group, OPTIONS, folder};
use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
};

/// Rows of 256 and 160 columns: whole groups of 128 and a short one.
const MODEL: &str = "qwen2_gqa2_hd128";

/// Runs the tool and returns where its output lies.
fn requantise(format: &str, model: &Path, out: PathBuf) -> PathBuf {
    let tool = run(&[format.as_ref(), model.as_os_str(), out.as_os_str()]);
    assert!(tool.status.success(), "{format}: {}", String::from_utf8_lossy(&tool.stderr));
    out
}

fn run(args: &[&OsStr]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_requantise")).args(args).output().expect("the tool runs")
}

/// The layers' matrices, and the tables.
fn matrices(checkpoint: &Checkpoint) -> (Vec<WeightPart<'static>>, Vec<WeightPart<'static>>) {
    let shard = checkpoint.shard(0, 1).unwrap();
    let layers = (0..checkpoint.config().layers).flat_map(|layer| {
        let parts = [
            checkpoint.qkv(layer, &shard),
            checkpoint.attn_out(layer, &shard),
            checkpoint.gate_up(layer, FfnBlock::Dense, &shard),
            checkpoint.down(layer, FfnBlock::Dense, &shard),
        ];
        parts.into_iter().flat_map(Result::unwrap)
    });
    (layers.collect(), checkpoint.embed(&shard).unwrap())
}

fn row(part: &WeightPart<'_>, n: usize) -> Vec<f32> {
    let mut row = vec![0.0; part.cols];
    part_row(part, n, &mut row);
    row
}

/// How far from `w` its rounded value may be, where it shares its scale with `group`.
fn allowed(format: &str, group: &[f32], w: f32) -> f32 {
    let min = group.iter().fold(0.0f32, |min, w| min.min(*w));
    let max = group.iter().fold(0.0f32, |max, w| max.max(*w));
    let largest = max.max(-min);
    // Half a step, and what rounding the scale to f16 adds.
    match format {
        "q4_0" => largest / 8.0 * 1.01,
        "q4_1" | "gptq-int4" | "awq-int4" => (max - min) / 15.0 * 0.52,
        "q8_0" => largest / 127.0 * 0.54,
        _ => w.abs() / 16.0 + 1e-5,
    }
}

/// Every value of the layers, and of the tables, which stay as they were.
fn assert_near(format: &str, found: &Checkpoint, wanted: &Checkpoint) {
    let columns = if format.starts_with('q') { 32 } else { 128 };
    let ((layers, tables), (wanted_layers, wanted_tables)) = (matrices(found), matrices(wanted));
    assert_eq!(layers.len(), wanted_layers.len());
    let mut off = 0;
    for (part, wanted) in layers.iter().zip(&wanted_layers) {
        for n in 0..wanted.rows {
            let (row, wanted) = (row(part, n), row(wanted, n));
            for (values, group) in row.chunks(columns).zip(wanted.chunks(columns)) {
                for (value, w) in values.iter().zip(group) {
                    let allowed = allowed(format, group, *w);
                    assert!((value - w).abs() <= allowed, "{format}: {value} for {w}: {allowed}");
                    off += usize::from(value != w);
                }
            }
        }
    }
    assert_eq!(off > 0, format != "f32", "{format}: {off} values were rounded");
    for (part, wanted) in tables.iter().zip(&wanted_tables) {
        for n in 0..wanted.rows {
            let near = |(a, b): (&f32, &f32)| (a - b).abs() <= b.abs() / 2048.0 + 1e-7;
            assert!(row(part, n).iter().zip(&row(wanted, n)).all(near), "{format}: row {n}");
        }
    }
}

/// The logits of a prompt, rounding nothing.
fn logits(path: &Path) -> Vec<f32> {
    let config = CpuConfig { threads: 2, precision: Precision::Exact, isa: Isa::Amx };
    let checkpoint = Arc::new(Checkpoint::open(path).unwrap());
    let mut group =
        Group::load(&checkpoint, OPTIONS, vec![Cpu::new(config).unwrap()], models::staged).unwrap();
    let prompt: Vec<u32> = (0..60).map(|at| (at * 31 + 7) % 300).collect();
    let mut sequence = Driven::new(1, &prompt, GREEDY, (0..4).collect());
    let output = group.step(vec![sequence.chunk(256, Want::Logits)]).unwrap();
    let logits: Vec<f32> = output.logits.into_iter().flat_map(|(_, rows)| rows).collect();
    assert!(logits.iter().all(|logit| logit.is_finite()), "{}", path.display());
    logits
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |worst, (a, b)| worst.max((a - b).abs()))
}

#[test]
fn folders_hold_the_model_and_run_packed_as_dequantised() {
    let (model, at) = (folder(MODEL).unwrap(), tempfile::tempdir().unwrap());
    let wanted = Checkpoint::open(&model).unwrap();
    let original = logits(&model);
    for format in ["f32", "gptq-int4", "awq-int4", "fp8-block128", "fp8-row"] {
        let out = requantise(format, &model, at.path().join(format));
        assert_near(format, &Checkpoint::open(&out).unwrap(), &wanted);
        let reference = requantise("f32", &out, at.path().join(format!("{format} in f32")));
        let packed = logits(&out);
        let apart = worst(&packed, &logits(&reference));
        assert!(apart <= 1e-4, "{format}: {apart} from the dequantised");
        let rounded = worst(&packed, &original);
        assert_eq!(rounded > 1e-3, format != "f32", "{format}: {rounded} from the original");
    }
}

/// The golden checkpoint as a GGUF file in f32.
fn gguf(path: &Path) {
    let model = Checkpoint::open(&folder(MODEL).unwrap()).unwrap();
    let (config, shard) = (model.config(), model.shard(0, 1).unwrap());
    let mut file = GgufFile::new();
    file.text("general.architecture", "qwen2").f32("qwen2.rope.freq_base", config.rope.base as f32);
    for (key, value) in [
        ("block_count", config.layers),
        ("embedding_length", config.hidden),
        ("attention.head_count", config.q_heads),
        ("attention.head_count_kv", config.kv_heads),
        ("context_length", config.context_max),
        ("feed_forward_length", config.intermediate),
    ] {
        file.u32(&format!("qwen2.{key}"), value as u32);
    }
    let bytes = |values: &[f32]| values.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
    let mut matrix = |name: &str, part: &WeightPart<'_>| {
        let data: Vec<u8> = (0..part.rows).flat_map(|n| bytes(&row(part, n))).collect();
        file.tensor(&format!("{name}.weight"), &[part.cols as u64, part.rows as u64], 0, &data);
    };
    let (layers, tables) = matrices(&model);
    matrix("token_embd", &tables[0]);
    let stems = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];
    for (at, part) in layers.iter().enumerate() {
        matrix(&format!("blk.{}.{}", at / stems.len(), stems[at % stems.len()]), part);
    }
    let mut vector = |name: String, values: &[f32]| {
        file.tensor(&name, &[values.len() as u64], 0, &bytes(values));
    };
    vector("output_norm.weight".into(), &model.final_norm().unwrap());
    for layer in 0..config.layers {
        vector(format!("blk.{layer}.attn_norm.weight"), &model.input_norm(layer).unwrap());
        vector(format!("blk.{layer}.ffn_norm.weight"), &model.post_norm(layer).unwrap());
        let bias = model.qkv_bias(layer, &shard).unwrap().unwrap();
        let (q, k_v) = bias.split_at(config.q_heads * config.head_dim);
        let (k, v) = k_v.split_at(config.kv_heads * config.head_dim);
        for (name, bias) in ["q", "k", "v"].iter().zip([q, k, v]) {
            vector(format!("blk.{layer}.attn_{name}.bias"), bias);
        }
    }
    std::fs::write(path, file.bytes()).unwrap();
}

#[test]
fn gguf_files_hold_the_model() {
    let at = tempfile::tempdir().unwrap();
    let model = at.path().join("model.gguf");
    gguf(&model);
    let wanted = Checkpoint::open(&model).unwrap();
    for format in ["q4_0", "q4_1", "q8_0"] {
        let out = requantise(format, &model, at.path().join(format!("{format}.gguf")));
        assert_near(format, &Checkpoint::open(&out).unwrap(), &wanted);
    }
}

#[test]
fn tables_are_cut_where_asked_and_nothing_is_written_over() {
    let (model, at) = (folder(MODEL).unwrap(), tempfile::tempdir().unwrap());
    let out = at.path().join("model");
    let args = ["f32".as_ref(), model.as_os_str(), out.as_os_str(), "--vocab".as_ref()];
    let cut = |rows: &str| run(&[&args[..], &[rows.as_ref()]].concat());
    let refusal = |tool: Output| {
        assert!(!tool.status.success());
        String::from_utf8(tool.stderr).unwrap()
    };
    assert!(refusal(cut("385")).contains("--vocab 385 of a table of 384 rows"));
    assert!(cut("100").status.success());
    assert_eq!(Checkpoint::open(&out).unwrap().config().vocab, 100);
    assert!(refusal(cut("100")).contains("is there already"));
}
