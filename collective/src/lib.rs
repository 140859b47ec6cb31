#![forbid(unsafe_code)]
//! Exchange between the ranks of one group.
//!
//! Sums are taken in rank order on every rank, so that all ranks hold the same bits.

use kernels::{AddNorm, Backend, KernelError, Tensor};
use std::time::Duration;

mod cards;
mod staged;
mod tcp;
mod threads;

pub use cards::{Cards, CardsConfig};
pub use staged::Staged;
pub use tcp::{Beats, Cut, GroupId, Loss, Tcp, TcpDoor};
pub use threads::Threads;

/// Why an exchange failed. The group is unusable afterwards.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CollectiveError {
    #[error("rank {rank} did not take part in {op} within {seconds} s")]
    Deadline { op: &'static str, rank: usize, seconds: u64 },
    #[error("rank {rank} left the group")]
    Gone { rank: usize },
    #[error("ranks disagree: {0}")]
    Mismatch(String),
    #[error("device: {0}")]
    Device(String),
}

impl From<KernelError> for CollectiveError {
    fn from(error: KernelError) -> Self {
        Self::Device(error.to_string())
    }
}

/// Bytes and host floats between ranks. Every wait has a deadline. Implementations: threads, TCP.
pub trait HostCollective: Send + 'static {
    fn rank(&self) -> usize;
    fn world_size(&self) -> usize;
    /// Rank 0's bytes reach every rank. `deadline` bounds how long the others wait for it.
    fn broadcast(&mut self, bytes: &mut Vec<u8>, deadline: Duration)
    -> Result<(), CollectiveError>;
    /// all [rows, Σ cols] = every rank's floats [rows, cols_r] side by side, in rank order;
    /// `cols[r]` is rank r's width.
    fn all_gather_cols(
        &mut self,
        mine: &[f32],
        cols: &[usize],
        all: &mut [f32],
    ) -> Result<(), CollectiveError>;
    /// Element-wise sum over the ranks, added in rank order.
    fn all_reduce_sum(&mut self, values: &mut [f32]) -> Result<(), CollectiveError>;
    /// Every rank's bytes, in rank order.
    fn all_gather_bytes(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError>;
}

/// Device tensors between ranks.
pub trait Collective<B: Backend>: Send + 'static {
    fn rank(&self) -> usize;
    fn world_size(&self) -> usize;
    /// x = the sum of every rank's x.
    fn all_reduce_sum(&mut self, device: &B, x: &mut Tensor<B>) -> Result<(), CollectiveError>;
    /// `delta` = the sum of every rank's, then [`Backend::add_rms_norm`] of it.
    fn all_reduce_add_norm(
        &mut self,
        device: &B,
        delta: &mut Tensor<B>,
        then: AddNorm<'_, B>,
    ) -> Result<(), CollectiveError> {
        self.all_reduce_sum(device, delta)?;
        let AddNorm { x, out, weight, eps } = then;
        Ok(device.add_rms_norm(out, x, delta, weight, eps)?)
    }
    /// out [rows, Σ cols] = every rank's x [rows, cols_r] side by side, in rank order; `cols[r]` is
    /// rank r's width.
    fn all_gather_cols(
        &mut self,
        device: &B,
        out: &mut Tensor<B>,
        x: &Tensor<B>,
        cols: &[usize],
    ) -> Result<(), CollectiveError>;
    /// As [`Self::all_gather_cols`], where rank 0 alone needs the result; what the others have in
    /// `out` is undefined.
    fn gather_cols(
        &mut self,
        device: &B,
        out: &mut Tensor<B>,
        x: &Tensor<B>,
        cols: &[usize],
    ) -> Result<(), CollectiveError> {
        self.all_gather_cols(device, out, x, cols)
    }
    /// Whether exchanges of up to so many elements are launches on the device alone, which can be
    /// captured with a step's others.
    fn is_captured(&self, _elements: usize) -> bool {
        false
    }
    /// Rank 0's numbers of 32 bits reach every rank.
    fn share(&mut self, device: &B, x: &mut Tensor<B>) -> Result<(), CollectiveError>;
    /// A step's exchanges have been launched; [`Self::check`] is called later.
    fn end_step(&mut self, _device: &B) -> Result<(), CollectiveError> {
        Ok(())
    }
    /// Whether every exchange has come about up to the oldest [`Self::end_step`] that was not
    /// checked. Results are to be believed only then.
    fn check(&mut self, _device: &B) -> Result<(), CollectiveError> {
        Ok(())
    }
}

/// values = or += the share of `rank`, which must be as long.
fn take_share(
    values: &mut [f32],
    share: &[f32],
    rank: usize,
    replace: bool,
) -> Result<(), CollectiveError> {
    if share.len() != values.len() {
        let detail = format!("{} floats due, {} from rank {rank}", values.len(), share.len());
        return Err(CollectiveError::Mismatch(detail));
    }
    if replace {
        values.copy_from_slice(share);
    } else {
        values.iter_mut().zip(share).for_each(|(value, share)| *value += share);
    }
    Ok(())
}

/// The columns of `rank` in all [rows, Σ cols] = its share [rows, cols_rank].
fn take_cols(
    all: &mut [f32],
    share: &[f32],
    cols: &[usize],
    (rank, world_size): (usize, usize),
) -> Result<(), CollectiveError> {
    let total: usize = cols.iter().sum();
    let width = cols.get(rank).copied().unwrap_or(0);
    let rows = all.len() / total.max(1);
    if cols.len() != world_size || all.len() != rows * total || share.len() != rows * width {
        let (due, came) = (all.len(), share.len());
        let detail = format!("{came} floats from rank {rank} for {due} in columns {cols:?}");
        return Err(CollectiveError::Mismatch(detail));
    }
    let first: usize = cols[..rank].iter().sum();
    let rows = all.chunks_exact_mut(total.max(1)).zip(share.chunks_exact(width.max(1)));
    rows.for_each(|(row, share)| row[first..first + width].copy_from_slice(share));
    Ok(())
}
