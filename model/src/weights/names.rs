//! What the tensors of a checkpoint are called.

/// Names of one family in one file format. Names of a layer follow `layer`, its number and a dot.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TensorNames {
    /// [V, H].
    pub embed: &'static str,
    /// [H].
    pub final_norm: &'static str,
    /// [V, H]; unused where the model is tied.
    pub lm_head: &'static str,
    pub layer: &'static str,
    /// [H].
    pub input_norm: &'static str,
    /// [H].
    pub post_norm: &'static str,
    pub qkv: Qkv,
    /// [D].
    pub q_norm: &'static str,
    /// [D].
    pub k_norm: &'static str,
    /// [H, q D].
    pub attn_out: &'static str,
    /// [I, H].
    pub gate: &'static str,
    /// [I, H].
    pub up: &'static str,
    /// [H, I].
    pub down: &'static str,
    /// Rows of Q and K are stored in the order of an interleaved rotation.
    pub interleaved_rope: bool,
    /// Ends of names that carry nothing the forward pass needs.
    pub ignored: &'static [&'static str],
}

/// Stems that `.weight` and `.bias` are added to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Qkv {
    /// Q [q D, H], K and V [kv D, H].
    Separate([&'static str; 3]),
    /// [(q + 2 kv) D, H]: Q, K, V.
    Packed(&'static str),
}

/// The embedding table in GGUF files.
pub(crate) const GGUF_EMBED: &str = "token_embd.weight";

const GGUF: TensorNames = TensorNames {
    embed: GGUF_EMBED,
    final_norm: "output_norm.weight",
    lm_head: "output.weight",
    layer: "blk.",
    input_norm: "attn_norm.weight",
    post_norm: "ffn_norm.weight",
    qkv: Qkv::Separate(["attn_q", "attn_k", "attn_v"]),
    q_norm: "attn_q_norm.weight",
    k_norm: "attn_k_norm.weight",
    attn_out: "attn_output.weight",
    gate: "ffn_gate.weight",
    up: "ffn_up.weight",
    down: "ffn_down.weight",
    interleaved_rope: false,
    ignored: &["rope_freqs.weight"],
};

impl TensorNames {
    /// Names in GGUF files.
    pub(super) fn gguf(family: &str) -> Self {
        match family {
            "qwen1" => Self { qkv: Qkv::Packed("attn_qkv"), ..GGUF },
            "llama" => Self { interleaved_rope: true, ..GGUF },
            _ => GGUF,
        }
    }

    /// Names in Hugging Face checkpoints.
    pub(super) fn hugging_face(family: &str) -> Self {
        match family {
            "qwen1" => crate::qwen1::NAMES,
            _ => crate::qwen2::NAMES,
        }
    }

    pub(super) fn of_layer(&self, layer: usize, name: &str) -> String {
        format!("{}{layer}.{name}", self.layer)
    }
}
