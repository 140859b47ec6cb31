//! Which experts a step's tokens go to (mixtures of experts).
//!
//! A pair is a token with one of its experts: pair `t · k + j` is token t with the j-th of the k
//! experts chosen for it. Products run over the pairs of one expert after another's.

use crate::{Backend, KernelError, Tensor};

/// How a layer chooses experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Routing {
    /// E, at most [`EXPERTS_MAX`].
    pub experts: usize,
    /// Experts of one token, k: 1 to E, at most [`EXPERTS_PER_TOKEN_MAX`].
    pub per_token: usize,
    /// The weights of a token's experts are divided by their sum.
    pub normalise: bool,
    /// Beside the chosen experts there is one for every token, with a gate of its own.
    pub shared: bool,
}

/// E may not be above this.
pub const EXPERTS_MAX: usize = 1024;
/// k may not be above this.
pub const EXPERTS_PER_TOKEN_MAX: usize = 32;

impl Routing {
    /// Columns of the router's logits: one for each expert, and the shared expert's gate.
    pub fn logits(&self) -> usize {
        self.experts + usize::from(self.shared)
    }

    /// Columns of the weights: one for each chosen expert, and the shared expert's.
    pub fn weights(&self) -> usize {
        self.per_token + usize::from(self.shared)
    }
}

/// The experts of a step's tokens, as [`Backend::route`] chooses them. Allocated once.
pub struct Routes<B: Backend> {
    pub routing: Routing,
    /// [T, k], in f32: what each chosen expert's result counts, by falling weight; after them in
    /// column k the shared expert's, where there is one.
    pub weights: Tensor<B>,
    /// [T k] the expert of each pair.
    pub chosen: B::Ints,
    /// [T k] pairs, in the order of their experts and then of their numbers.
    pub pairs: B::Ints,
    /// [T k] where each pair lies in `pairs`.
    pub places: B::Ints,
    /// [E + 1] where each expert's pairs begin in `pairs`, then T k.
    pub starts: B::Ints,
}

impl<B: Backend> Routes<B> {
    /// For steps of up to `tokens_max` tokens.
    pub fn new(device: &B, routing: Routing, tokens_max: usize) -> Result<Self, KernelError> {
        let pairs = tokens_max * routing.per_token;
        Ok(Self {
            routing,
            weights: Tensor::exact_zeros(device, tokens_max, routing.weights())?,
            chosen: device.ints(pairs)?,
            pairs: device.ints(pairs)?,
            places: device.ints(pairs)?,
            starts: device.ints(routing.experts + 1)?,
        })
    }

    /// T.
    pub fn tokens(&self) -> usize {
        self.weights.rows
    }

    /// T k.
    pub fn pairs(&self) -> usize {
        self.tokens() * self.routing.per_token
    }
}

/// What the rows of an experts' product's x are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertRows {
    /// [T, K]: row t goes to every expert of token t.
    Tokens,
    /// [T k, K]: row i belongs to the pair at place i.
    Pairs,
}
