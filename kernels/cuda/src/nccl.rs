//! What ranks exchange by NCCL: sums of many bytes, and everything where devices do not reach each
//! other's memory. The order of its sums is its own: bits are equal on all ranks of a group and
//! repeat at equal shapes, but are not those of `peers`.

mod communicator;
mod library;

use super::{Cuda, Driver, Element, elementwise::bf16_vectors, peers::gather_fits};
use communicator::Part;
pub use communicator::{Communicator, NcclLimits, NcclPlace};
use kernels::{KernelError, Tensor, shape::ensure};
pub use library::{NCCL_LIBRARY, Nccl, UniqueId};
use std::iter;

/// Rows that are gathered at once: the library takes up to 2048 pieces, two for each rank and row.
const ROWS_AT_ONCE: usize = 64;

impl<D: Driver> Cuda<D> {
    /// x [T, H] = the sum of every rank's x. Every rank does the same.
    ///
    /// # Errors
    /// `KernelError::Shape` for other elements than bf16; [`Communicator`]'s; the driver's own.
    pub fn nccl_sum(
        &self,
        group: &mut Communicator<D>,
        x: &mut Tensor<Self>,
    ) -> Result<(), KernelError> {
        bf16_vectors("nccl_sum", &[x])?;
        if x.rows == 0 {
            return Ok(());
        }
        group.all_reduce(self.at(x), x.rows * x.cols, self.driver.stream()?)
    }

    /// x [T, H] of rank 0, in 32 bits, on every rank. Every rank does the same.
    ///
    /// # Errors
    /// `KernelError::Shape` for other elements; [`Communicator`]'s; the driver's own.
    pub fn nccl_share(
        &self,
        group: &mut Communicator<D>,
        x: &mut Tensor<Self>,
    ) -> Result<(), KernelError> {
        let exact = x.data.element() == Element::F32;
        ensure("nccl_share", exact, || "numbers are not of 32 bits".into())?;
        let (len, stream) = (x.rows * x.cols, self.driver.stream()?);
        let at = self.at(x);
        if group.rank() > 0 {
            return group.exchange(iter::once(Part::Receive { to: at, len, from: 0 }), stream);
        }
        group.exchange((1..group.ranks()).map(|to| Part::Send { from: at, len, to }), stream)
    }

    /// out [T, Σ cols] = every rank's x [T, cols_r] side by side, in f32; where not `to_all`, on
    /// rank 0 alone. Every rank does the same. Row by row, so that no room is needed to put
    /// columns in place: there are few rows.
    ///
    /// # Errors
    /// `KernelError::Shape` for rows that do not fit together; [`Communicator`]'s; the driver's.
    pub fn nccl_gather(
        &self,
        group: &mut Communicator<D>,
        out: &mut Tensor<Self>,
        x: &Tensor<Self>,
        cols: &[usize],
        to_all: bool,
    ) -> Result<(), KernelError> {
        let (rank, ranks) = (group.rank(), group.ranks());
        gather_fits("nccl_gather", (rank, ranks), (out, x), cols)?;
        let stream = self.driver.stream()?;
        let total: usize = cols.iter().sum();
        let place = |base: u64, elements: usize| base + (elements * Element::F32.bytes()) as u64;
        let (from, to) = (self.at(x), self.at(out));
        let receivers = if to_all { ranks } else { 1 };
        let of_row = |row: usize| {
            let sent = (0..receivers).map(move |to| Part::Send {
                from: place(from, row * cols[rank]),
                len: cols[rank],
                to,
            });
            let senders = if rank < receivers { ranks } else { 0 };
            let received = (0..senders).map(move |of| {
                let first: usize = cols[..of].iter().sum();
                Part::Receive { to: place(to, row * total + first), len: cols[of], from: of }
            });
            sent.chain(received)
        };
        for first in (0..x.rows).step_by(ROWS_AT_ONCE) {
            let rows = first..x.rows.min(first + ROWS_AT_ONCE);
            group.exchange(rows.flat_map(of_row), stream)?;
        }
        Ok(())
    }
}
