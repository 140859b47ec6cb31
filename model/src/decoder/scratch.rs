//! The memory that a forward pass works in: allocated once, so that a step allocates nothing.

use crate::{ModelError, elements::Elements};
use collective::Collective;
use kernels::{Backend, Heads, KernelError, Routes, Routing, Tensor};

/// Every intermediate result; a step only changes `rows`.
pub struct Scratch<B: Backend> {
    /// [T, H], the residual stream.
    pub(super) hidden: Tensor<B>,
    /// [T, H]
    pub(super) normed: Tensor<B>,
    /// [T, (q + 2 kv) D] of this rank's heads.
    pub(super) qkv: Tensor<B>,
    /// [T, q D]
    pub(super) attention: Gathered<B>,
    /// [T, H]: what a block adds to the residual stream.
    pub(super) delta: Gathered<B>,
    /// Of layers without experts.
    pub(super) ffn: FfnScratch<B>,
    pub(super) experts: Option<ExpertsScratch<B>>,
    /// [R, H]
    pub(super) last: Tensor<B>,
    /// [R, H]
    pub(super) last_normed: Tensor<B>,
    /// [R, V], in f32.
    pub(super) logits: Gathered<B>,
    /// A copy of the logits, empty while the host reads the device's own.
    host_logits: Vec<f32>,
}

/// Inside a feed-forward block.
pub(super) struct FfnScratch<B: Backend> {
    /// [T, 2 I_local]
    pub gate_up: Tensor<B>,
    /// [T, I]
    pub activation: Gathered<B>,
}

impl<B: Backend> FfnScratch<B> {
    fn new(device: &B, rows: usize, width: Width) -> Result<Self, KernelError> {
        Ok(Self {
            gate_up: Tensor::zeros(device, rows, 2 * width.local)?,
            activation: Gathered::new(width, |cols| Tensor::zeros(device, rows, cols))?,
        })
    }

    fn set_rows(&mut self, rows: usize) {
        self.gate_up.rows = rows;
        self.activation.set_rows(rows);
    }
}

/// Inside a mixture of experts.
pub(super) struct ExpertsScratch<B: Backend> {
    /// [T, E], and the shared expert's gate; in f32.
    pub logits: Tensor<B>,
    pub routes: Routes<B>,
    /// [T k, ...] by place.
    pub ffn: FfnScratch<B>,
    /// [T k, H_local] by place.
    pub out: Tensor<B>,
    /// The shared expert's, with its result [T, H_local].
    pub shared: Option<(FfnScratch<B>, Tensor<B>)>,
}

impl<B: Backend> ExpertsScratch<B> {
    fn new(
        device: &B,
        tokens: usize,
        hidden: usize,
        shape: &ExpertsShape,
    ) -> Result<Self, KernelError> {
        let pairs = tokens * shape.routing.per_token;
        let shared = match shape.shared {
            Some(width) => {
                let out = Tensor::zeros(device, tokens, hidden)?;
                Some((FfnScratch::new(device, tokens, width)?, out))
            }
            None => None,
        };
        Ok(Self {
            logits: Tensor::exact_zeros(device, tokens, shape.routing.logits())?,
            routes: Routes::new(device, shape.routing, tokens)?,
            ffn: FfnScratch::new(device, pairs, shape.expert)?,
            out: Tensor::zeros(device, pairs, hidden)?,
            shared,
        })
    }

    fn set_tokens(&mut self, tokens: usize) {
        self.logits.rows = tokens;
        self.routes.weights.rows = tokens;
        let pairs = self.routes.pairs();
        self.ffn.set_rows(pairs);
        self.out.rows = pairs;
        if let Some((ffn, out)) = &mut self.shared {
            ffn.set_rows(tokens);
            out.rows = tokens;
        }
    }
}

/// A matrix whose columns are computed by several ranks.
pub(super) struct Gathered<B: Backend> {
    /// This rank's columns.
    pub local: Tensor<B>,
    /// Every rank's; `None` where one rank has them all.
    whole: Option<Tensor<B>>,
}

impl<B: Backend> Gathered<B> {
    fn new(
        width: Width,
        tensor: impl Fn(usize) -> Result<Tensor<B>, KernelError>,
    ) -> Result<Self, KernelError> {
        let whole = width.is_split().then(|| tensor(width.whole)).transpose()?;
        Ok(Self { local: tensor(width.local)?, whole })
    }

    /// All columns, as the last `gather` left them.
    pub fn gathered(&self) -> &Tensor<B> {
        self.whole.as_ref().unwrap_or(&self.local)
    }

    fn set_rows(&mut self, rows: usize) {
        self.local.rows = rows;
        if let Some(whole) = &mut self.whole {
            whole.rows = rows;
        }
    }

    /// All columns; `cols[r]` of them are rank r's. Nothing is copied where one rank has them all.
    pub fn gather<C: Collective<B>>(
        &mut self,
        device: &B,
        group: &mut C,
        cols: &[usize],
    ) -> Result<&Tensor<B>, ModelError> {
        let Some(whole) = &mut self.whole else { return Ok(&self.local) };
        group.all_gather_cols(device, whole, &self.local, cols)?;
        Ok(whole)
    }

    /// As [`Self::gather`], where rank 0 alone needs them.
    pub fn gather_to_first<C: Collective<B>>(
        &mut self,
        device: &B,
        group: &mut C,
        cols: &[usize],
    ) -> Result<(), ModelError> {
        let Some(whole) = &mut self.whole else { return Ok(()) };
        Ok(group.gather_cols(device, whole, &self.local, cols)?)
    }
}

