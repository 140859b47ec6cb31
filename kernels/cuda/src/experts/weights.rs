//! A matrix of each of a layer's experts, all in records of one format, one expert behind another.
//!
//! Formats are those of other weights (`linear.rs`): integers of 4 bits where all experts have such
//! in groups of consecutive columns, else bf16 or e4m3. Products want whole vectors of rows and
//! columns: there is no other kernel.

use crate::{
    Array, Cuda, Driver,
    elementwise::VECTOR,
    int4::ExpertPacker,
    linear::upload::Piece,
    skinny::{Bytes, Extent, Numbers, Place, countable},
};
use kernels::{KernelError, PartShape, WeightPart, shape};

/// A matrix [N, K] of each of a layer's experts.
pub struct CudaExperts<D: Driver> {
    /// [E, N, K]
    shape: [usize; 3],
    pushed: usize,
    numbers: Numbers,
    extent: Extent,
    /// [E][strips][records]
    values: Array<D>,
    /// [E, N] f32, of e4m3.
    scales: Option<Array<D>>,
    /// Until all are there.
    packer: Option<Packer<D>>,
}

/// What fills records.
enum Packer<D: Driver> {
    Int4(ExpertPacker<D>),
    Rounded(Piece<D>),
}

impl<D: Driver> CudaExperts<D> {
    /// Zeros. Rows of gate and up are to lie in turn `if_paired`, where outputs are whole vectors.
    pub(crate) fn room(
        device: &Cuda<D>,
        count: usize,
        stack: &[PartShape],
        if_paired: bool,
    ) -> Result<Self, KernelError> {
        let (rows, cols) = PartShape::stacked(stack);
        let whole = |len: usize| len > 0 && len.is_multiple_of(VECTOR);
        if !whole(rows) || !whole(cols) {
            return Err(KernelError::Weight(format!(
                "experts [{rows}, {cols}]: rows and columns are no multiples of {VECTOR}"
            )));
        }
        let (numbers, extent) = device.config.weights.expert_records(stack);
        let is_paired = if_paired && rows.is_multiple_of(2 * VECTOR);
        let extent = Extent { pairs: if is_paired { rows / 2 } else { 0 }, ..extent };
        countable("experts", extent)?;
        let driver = device.driver();
        let array = |what, bytes: usize| Array::zeroed(driver, what, bytes.saturating_mul(count));
        let bytes = Bytes::of(numbers, extent);
        let scales = match bytes.scales {
            0 => None,
            bytes => Some(array("experts' scales", bytes)?),
        };
        let values = array("experts", bytes.values)?;
        let packer = match ExpertPacker::room(driver, stack, extent)? {
            Some(packer) => Packer::Int4(packer),
            None => Packer::Rounded(Piece::room(driver, numbers, extent)?),
        };
        let (shape, packer) = ([count, rows, cols], Some(packer).filter(|_| count > 0));
        Ok(Self { shape, pushed: 0, numbers, extent, values, scales, packer })
    }

    pub(crate) fn push(
        &mut self,
        device: &Cuda<D>,
        parts: &[WeightPart<'_>],
    ) -> Result<(), KernelError> {
        let of_one = WeightPart::check(parts)?;
        shape::push_expert(self.shape, self.pushed, of_one)?;
        let to = self.place(device.driver(), self.pushed);
        match &self.packer {
            Some(Packer::Int4(packer)) => packer.fill(device, parts, &to)?,
            Some(Packer::Rounded(piece)) => piece.fill(device, parts, &to)?,
            // All are there, which was refused above.
            None => {}
        }
        self.pushed += 1;
        if self.pushed == self.shape[0] {
            self.packer = None;
        }
        Ok(())
    }

    /// E as far as they are there, N and K.
    pub(super) fn pushed_shape(&self) -> [usize; 3] {
        let [_, rows, cols] = self.shape;
        [self.pushed, rows, cols]
    }

    /// Whether rows of gate and up lie in turn.
    pub(super) fn are_paired(&self) -> bool {
        self.extent.pairs > 0
    }

    pub(super) fn first(&self, driver: &D) -> Place {
        self.place(driver, 0)
    }

    fn place(&self, driver: &D, expert: usize) -> Place {
        let (numbers, extent) = (self.numbers, self.extent);
        let bytes = Bytes::of(numbers, extent);
        Place {
            numbers,
            extent,
            values: self.values.address(driver) + (expert * bytes.values) as u64,
            scales: self
                .scales
                .as_ref()
                .map(|scales| scales.address(driver) + (expert * bytes.scales) as u64),
        }
    }
}
