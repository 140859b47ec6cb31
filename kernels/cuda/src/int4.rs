//! 4-bit weights in groups of columns (GPTQ, AWQ) in records (`skinny.rs`): which column takes
//! which place, and x in the same order.

mod pack;
mod part;
mod plan;

use super::{
    Array, Cuda, Driver, Element, Launch,
    linear::upload,
    random::{PARTS as RANDOM_PARTS, RandomRecords, random},
    skinny::{self, Extent, Numbers, Records},
};
use kernels::{KernelError, PartShape, WeightPart};
use part::{Columns, Int4Part};
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
        if parts.iter().all(|part| random(part).is_some()) {
            return Self::random(device, parts, pairs);
        }
        let driver = &device.driver;
        let Some(parts) = Int4Part::all(parts) else { return Ok(None) };
        let (rows, cols) = (parts.iter().map(|part| part.rows).sum::<usize>(), parts[0].cols);
        let plan = Plan::of(&parts[0].columns());
        let weight = Self::room(driver, &plan, (rows, cols), pairs)?;
        pack::records(device, &parts, &plan, &weight)?;
        Ok(Some(weight))
    }

    /// As [`Self::new`], of parts whose integers the device makes.
    fn random(
        device: &Cuda<D>,
        parts: &[WeightPart<'_>],
        pairs: usize,
    ) -> Result<Option<Self>, KernelError> {
        let shapes: Option<Vec<PartShape>> = parts.iter().map(part::random_shape).collect();
        let Some(shapes) = shapes.filter(|shapes| shapes.len() <= RANDOM_PARTS) else {
            return Ok(None);
        };
        let Some(columns) = Columns::of(&shapes) else { return Ok(None) };
        let plan = Plan::of(&columns);
        let rows = shapes.iter().map(|part| part.rows).sum();
        let weight = Self::room(&device.driver, &plan, (rows, columns.cols), pairs)?;
        let (values, extent) = (&weight.records.values, weight.records.extent());
        let records = RandomRecords {
            address: values.address(&device.driver),
            bytes: values.bytes(),
            cols: extent.cols,
            lead: extent.lead,
            records: extent.records(weight.records.numbers()),
            group: plan.unit,
            pairs: extent.pairs,
        };
        let seeds: Vec<_> =
            parts.iter().filter_map(|part| Some((random(part)?, part.rows))).collect();
        device.random_records(&records, &seeds)?;
        Ok(Some(weight))
    }

    /// Records of zeros, and the order of columns.
    fn room(
        driver: &D,
        plan: &Plan,
        shape: (usize, usize),
        pairs: usize,
    ) -> Result<Self, KernelError> {
        let (numbers, extent) = plan.records(shape);
        let extent = Extent { pairs, ..extent };
        let records = upload::room(driver, numbers, extent)?;
        let order = match plan.lead {
            Some(_) => None,
            None => Some(indices(driver, "an order of columns", &plan.columns)?),
        };
        Ok(Self { records, order })
    }
}

/// What the records of a stack hold, and whether its columns are permuted; `None` where the kernels
/// cannot take it.
pub(super) fn records(stack: &[PartShape]) -> Option<(Numbers, Extent, bool)> {
    let columns = Columns::of(stack)?;
    let plan = Plan::of(&columns);
    let rows = stack.iter().map(|part| part.rows).sum();
    let (numbers, extent) = plan.records((rows, columns.cols));
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
