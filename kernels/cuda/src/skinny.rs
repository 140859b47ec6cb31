//! Weights in records, and products with them that read each weight once. Kernels:
//! `skinny_linear.cuh`, `skinny_pack.cu`; the layout is that of `skinny.cuh`.
//!
//! A product takes up to 64 rows of x at a time, and a row's bits are the same in every batch. What
//! is multiplied by the device's own products is unpacked for them. Where rows of gate and up lie
//! in turn, what is written is silu(gate) · up, with the bits of the two ops.

mod experts;
mod pack;

use super::{Array, Cuda, Driver, Element, Facts, Floats, Launch};
pub(super) use experts::Pairs;
use kernels::{KernelError, shape::ensure};

/// Rows of a record.
pub(super) const STRIP: usize = 64;
/// Columns in which a weight is cut into parts.
const STEP_COLS: usize = 128;
const STRIPS: usize = 4;
/// Rows of W that a block multiplies.
const TILE: usize = STRIPS * STRIP;
/// Warps of a block that multiply.
const WARPS: usize = 8;
const THREADS: u32 = (WARPS as u32 + 1) * 32;
/// Bytes before the ring of stages.
const HEAD_BYTES: usize = 128;
const STAGES_MAX: usize = 8;
/// Fewer leave too little on its way to hide memory's latency: then fewer rows of x at a time.
const STAGES_MIN: usize = 4;
/// Rows of x that one launch takes. Bits do not depend on the choice.
const TOKEN_TILES: [usize; 4] = [8, 16, 32, 64];
/// Multiprocessors of the largest device. The same everywhere, so that bits are too.
const BLOCKS: usize = 132;
const PARTS_MAX: usize = 32;

/// What a weight in records consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Numbers {
    Bf16,
    /// With a scale for each row.
    E4m3,
    /// With an f16 scale and a zero point for each run of `group` columns: 32, 64 or 128.
    Int4 {
        group: usize,
    },
}

/// Kernels by format: products by rows of x, with one weight and by expert, and unpacking to bf16.
struct Kernels {
    products: [&'static str; 4],
    experts: [&'static str; 4],
    unpack: &'static str,
}

macro_rules! kernels {
    ($format:literal) => {
        Kernels {
            products: [
                concat!("skinny_linear_", $format, "_t8"),
                concat!("skinny_linear_", $format, "_t16"),
                concat!("skinny_linear_", $format, "_t32"),
                concat!("skinny_linear_", $format, "_t64"),
            ],
            experts: [
                concat!("expert_linear_", $format, "_t8"),
                concat!("expert_linear_", $format, "_t16"),
                concat!("expert_linear_", $format, "_t32"),
                concat!("expert_linear_", $format, "_t64"),
            ],
            unpack: concat!("skinny_unpack_", $format),
        }
    };
}

impl Numbers {
    /// Columns of a record.
    fn cols(self) -> usize {
        if self == Self::Bf16 { 64 } else { 128 }
    }

    pub(super) fn record_bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::E4m3 => 8192,
            Self::Int4 { group } => 4096 + 128 / group * STRIP * 4,
        }
    }

    fn kernels(self) -> Kernels {
        match self {
            Self::Bf16 => kernels!("bf16"),
            Self::E4m3 => kernels!("e4m3"),
            Self::Int4 { group: 32 } => kernels!("int4_g32"),
            Self::Int4 { group: 64 } => kernels!("int4_g64"),
            Self::Int4 { .. } => kernels!("int4_g128"),
        }
    }

    /// Shared memory of one stage.
    fn stage_bytes(self, token_tile: usize) -> usize {
        STRIPS * self.record_bytes() + token_tile * self.cols() * Element::Bf16.bytes()
    }

    /// Stages of a ring in so much shared memory.
    fn stages(self, token_tile: usize, room: usize) -> usize {
        (room.saturating_sub(HEAD_BYTES) / self.stage_bytes(token_tile)).min(STAGES_MAX)
    }

