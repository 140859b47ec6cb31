//! The memory that a forward pass works in: allocated once, so that a step allocates nothing.

use crate::ModelError;
use collective::Collective;
use kernels::{Backend, Heads, KernelError, Tensor};

/// Rows of logits computed together: bounds their memory whatever a step asks for.
const LOGIT_ROWS_MAX: usize = 64;

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
    /// [T, 2 I_local]
    pub(super) gate_up: Tensor<B>,
    /// [T, I]
    pub(super) activation: Gathered<B>,
    /// [R, H]
    pub(super) last: Tensor<B>,
    /// [R, H]
    pub(super) last_normed: Tensor<B>,
    /// [R, V], in f32.
    pub(super) logits: Gathered<B>,
    /// A copy of the logits, empty while the host reads the device's own.
    host_logits: Vec<f32>,
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
}

impl<B: Backend> Scratch<B> {
    /// For steps of up to `tokens_max` tokens.
    pub fn new(device: &B, shape: &ScratchShape) -> Result<Self, ModelError> {
        let (tokens, rows) = (shape.tokens_max, shape.logit_rows_max());
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
            gate_up: tensor(tokens, 2 * shape.intermediate.local)?,
            activation: gathered(shape.intermediate)?,
            last: tensor(rows, hidden)?,
            last_normed: tensor(rows, hidden)?,
            logits: Gathered::new(shape.vocab, exact)?,
            host_logits: Vec::new(),
        })
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
        for tensor in [&mut self.hidden, &mut self.normed, &mut self.qkv, &mut self.gate_up] {
            tensor.rows = tokens;
        }
        for gathered in [&mut self.attention, &mut self.delta, &mut self.activation] {
            gathered.set_rows(tokens);
        }
    }

    pub(super) fn set_logit_rows(&mut self, rows: usize) {
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
    /// On this rank.
    pub heads: Heads,
    /// q D.
    pub attention: Width,
    /// H.
    pub hidden: Width,
    /// I.
    pub intermediate: Width,
    /// V.
    pub vocab: Width,
}

impl ScratchShape {
    /// Rows of logits that fit at once.
    pub fn logit_rows_max(&self) -> usize {
        self.tokens_max.min(LOGIT_ROWS_MAX)
    }

    /// Elements that [`Scratch::new`] allocates.
    pub fn elements(&self) -> usize {
        let Self { tokens_max, heads, attention, hidden, intermediate, vocab } = *self;
        let each = 2 * hidden.whole
            + heads.qkv_cols()
            + 2 * intermediate.local
            + attention.kept()
            + hidden.kept()
            + intermediate.kept();
        let logits = self.logit_rows_max() * (2 * hidden.whole + vocab.kept());
        tokens_max.saturating_mul(each).saturating_add(logits)
    }
}
