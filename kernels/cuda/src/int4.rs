//! 4-bit weights in groups of columns (GPTQ, AWQ) in records (`skinny.rs`): which column takes
//! which place, and x in the same order.

mod pack;
mod part;
mod plan;

use super::{
    Array, Cuda, Driver, Element, Launch,
    linear::upload,
    skinny::{self, Extent, Numbers, Place, Records},
};
use kernels::{KernelError, PartShape, WeightPart};
use pack::Piece;
use part::{Columns, Source};
use plan::Plan;

const THREADS: u32 = 256;

/// A weight [N, K] in records.
pub(super) struct Int4<D: Driver> {
    /// [N, K], or [N, places] where columns are permuted.
    pub records: Records<D>,
    /// The column at each place, -1 for none, where columns are permuted.
    pub order: Option<Array<D>>,
}

impl<D: Driver> Int4<D> {
    /// Repacks `parts`, stacked by rows; `None` where the kernels cannot take them as they are.
    /// `pairs` as [`Extent`]'s.
    pub(super) fn new(
        device: &Cuda<D>,
        parts: &[WeightPart<'_>],
        pairs: usize,
    ) -> Result<Option<Self>, KernelError> {
        let shapes: Vec<PartShape> = parts.iter().map(WeightPart::shape).collect();
        let (Some(columns), Some(source)) = (Columns::of(&shapes), Source::of(parts)) else {
            return Ok(None);
        };
        let (driver, plan) = (&device.driver, Plan::of(&columns));
        let (rows, _) = PartShape::stacked(&shapes);
        let (numbers, extent) = plan.records((rows, columns.cols));
        let extent = Extent { pairs, ..extent };
        let records = upload::room(driver, numbers, extent)?;
        let piece = Piece::room(driver, &plan, &columns, extent)?;
        piece.fill(device, &source, &records.place(driver))?;
        Ok(Some(Self { records, order: plan.lead.is_none().then_some(piece.columns) }))
    }
}

/// As [`Int4`], of a layer's experts, one after another, in records that lie elsewhere.
pub(super) struct ExpertPacker<D: Driver> {
    plan: Plan,
    piece: Piece<D>,
}

impl<D: Driver> ExpertPacker<D> {
    /// For experts of that shape; `None` where the kernels cannot take them as they are.
    pub(super) fn room(
        driver: &D,
        stack: &[PartShape],
        extent: Extent,
    ) -> Result<Option<Self>, KernelError> {
        let Some(columns) = Columns::of(stack) else { return Ok(None) };
        let plan = Plan::of(&columns);
        if plan.lead.is_none() {
            return Ok(None);
        }
        let piece = Piece::room(driver, &plan, &columns, extent)?;
        Ok(Some(Self { plan, piece }))
    }

    pub(super) fn fill(
        &self,
        device: &Cuda<D>,
        parts: &[WeightPart<'_>],
        to: &Place,
    ) -> Result<(), KernelError> {
        let shapes: Vec<PartShape> = parts.iter().map(WeightPart::shape).collect();
        let is_alike = Columns::of(&shapes).is_some_and(|of| Plan::of(&of) == self.plan);
        let Some(source) = Source::of(parts).filter(|_| is_alike) else {
            let why = "an expert is not stored as integers in the groups that were announced";
            return Err(KernelError::Weight(why.into()));
        };
        self.piece.fill(device, &source, to)
    }
}

/// What the records of a stack hold, and whether its columns are permuted; `None` where the kernels
/// cannot take it.
pub(super) fn records(stack: &[PartShape]) -> Option<(Numbers, Extent, bool)> {
    let plan = Plan::of(&Columns::of(stack)?);
    let (numbers, extent) = plan.records(PartShape::stacked(stack));
    Some((numbers, extent, plan.lead.is_none()))
}

/// Bytes that the device holds of a stack; `None` as for [`records`].
pub(super) fn bytes(stack: &[PartShape]) -> Option<usize> {
    let (numbers, extent, is_permuted) = records(stack)?;
    let order = if is_permuted { order_bytes(extent) } else { 0 };
    Some(skinny::bytes(numbers, extent) + order)
}

/// On the device, -1 for none.
fn indices<D: Driver>(
    driver: &D,
    what: &'static str,
    of: &[Option<usize>],
) -> Result<Array<D>, KernelError> {
    let index = |at: &Option<usize>| at.map_or(-1, |at| at as i32).to_le_bytes();
    let bytes: Vec<u8> = of.iter().flat_map(index).collect();
    let array = Array::zeroed(driver, what, bytes.len())?;
    array.write(driver, &bytes)?;
    Ok(array)
}

/// The column at each place.
fn order_bytes(extent: Extent) -> usize {
    extent.cols * size_of::<i32>()
}

impl Plan {
    /// What records of so many rows and columns hold.
    fn records(&self, (rows, cols): (usize, usize)) -> (Numbers, Extent) {
        let extent = match self.lead {
            Some(lead) => Extent { lead, ..Extent::plain((rows, cols)) },
            None => Extent::plain((rows, self.columns.len())),
        };
        (Numbers::Int4 { group: self.unit }, extent)
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct GatherArgs {
    out: u64,
    x: u64,
    order: u64,
    cols: u32,
    places: u32,
}

impl<D: Driver> Cuda<D> {
    /// Columns of x [rows, cols] by place, at `to`.
    pub(super) fn gather_columns(
        &self,
        to: u64,
        (x, rows, cols): (u64, usize, usize),
        weight: &Int4<D>,
        order: &Array<D>,
    ) -> Result<(), KernelError> {
        let places = weight.records.extent().cols;
        // Grids have at most 65535 rows.
        for first in (0..rows).step_by(65535) {
            let count = (rows - first).min(65535);
            let row_bytes = |cols: usize| (first * cols * Element::Bf16.bytes()) as u64;
            let args = GatherArgs {
                out: to + row_bytes(places),
                x: x + row_bytes(cols),
                order: order.address(&self.driver),
                cols: cols as u32,
                places: places as u32,
            };
            let grid = [(places as u32).div_ceil(THREADS), count as u32, 1];
            self.driver.launch(Launch::new("int4_gather_columns", grid, THREADS, &args))?;
        }
        Ok(())
    }
}
