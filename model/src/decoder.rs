//! The one forward pass of the Qwen family, on one rank of a tensor-parallel group.
//!
//! Families differ by what is there: biases (Qwen1, Qwen2), head norms (Qwen3), windows, the rows
//! of the rope table. Every rank holds whole rows of the embedding and the output matrix, whole
//! attention heads and a share of the feed-forward columns, so the sum of the embeddings, two sums
//! a layer and the logits are all that is exchanged.

mod load;

use crate::ModelError;
use kernels::{Backend, Batch, Heads, Tensor, collective::Collective};

/// Rows of logits computed together: bounds their memory whatever a step asks for.
pub const LOGIT_ROWS_MAX: usize = 64;

/// This rank's part of a model.
pub struct Decoder<B: Backend> {
    /// [V_local, H]; also the output matrix where `lm_head` is `None`.
    embedding: B::Weight,
    /// The id of the embedding's first row here.
    first_id: usize,
    layers: Vec<Layer<B>>,
    /// [1, H]
    final_norm: Tensor<B>,
    /// [V_local, H]
    lm_head: Option<B::Weight>,
    /// [P, D]
    cos_sin: Tensor<B>,
    heads: Heads,
    norm_eps: f32,
    /// Rows of the vocabulary on each rank.
    vocab_shares: Vec<usize>,
}

/// One attention and one feed-forward block.
struct Layer<B: Backend> {
    /// [1, H]
    input_norm: Tensor<B>,
    /// [(q + 2 kv) D, H]
    qkv: B::Weight,
    /// [1, (q + 2 kv) D]
    qkv_bias: Option<Tensor<B>>,
    /// Query and key norms, [1, D] each.
    qk_norm: Option<(Tensor<B>, Tensor<B>)>,
    /// [H, q D]
    attention_out: B::Weight,
    /// [1, H]
    post_norm: Tensor<B>,
    /// [2 I, H]: gate, then up.
    gate_up: B::Weight,
    /// [H, I]
    down: B::Weight,
    window: Option<usize>,
}

/// What a forward pass works on beside the model.
pub struct Context<'a, B: Backend, C: Collective<B>> {
    pub device: &'a B,
    pub group: &'a mut C,
    /// One for each layer.
    pub kv: &'a mut [B::Kv],
    pub scratch: &'a mut Scratch<B>,
}

/// Every intermediate result, allocated once; a step only changes `rows`.
pub struct Scratch<B: Backend> {
    /// [T, H], the residual stream.
    hidden: Tensor<B>,
    /// [T, H]
    normed: Tensor<B>,
    /// [T, (q + 2 kv) D]
    qkv: Tensor<B>,
    /// [T, q D]
    attention: Tensor<B>,
    /// [T, H]: what a block adds to the residual stream.
    delta: Tensor<B>,
    /// [T, 2 I]
    gate_up: Tensor<B>,
    /// [T, I]
    activation: Tensor<B>,
    /// [R, H]
    last: Tensor<B>,
    /// [R, H]
    last_normed: Tensor<B>,
    /// [R, V_local]
    local_logits: Tensor<B>,
    /// [R, V]; `None` where one rank has them all.
    logits: Option<Tensor<B>>,
    /// A copy of the logits, empty while the host reads the device's own.
    host_logits: Vec<f32>,
}

impl<B: Backend> Scratch<B> {
    /// For steps of up to `tokens_max` tokens.
    pub fn new(device: &B, shape: &ScratchShape) -> Result<Self, ModelError> {
        let (tokens, rows) = (shape.tokens_max, shape.logit_rows_max());
        let tensor = |rows, cols| Tensor::zeros(device, rows, cols);
        let gathered = shape.local_vocab < shape.vocab;
        Ok(Self {
            hidden: tensor(tokens, shape.hidden)?,
            normed: tensor(tokens, shape.hidden)?,
            qkv: tensor(tokens, shape.heads.qkv_cols())?,
            attention: tensor(tokens, shape.heads.q * shape.heads.dim)?,
            delta: tensor(tokens, shape.hidden)?,
            gate_up: tensor(tokens, 2 * shape.intermediate)?,
            activation: tensor(tokens, shape.intermediate)?,
            last: tensor(rows, shape.hidden)?,
            last_normed: tensor(rows, shape.hidden)?,
            local_logits: tensor(rows, shape.local_vocab)?,
            logits: if gathered { Some(tensor(rows, shape.vocab)?) } else { None },
            host_logits: Vec::new(),
        })
    }

    /// The logits [R, V] that [`Decoder::logits`] left, copied only where the host cannot read them
    /// in place.
    pub fn read_logits(&mut self, device: &B) -> Result<&[f32], ModelError> {
        let logits = self.logits.as_mut().unwrap_or(&mut self.local_logits);
        let len = logits.rows * logits.cols;
        if device.host_floats(&mut logits.data).is_none() {
            self.host_logits.resize(logits.rows_max * logits.cols, 0.0);
            device.read_floats(&mut self.host_logits[..len], &logits.data)?;
        }
        let in_place = device.host_floats(&mut logits.data);
        Ok(&in_place.map_or(&self.host_logits[..], |values| &*values)[..len])
    }

    fn set_tokens(&mut self, tokens: usize) {
        for tensor in [
            &mut self.hidden,
            &mut self.normed,
            &mut self.qkv,
            &mut self.attention,
            &mut self.delta,
            &mut self.gate_up,
            &mut self.activation,
        ] {
            tensor.rows = tokens;
        }
    }

