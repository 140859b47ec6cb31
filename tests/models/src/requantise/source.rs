//! A checkpoint's tensors as f32, one after the other.

use std::{collections::BTreeMap, path::Path};

use kernels::{WeightPart, plain::dequant::part_row};
use model::{Checkpoint, DecoderConfig, FfnBlock, Shard};

use crate::Result;

/// What a tensor is to the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// [V, H]: embedding or output.
    Table,
    /// [N, K] of a layer.
    Matrix,
    Vector,
}

/// One tensor.
pub struct Tensor {
    pub role: Role,
    /// Stems in Hugging Face folders and GGUF files, without `.weight` or `.bias`.
    pub stems: [String; 2],
    pub ending: &'static str,
    /// [N, K], or [N].
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

pub struct Source {
    checkpoint: Checkpoint,
    shard: Shard,
    /// Rows of the tables that are kept.
    pub vocab: usize,
    /// The files that say how the model speaks.
    pub text_files: BTreeMap<String, Vec<u8>>,
}

/// Stems of a layer's tensors in both kinds of file.
const Q_K_V: [[&str; 2]; 3] = [
    ["self_attn.q_proj", "attn_q"],
    ["self_attn.k_proj", "attn_k"],
    ["self_attn.v_proj", "attn_v"],
];
const GATE_UP: [[&str; 2]; 2] = [["mlp.gate_proj", "ffn_gate"], ["mlp.up_proj", "ffn_up"]];
const OUT: [&str; 2] = ["self_attn.o_proj", "attn_output"];
const DOWN: [&str; 2] = ["mlp.down_proj", "ffn_down"];
const INPUT_NORM: [&str; 2] = ["input_layernorm", "attn_norm"];
const POST_NORM: [&str; 2] = ["post_attention_layernorm", "ffn_norm"];
const Q_NORM: [&str; 2] = ["self_attn.q_norm", "attn_q_norm"];
const K_NORM: [&str; 2] = ["self_attn.k_norm", "attn_k_norm"];

type Each<'a> = &'a mut dyn FnMut(Tensor) -> Result<()>;

impl Source {
    /// Opens `path`, of whose tables the first `vocab` rows are kept.
    pub fn open(path: &Path, vocab: Option<usize>) -> Result<Self> {
        let checkpoint = Checkpoint::open(path)?;
        let family = checkpoint.config().family.name;
        if family == "qwen1" {
            return Err("original Qwen has names of its own, which are not written".into());
        }
        if checkpoint.config().experts.is_some() {
            return Err("mixtures of experts are not written".into());
        }
        let all = checkpoint.config().vocab;
        let vocab = vocab.unwrap_or(all);
        if vocab == 0 || vocab > all {
            return Err(format!("--vocab {vocab} of a table of {all} rows").into());
        }
        let shard = checkpoint.shard(0, 1)?;
        Ok(Self { checkpoint, shard, vocab, text_files: formats::text_files(path)? })
    }

    pub fn config(&self) -> &DecoderConfig {
        self.checkpoint.config()
    }

    /// Hands every tensor to `each`.
    pub fn read(&self, each: Each) -> Result<()> {
        let (model, shard) = (&self.checkpoint, &self.shard);
        let top = |stems: [&str; 2]| stems.map(str::to_owned);
        each(self.table(top(["model.embed_tokens", "token_embd"]), &model.embed(shard)?[0]))?;
        if !self.config().tied {
            each(self.table(top(["lm_head", "output"]), &model.lm_head(shard)?[0]))?;
        }
        each(vector(top(["model.norm", "output_norm"]), "weight", model.final_norm()?))?;
        (0..self.config().layers).try_for_each(|layer| self.layer(layer, each))
    }

    fn layer(&self, layer: usize, each: Each) -> Result<()> {
        let (model, shard) = (&self.checkpoint, &self.shard);
        let stems = |[folder, file]: [&str; 2]| {
            [format!("model.layers.{layer}.{folder}"), format!("blk.{layer}.{file}")]
        };
        let matrices = [
            (&Q_K_V[..], model.qkv(layer, shard)?),
            (&[OUT][..], model.attn_out(layer, shard)?),
            (&GATE_UP[..], model.gate_up(layer, FfnBlock::Dense, shard)?),
            (&[DOWN][..], model.down(layer, FfnBlock::Dense, shard)?),
        ];
        for (names, parts) in matrices {
            for (name, part) in names.iter().zip(parts) {
                each(matrix(Role::Matrix, stems(*name), &part, part.rows))?;
            }
        }
        if let Some(bias) = model.qkv_bias(layer, shard)? {
            let DecoderConfig { q_heads, kv_heads, head_dim, .. } = *self.config();
            let (q, k_v) = bias.split_at(q_heads * head_dim);
            let (k, v) = k_v.split_at(kv_heads * head_dim);
            for (name, bias) in Q_K_V.iter().zip([q, k, v]) {
                each(vector(stems(*name), "bias", bias.to_vec()))?;
            }
        }
        let norms = [
            (INPUT_NORM, Some(model.input_norm(layer)?)),
            (POST_NORM, Some(model.post_norm(layer)?)),
            (Q_NORM, model.q_norm(layer)?),
            (K_NORM, model.k_norm(layer)?),
        ];
        for (name, norm) in norms {
            if let Some(norm) = norm {
                each(vector(stems(name), "weight", norm))?;
            }
        }
        Ok(())
    }

    fn table(&self, stems: [String; 2], part: &WeightPart<'_>) -> Tensor {
        matrix(Role::Table, stems, part, self.vocab)
    }
}

/// The first `rows` rows of `part`.
fn matrix(role: Role, stems: [String; 2], part: &WeightPart<'_>, rows: usize) -> Tensor {
    let mut values = vec![0.0; rows * part.cols];
    for (n, row) in values.chunks_exact_mut(part.cols).enumerate() {
        part_row(part, n, row);
    }
    Tensor { role, stems, ending: "weight", shape: vec![rows, part.cols], values }
}

fn vector(stems: [String; 2], ending: &'static str, values: Vec<f32>) -> Tensor {
    Tensor { role: Role::Vector, stems, ending, shape: vec![values.len()], values }
}