    /// Rows of x that a launch takes: the fewest that hold all, or as many as there is room for.
    fn token_tile(self, rows: usize, room: usize) -> usize {
        let tiles = || TOKEN_TILES.into_iter().filter(|t| self.stages(*t, room) >= STAGES_MIN);
        tiles().find(|tile| *tile >= rows).or_else(|| tiles().next_back()).unwrap_or(TOKEN_TILES[0])
    }
}

/// Which of a format's kernels takes so many rows of x.
fn kernel_of(token_tile: usize) -> usize {
    token_tile.ilog2() as usize - TOKEN_TILES[0].ilog2() as usize
}

/// Which columns of which rows records hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    /// N.
    pub rows: usize,
    /// K.
    pub cols: usize,
    /// Columns of zeros before the first.
    pub lead: usize,
    /// Where rows are gates, then as many ups, and lie in turn: how many of each, a multiple of 8;
    /// 0 where rows lie as they are.
    pub pairs: usize,
}

impl Extent {
    /// Rows that lie as they are, from the first column on.
    pub(super) fn plain((rows, cols): (usize, usize)) -> Self {
        Self { rows, cols, lead: 0, pairs: 0 }
    }

    /// The row of the matrix that lies at `row`.
    pub(super) fn row_of_matrix(self, row: usize) -> usize {
        if row < 2 * self.pairs { row % 2 * self.pairs + row / 2 } else { row }
    }

    /// Records of a strip.
    pub(super) fn records(self, numbers: Numbers) -> usize {
        (self.lead + self.cols).div_ceil(numbers.cols())
    }

    /// Columns of a product's result.
    fn out_cols(self) -> usize {
        if self.pairs > 0 { self.pairs } else { self.rows }
    }

    fn strips(self) -> usize {
        self.rows.div_ceil(STRIP)
    }

    fn tiles(self) -> usize {
        self.rows.div_ceil(TILE)
    }

    /// Runs of columns that are summed apart: by the weight's shape alone.
    fn parts(self) -> usize {
        let steps = (self.lead + self.cols).div_ceil(STEP_COLS);
        // What the block with the most to do has to do, in eighths of a step; a part costs some.
        let cost = |parts: &usize| {
            let units = (self.tiles() * parts).div_ceil(BLOCKS);
            units * (8 * steps.div_ceil(*parts) + 3)
        };
        (1..=steps.min(PARTS_MAX)).min_by_key(cost).unwrap_or(1)
    }
}

/// Bytes of a matrix's records and scales.
#[derive(Clone, Copy)]
pub(super) struct Bytes {
    pub values: usize,
    pub scales: usize,
}

impl Bytes {
    pub(super) fn of(numbers: Numbers, extent: Extent) -> Self {
        let records = extent.strips().saturating_mul(extent.records(numbers));
        Self {
            values: records.saturating_mul(numbers.record_bytes()),
            scales: if numbers == Numbers::E4m3 { extent.rows * size_of::<f32>() } else { 0 },
        }
    }

    pub(super) fn all(self) -> usize {
        self.values.saturating_add(self.scales)
    }
}

fn arrived_bytes(extent: Extent) -> usize {
    extent.tiles() * WARPS * size_of::<u32>()
}

/// Bytes that the device holds of a weight.
pub(super) fn bytes(numbers: Numbers, extent: Extent) -> usize {
    Bytes::of(numbers, extent).all() + arrived_bytes(extent)
}

/// Kernels count rows and columns in 31 bits.
pub(super) fn countable(op: &'static str, extent: Extent) -> Result<(), KernelError> {
    let most = i32::MAX as usize;
    let fits = extent.rows <= most - TILE && extent.lead + extent.cols <= most - STEP_COLS;
    Ok(ensure(op, fits, || format!("a weight [{}, {}]", extent.rows, extent.cols))?)
}

/// Where a matrix's records lie, by address.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub numbers: Numbers,
    pub extent: Extent,
    pub values: u64,
    /// [N] f32, of e4m3.
    pub scales: Option<u64>,
}

