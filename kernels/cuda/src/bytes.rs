//! What a device holds beside a model's matrices, tensors and KV cache, reckoned before it does.

use super::{CudaConfig, attention, driver::GEMM_WORKSPACE_BYTES, linear, sampling, step};
use kernels::{BatchRoom, PartShape};

/// The largest steps that a rank runs.
#[derive(Clone, Copy, Debug)]
pub struct StepShape {
    pub batch: BatchRoom,
    /// Rows and columns of the logits that the device chooses tokens from, where it does.
    pub sampled: Option<(usize, usize)>,
    /// Bytes that products want of the workspace: the most of [`CudaConfig::product_bytes`].
    pub products: usize,
}

impl CudaConfig {
    /// Bytes of the workspace that products of up to `tokens` rows with a stack of matrices want.
    /// `fp8_products` as the device's [`super::Facts::fp8_products`].
    pub fn product_bytes(&self, stack: &[PartShape], tokens: usize, fp8_products: bool) -> usize {
        linear::workspace_bytes(self.weights, stack, tokens, fp8_products)
    }

    /// Bytes that steps take at most: how attention is cut, the workspaces, room for choosing
    /// tokens. Some of it grows with what is asked of the rank.
    pub fn step_bytes(&self, step: &StepShape) -> u64 {
        let sums = attention::sums_bytes(&step.batch);
        // As the workspace grows.
        let workspace = match step.products.max(sums) {
            0 => 0,
            bytes => bytes.checked_next_power_of_two().unwrap_or(usize::MAX),
        };
        let cuts = step::cuts_bytes(&step.batch);
        let choosing = |(rows, vocab)| sampling::bytes(rows, vocab, vocab.min(step.batch.context));
        let choosing = step.sampled.map_or(0, choosing);
        let parts = [GEMM_WORKSPACE_BYTES, workspace, cuts, choosing, step::END_BYTES];
        parts.into_iter().fold(0, usize::saturating_add) as u64
    }
}