    fn set_logit_rows(&mut self, rows: usize) {
        for tensor in [&mut self.last, &mut self.last_normed, &mut self.local_logits] {
            tensor.rows = rows;
        }
        if let Some(logits) = &mut self.logits {
            logits.rows = rows;
        }
    }
}

/// The widths that [`Scratch`] is made from.
#[derive(Clone, Debug)]
pub struct ScratchShape {
    pub tokens_max: usize,
    pub hidden: usize,
    pub heads: Heads,
    /// Feed-forward columns on this rank.
    pub intermediate: usize,
    pub vocab: usize,
    /// Rows of the vocabulary on this rank.
    pub local_vocab: usize,
}

impl ScratchShape {
    /// Rows of logits that fit at once.
    pub fn logit_rows_max(&self) -> usize {
        self.tokens_max.min(LOGIT_ROWS_MAX)
    }

    /// Elements that [`Scratch::new`] allocates.
    pub fn elements(&self) -> usize {
        let heads = self.heads;
        let each = 3 * self.hidden + heads.qkv_cols() + heads.q * heads.dim + 3 * self.intermediate;
        let gathered = if self.local_vocab < self.vocab { self.vocab } else { 0 };
        let each_logit_row = 2 * self.hidden + self.local_vocab + gathered;
        let logits = self.logit_rows_max() * each_logit_row;
        self.tokens_max.saturating_mul(each).saturating_add(logits)
    }
}

impl<B: Backend> Decoder<B> {
    /// hidden [T, H] of every token in `batch`, its K and V in the cache.
    pub fn forward<C: Collective<B>>(
        &self,
        cx: &mut Context<'_, B, C>,
        batch: &Batch<B>,
    ) -> Result<(), ModelError> {
        cx.scratch.set_tokens(batch.tokens);
        let hidden = &mut cx.scratch.hidden;
        cx.device.embed(hidden, &self.embedding, self.first_id, batch)?;
        cx.group.all_reduce_sum(cx.device, hidden)?;
        for (index, layer) in self.layers.iter().enumerate() {
            layer.attend(cx, index, self, batch)?;
            layer.feed_forward(cx, self.norm_eps)?;
        }
        Ok(())
    }

    /// Logits [len, V] of the batch's wanted rows `first..first + len`, after [`Self::forward`].
    pub fn logits<C: Collective<B>>(
        &self,
        cx: &mut Context<'_, B, C>,
        batch: &Batch<B>,
        first: usize,
        len: usize,
    ) -> Result<(), ModelError> {
        let (d, s) = (cx.device, &mut *cx.scratch);
        s.set_logit_rows(len);
        d.gather_rows(&mut s.last, &s.hidden, batch, first, len)?;
        d.rms_norm(&mut s.last_normed, &s.last, &self.final_norm, self.norm_eps)?;
        let head = self.lm_head.as_ref().unwrap_or(&self.embedding);
        d.linear(&mut s.local_logits, &s.last_normed, head, None)?;
        if let Some(logits) = &mut s.logits {
            cx.group.all_gather_cols(d, logits, &s.local_logits, &self.vocab_shares)?;
        }
        Ok(())
    }
}

impl<B: Backend> Layer<B> {
    /// hidden [T, H] in place: x + attention(norm(x)).
    fn attend<C: Collective<B>>(
        &self,
        cx: &mut Context<'_, B, C>,
        index: usize,
        model: &Decoder<B>,
        batch: &Batch<B>,
    ) -> Result<(), ModelError> {
        let (d, s, kv, heads) = (cx.device, &mut *cx.scratch, &mut cx.kv[index], model.heads);
        d.rms_norm(&mut s.normed, &s.hidden, &self.input_norm, model.norm_eps)?;
        d.linear(&mut s.qkv, &s.normed, &self.qkv, self.qkv_bias.as_ref())?;
        if let Some((q, k)) = &self.qk_norm {
            d.qk_norm(&mut s.qkv, q, k, model.norm_eps, heads)?;
        }
        d.rope(&mut s.qkv, &model.cos_sin, batch, heads)?;
        d.store_kv(kv, &s.qkv, batch, heads)?;
        d.attention(&mut s.attention, &s.qkv, kv, batch, heads, self.window)?;
        d.linear(&mut s.delta, &s.attention, &self.attention_out, None)?;
        cx.group.all_reduce_sum(d, &mut s.delta)?;
        d.add(&mut s.hidden, &s.delta)?;
        Ok(())
    }

    /// hidden [T, H] in place: x + down(silu(gate(norm(x))) · up(norm(x))).
    fn feed_forward<C: Collective<B>>(
        &self,
        cx: &mut Context<'_, B, C>,
        norm_eps: f32,
    ) -> Result<(), ModelError> {
        let (d, s) = (cx.device, &mut *cx.scratch);
        d.rms_norm(&mut s.normed, &s.hidden, &self.post_norm, norm_eps)?;
        d.linear(&mut s.gate_up, &s.normed, &self.gate_up, None)?;
        d.silu_mul(&mut s.activation, &s.gate_up)?;
        d.linear(&mut s.delta, &s.activation, &self.down, None)?;
        cx.group.all_reduce_sum(d, &mut s.delta)?;
        d.add(&mut s.hidden, &s.delta)?;
        Ok(())
    }
}