/// What a product of m rows needs of the workspace, on a device with shared memory for all kernels;
/// where there is less, fewer rows at a time need less.
pub(super) fn sums_bytes(extent: Extent, m: usize) -> usize {
    let tile = |rows| TOKEN_TILES.into_iter().find(|tile| *tile >= rows);
    let tokens = tile(m).unwrap_or(TOKEN_TILES[TOKEN_TILES.len() - 1]);
    match extent.parts() {
        1 => 0,
        parts => extent.tiles() * TILE * parts * tokens * Element::F32.bytes(),
    }
}

/// A weight [N, K] in records on the device.
pub(super) struct Records<D: Driver> {
    numbers: Numbers,
    extent: Extent,
    /// [strips][records]
    values: Array<D>,
    /// [N] f32, of e4m3.
    scales: Option<Array<D>>,
    /// A counter for each tile and warp, zero between launches.
    arrived: Array<D>,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct LinearArgs {
    weight: u64,
    x: u64,
    scales: u64,
    bias: u64,
    out: u64,
    sums: u64,
    arrived: u64,
    tokens: u32,
    rows: u32,
    cols: u32,
    lead: u32,
    records: u32,
    parts: u32,
    stages: u32,
    out_f32: u32,
    in_bulk: u32,
    pairs: u32,
}

impl Place {
    /// What a weight alone says of a product.
    fn args(&self, facts: &Facts) -> LinearArgs {
        let Extent { rows, cols, lead, pairs } = self.extent;
        LinearArgs {
            weight: self.values,
            scales: self.scales.unwrap_or(0),
            rows: rows as u32,
            cols: cols as u32,
            lead: lead as u32,
            records: self.extent.records(self.numbers) as u32,
            in_bulk: u32::from(facts.compute_capability.0 >= 9),
            pairs: pairs as u32,
            ..LinearArgs::default()
        }
    }
}

/// What a product with a weight in records takes beside it, by address.
#[derive(Clone, Copy)]
pub(super) struct Inputs {
    /// [m, K] in bf16.
    pub x: u64,
    pub m: usize,
    /// [N] in bf16.
    pub bias: Option<u64>,
    /// As many bytes as [`sums_bytes`] says.
    pub sums: u64,
}

impl<D: Driver> Records<D> {
    /// Zeros.
    pub(super) fn zeroed(
        driver: &D,
        numbers: Numbers,
        extent: Extent,
    ) -> Result<Self, KernelError> {
        countable("linear", extent)?;
        let bytes = Bytes::of(numbers, extent);
        let scales = match numbers {
            Numbers::E4m3 => Some(Array::zeroed(driver, "a weight's scales", bytes.scales)?),
            Numbers::Bf16 | Numbers::Int4 { .. } => None,
        };
        Ok(Self {
            numbers,
            extent,
            values: Array::zeroed(driver, "a weight", bytes.values)?,
            scales,
            arrived: Array::zeroed(driver, "counters", arrived_bytes(extent))?,
        })
    }

    pub(super) fn numbers(&self) -> Numbers {
        self.numbers
    }

    pub(super) fn extent(&self) -> Extent {
        self.extent
    }

    pub(super) fn place(&self, driver: &D) -> Place {
        Place {
            numbers: self.numbers,
            extent: self.extent,
            values: self.values.address(driver),
            scales: self.scales().map(|scales| scales.address(driver)),
        }
    }

    /// [N] f32 on the device, of e4m3.
    pub(super) fn scales(&self) -> Option<&Array<D>> {
        self.scales.as_ref()
    }
}

impl<D: Driver> Cuda<D> {
    fn shared_room(&self) -> usize {
        self.driver.facts().shared_bytes_max as usize
    }