impl<B: Backend> Scratch<B> {
    /// For steps of up to `tokens_max` tokens.
    pub fn new(device: &B, shape: &ScratchShape) -> Result<Self, ModelError> {
        let (tokens, rows) = (shape.tokens_max, shape.logit_rows_max);
        let hidden = shape.hidden.whole;
        let tensor = |rows, cols| Tensor::zeros(device, rows, cols);
        let gathered = |width| Gathered::new(width, |cols| tensor(tokens, cols));
        let exact = |cols| Tensor::exact_zeros(device, rows, cols);
        Ok(Self {
            hidden: tensor(tokens, hidden)?,
            normed: tensor(tokens, hidden)?,
            qkv: tensor(tokens, shape.heads.qkv_cols())?,
            attention: gathered(shape.attention)?,
            delta: gathered(shape.hidden)?,
            ffn: FfnScratch::new(device, tokens, shape.intermediate)?,
            experts: match &shape.experts {
                Some(experts) => {
                    let hidden = shape.hidden.local;
                    Some(ExpertsScratch::new(device, tokens, hidden, experts)?)
                }
                None => None,
            },
            last: tensor(rows, hidden)?,
            last_normed: tensor(rows, hidden)?,
            logits: Gathered::new(shape.vocab, exact)?,
            host_logits: Vec::new(),
        })
    }

    /// H.
    pub fn hidden_cols(&self) -> usize {
        self.hidden.cols
    }

    /// The logits [R, V] that [`super::Decoder::logits`] left.
    pub fn logits_mut(&mut self) -> &mut Tensor<B> {
        self.logits.whole.as_mut().unwrap_or(&mut self.logits.local)
    }

    /// The logits [R, V] that [`super::Decoder::logits`] left, copied only where the host cannot
    /// read them in place.
    pub fn read_logits(&mut self, device: &B) -> Result<&[f32], ModelError> {
        let logits = self.logits.gathered();
        let len = logits.rows * logits.cols;
        if let Some(values) = device.host_view(&logits.data) {
            return Ok(&values[..len]);
        }
        self.host_logits.resize(logits.rows_max * logits.cols, 0.0);
        device.read_floats(&mut self.host_logits[..len], &logits.data)?;
        Ok(&self.host_logits[..len])
    }

    pub(super) fn set_tokens(&mut self, tokens: usize) {
        for tensor in [&mut self.hidden, &mut self.normed, &mut self.qkv] {
            tensor.rows = tokens;
        }
        self.attention.set_rows(tokens);
        self.delta.set_rows(tokens);
        self.ffn.set_rows(tokens);
        if let Some(experts) = &mut self.experts {
            experts.set_tokens(tokens);
        }
    }

    pub fn set_logit_rows(&mut self, rows: usize) {
        self.last.rows = rows;
        self.last_normed.rows = rows;
        self.logits.set_rows(rows);
    }
}

/// How many columns of a matrix there are, and how many of them this rank computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Width {
    pub local: usize,
    pub whole: usize,
}

impl Width {
    fn is_split(self) -> bool {
        self.local < self.whole
    }

    /// Columns that a rank keeps.
    fn kept(self) -> usize {
        self.local + if self.is_split() { self.whole } else { 0 }
    }
}

/// The widths that [`Scratch`] is made from.
#[derive(Clone, Debug)]
pub struct ScratchShape {
    pub tokens_max: usize,
    /// Rows of logits at once.
    pub logit_rows_max: usize,
    /// On this rank.
    pub heads: Heads,
    /// q D.
    pub attention: Width,
    /// H.
    pub hidden: Width,
    /// I; 0 where every layer has experts.
    pub intermediate: Width,
    pub experts: Option<ExpertsShape>,
    /// V.
    pub vocab: Width,
}

/// The widths of a mixture of experts.
#[derive(Clone, Debug)]
pub struct ExpertsShape {
    pub routing: Routing,
    /// I of each expert.
    pub expert: Width,
    /// I of the shared expert.
    pub shared: Option<Width>,
}

impl ExpertsShape {
    /// What [`ExpertsScratch`] and [`Routes`] allocate for each token.
    fn of_token(&self, hidden: usize) -> Elements {
        let ffn = |width: Width| Elements::floats(2 * width.local + width.kept() + hidden);
        let Routing { per_token, .. } = self.routing;
        let pair = ffn(self.expert).and(Elements::ints(3));
        pair.times(per_token)
            .and(Elements::exact(self.routing.logits() + self.routing.weights()))
            .and(self.shared.map_or_else(Elements::default, ffn))
    }
}

impl ScratchShape {
    /// What [`Scratch::new`] allocates.
    pub fn elements(&self) -> Elements {
        let Self { tokens_max, heads, attention, hidden, intermediate, vocab, .. } = *self;
        let token = 2 * hidden.whole
            + heads.qkv_cols()
            + 2 * intermediate.local
            + attention.kept()
            + hidden.kept()
            + intermediate.kept();
        let experts = self.experts.as_ref();
        let of_token = experts.map_or_else(Elements::default, |e| e.of_token(hidden.local));
        let starts = experts.map_or(0, |experts| experts.routing.experts + 1);
        let row = Elements::floats(2 * hidden.whole).and(Elements::exact(vocab.kept()));
        let tokens = Elements::floats(token).and(of_token).times(tokens_max);
        tokens.and(row.times(self.logit_rows_max)).and(Elements::ints(starts))
    }
}
