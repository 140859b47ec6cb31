//! The one forward pass of the Qwen family, on one rank of a tensor-parallel group.
//!
//! Families differ by what is there: biases (Qwen1, Qwen2), head norms (Qwen3), windows, experts,
//! the rows of the rope table. Every rank holds whole rows of every matrix and computes those
//! columns of its result; before the next product ranks gather the columns. No sum over K is ever
//! cut, so the numbers are the same, bit for bit, on any number of ranks. Devices that say so
//! (`Backend::join`) hold columns of the matrices that end half a layer instead, and sum.

mod feed_forward;
mod load;
mod scratch;

use crate::ModelError;
use collective::Collective;
use feed_forward::FeedForward;
use kernels::{AddNorm, Backend, Batch, Heads, Join, Rotation, Tensor};
pub use load::Loaded;
pub use scratch::{ExpertsShape, Scratch, ScratchShape, Width};

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
    shares: Shares,
    join: Join,
}

/// How many columns of each exchanged matrix every rank computes.
struct Shares {
    /// Of q D.
    attention: Vec<usize>,
    /// Of H.
    hidden: Vec<usize>,
    /// Of I.
    intermediate: Vec<usize>,
    /// Of an expert's I.
    expert: Vec<usize>,
    /// Of the shared expert's I.
    shared_expert: Vec<usize>,
    /// Of V.
    vocab: Vec<usize>,
}

/// One attention and one feed-forward block.
struct Layer<B: Backend> {
    /// [1, H]
    input_norm: Tensor<B>,
    /// [(q + 2 kv) D, H] of this rank's heads.
    qkv: B::Weight,
    /// [1, (q + 2 kv) D]
    qkv_bias: Option<Tensor<B>>,
    /// Query and key norms, [1, D] each.
    qk_norm: Option<(Tensor<B>, Tensor<B>)>,
    /// [H_local, q D] over the query heads of all ranks.
    attention_out: B::Weight,
    /// [1, H]
    post_norm: Tensor<B>,
    feed_forward: FeedForward<B>,
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
            layer.feed_forward(cx, self)?;
        }
        let Scratch { hidden, delta, .. } = &mut *cx.scratch;
        match self.join {
            Join::Gather => drop(delta.gather(cx.device, cx.group, &self.shares.hidden)?),
            Join::Sum => cx.group.all_reduce_sum(cx.device, &mut delta.local)?,
        }
        Ok(cx.device.add(hidden, delta.gathered())?)
    }

    /// hidden [T, H] takes up every rank's part of delta, and normed [T, H] = norm(hidden): what
    /// ends one half of a layer and begins the next.
    fn join_and_norm<C: Collective<B>>(
        &self,
        cx: &mut Context<'_, B, C>,
        weight: &Tensor<B>,
    ) -> Result<(), ModelError> {
        let (d, Scratch { hidden, normed, delta, .. }) = (cx.device, &mut *cx.scratch);
        let eps = self.norm_eps;
        match self.join {
            Join::Gather => {
                let delta = delta.gather(d, cx.group, &self.shares.hidden)?;
                Ok(d.add_rms_norm(normed, hidden, delta, weight, eps)?)
            }
            Join::Sum => {
                let then = AddNorm { x: hidden, out: normed, weight, eps };
                Ok(cx.group.all_reduce_add_norm(d, &mut delta.local, then)?)
            }
        }
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
        d.linear(&mut s.logits.local, &s.last_normed, head, None)?;
        // Rank 0 alone makes tokens of them.
        s.logits.gather_to_first(d, cx.group, &self.shares.vocab)
    }
}

impl<B: Backend> Layer<B> {
    /// This rank's part of delta [T, H] = attention(norm(hidden)), once hidden has taken up the
    /// delta before it.
    fn attend<C: Collective<B>>(
        &self,
        cx: &mut Context<'_, B, C>,
        index: usize,
        model: &Decoder<B>,
        batch: &Batch<B>,
    ) -> Result<(), ModelError> {
        let (norm, eps) = (&self.input_norm, model.norm_eps);
        match index {
            0 => cx.device.rms_norm(&mut cx.scratch.normed, &cx.scratch.hidden, norm, eps)?,
            _ => model.join_and_norm(cx, norm)?,
        }
        let (d, s, kv, heads) = (cx.device, &mut *cx.scratch, &mut cx.kv[index], model.heads);
        d.linear(&mut s.qkv, &s.normed, &self.qkv, self.qkv_bias.as_ref())?;
        let norm = self.qk_norm.as_ref().map(|(q, k)| (q, k, eps));
        let rotation = Rotation { norm, cos_sin: &model.cos_sin, heads };
        let out = &mut s.attention.local;
        d.rotate_and_attend(out, kv, &mut s.qkv, &rotation, batch, self.window)?;
        let attention = s.attention.gather(d, cx.group, &model.shares.attention)?;
        Ok(d.linear(&mut s.delta.local, attention, &self.attention_out, None)?)
    }

    /// As [`Self::attend`], of the feed-forward block.
    fn feed_forward<C: Collective<B>>(
        &self,
        cx: &mut Context<'_, B, C>,
        model: &Decoder<B>,
    ) -> Result<(), ModelError> {
        model.join_and_norm(cx, &self.post_norm)?;
        self.feed_forward.run(cx, model)
    }
}