    /// out [m, N] = x · weightᵀ (+ bias), as many rows at a time as a launch takes. Of pairs,
    /// out [m, N / 2] = silu(gate) · up.
    pub(super) fn multiply_records(
        &self,
        out: &mut Floats<D>,
        weight: &Records<D>,
        inputs: Inputs,
    ) -> Result<(), KernelError> {
        let (numbers, extent) = (weight.numbers, weight.extent);
        let (room, parts) = (self.shared_room(), extent.parts());
        let out_cols = extent.out_cols();
        let tokens_most = numbers.token_tile(inputs.m, room);
        let facts = self.driver.facts();
        let units = (extent.tiles() * parts) as u32;
        let grid = [units.min(facts.multiprocessors).max(1), 1, 1];
        for first in (0..inputs.m).step_by(tokens_most) {
            let tokens = (inputs.m - first).min(tokens_most);
            let tile = numbers.token_tile(tokens, room);
            let stages = numbers.stages(tile, room);
            let out_at = first * out_cols * out.element().bytes();
            let args = LinearArgs {
                x: inputs.x + (first * extent.cols * Element::Bf16.bytes()) as u64,
                bias: inputs.bias.unwrap_or(0),
                out: out.address(&self.driver) + out_at as u64,
                sums: inputs.sums,
                arrived: weight.arrived.address(&self.driver),
                tokens: tokens as u32,
                parts: parts as u32,
                stages: stages as u32,
                out_f32: u32::from(out.element() == Element::F32),
                ..weight.place(&self.driver).args(facts)
            };
            let kernel = numbers.kernels().products[kernel_of(tile)];
            let shared = (HEAD_BYTES + stages * numbers.stage_bytes(tile)) as u32;
            self.launch_dependent(Launch::new(kernel, grid, THREADS, &args).shared(shared))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shared memory of Hopper, of Ampere (A100), and of their small siblings.
    const ROOMS: [usize; 3] = [227 << 10, 163 << 10, 99 << 10];

    fn all_numbers() -> [Numbers; 5] {
        let int4 = [32, 64, 128].map(|group| Numbers::Int4 { group });
        [Numbers::Bf16, Numbers::E4m3, int4[0], int4[1], int4[2]]
    }

    #[test]
    fn a_launch_holds_its_rows_and_its_ring() {
        for numbers in all_numbers() {
            for room in ROOMS {
                for rows in 1..=64 {
                    let tile = numbers.token_tile(rows, room);
                    let stages = numbers.stages(tile, room);
                    let bytes = HEAD_BYTES + stages * numbers.stage_bytes(tile);
                    assert!(bytes <= room && stages >= 2, "{numbers:?} {room} {rows}");
                    let whole = tile >= rows || room < ROOMS[0];
                    assert!(whole, "{numbers:?}: {rows} rows by {tile}");
                    // What is on its way while a stage is multiplied.
                    let in_flight = (stages - 1) * STRIPS * numbers.record_bytes();
                    assert!(room < ROOMS[0] || in_flight >= 64 << 10, "{numbers:?} {tile}");
                }
            }
        }
    }

    /// Of the matrices of a 72B model on one card and on four: query, key and value, attention's
    /// output, gate and up, down.
    #[test]
    fn blocks_have_about_the_same_to_do() {
        let shapes = [
            (10240, 8192),
            (8192, 8192),
            (59136, 8192),
            (8192, 29568),
            (24576, 8192),
            (49152, 8192),
            (2560, 8192),
            (8192, 2048),
            (2048, 8192),
            (14784, 8192),
            (8192, 7392),
        ];
        for (rows, cols) in shapes {
            let extent = Extent::plain((rows, cols));
            let (parts, steps) = (extent.parts(), cols.div_ceil(STEP_COLS));
            let units = extent.tiles() * parts;
            let of_block = |block: usize| -> usize {
                let of_unit = |unit: usize| {
                    let part = unit % parts;
                    steps * (part + 1) / parts - steps * part / parts
                };
                (block..units).step_by(BLOCKS).map(of_unit).sum()
            };
            let most = (0..BLOCKS).map(of_block).max().unwrap_or(0);
            let even = extent.tiles() as f64 * steps as f64 / BLOCKS as f64;
            let share = even / most as f64;
            assert!(share > 0.9, "[{rows}, {cols}] in {parts} parts: {share:.3}");
        }
    }
}
