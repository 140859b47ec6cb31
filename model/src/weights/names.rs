//! What the tensors of a checkpoint are called.

/// Names of one family in one file format. Names of a layer follow `layer`, its number and a dot.
/// Matrices are named by their module, which `.weight` or the tensors of a quantised one follow.
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
    pub ffn: FfnNames,
    pub experts: ExpertNames,
    /// Rows of Q and K are stored in the order of an interleaved rotation.
    pub interleaved_rope: bool,
    /// Ends of names that carry nothing the forward pass needs.
    pub ignored: &'static [&'static str],
}

/// The matrices of a feed-forward block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FfnNames {
    /// [I, H].
    pub gate: &'static str,
    /// [I, H].
    pub up: &'static str,
    /// [H, I].
    pub down: &'static str,
}

/// A mixture of experts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ExpertNames {
    /// [E, H].
    pub router: &'static str,
    /// [1, H], or [H].
    pub shared_gate: &'static str,
    pub shared: FfnNames,
    /// What an expert's number and a dot follow, before the names of its matrices; `None` where the
    /// matrices of all experts are one tensor [E, N, K].
    pub folder: Option<&'static str>,
    pub each: FfnNames,
}

/// Stems that `.weight` and `.bias` are added to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Qkv {
    /// Q [q D, H], K and V [kv D, H].
    Separate([&'static str; 3]),
    /// [(q + 2 kv) D, H]: Q, K, V.
    Packed(&'static str),
}

/// Names in GGUF files of most families.
pub(crate) const GGUF: TensorNames = TensorNames {
    embed: "token_embd",
    final_norm: "output_norm.weight",
    lm_head: "output",
    layer: "blk.",
    input_norm: "attn_norm.weight",
    post_norm: "ffn_norm.weight",
    qkv: Qkv::Separate(["attn_q", "attn_k", "attn_v"]),
    q_norm: "attn_q_norm.weight",
    k_norm: "attn_k_norm.weight",
    attn_out: "attn_output",
    ffn: FfnNames { gate: "ffn_gate", up: "ffn_up", down: "ffn_down" },
    experts: ExpertNames {
        router: "ffn_gate_inp",
        shared_gate: "ffn_gate_inp_shexp",
        shared: FfnNames { gate: "ffn_gate_shexp", up: "ffn_up_shexp", down: "ffn_down_shexp" },
        folder: None,
        each: FfnNames { gate: "ffn_gate_exps", up: "ffn_up_exps", down: "ffn_down_exps" },
    },
    interleaved_rope: false,
    ignored: &["rope_freqs.weight"],
};

impl TensorNames {
    pub(crate) fn of_layer(&self, layer: usize, name: &str) -> String {
        format!("{}{layer}.{name}", self.layer)
    }
}
