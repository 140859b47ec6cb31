//! 4-bit weights in groups of columns (GPTQ, AWQ) × bf16. Kernels: `int4.cu`, `int4_dequantize.cu`.
//!
//! Up to `FUSED_ROWS_MAX` rows are multiplied by a kernel that dequantises in registers; a row's
//! bits are then the same in every batch. More rows cost less through the weight as bf16 in the
//! workspace (2 N K bytes) and the device's own product, whose order of sums is its own.

mod pack;
mod part;

use super::{Array, Cuda, Driver, Element, Gemm, Launch};
use kernels::{KernelError, PartShape, Tensor, WeightPart, shape::ensure};
use pack::{Plan, STAGE_COLS, STRIP};
use part::{Columns, Int4Part};

/// Rows of x that the fused kernel takes.
pub const FUSED_ROWS_MAX: usize = 64;

const THREADS: u32 = 256;
/// Rows of W that a block multiplies.
const TILE: usize = 256;
/// Stages that a block has in flight.
const STAGES: usize = 4;
/// Splits are as many as give about this many blocks: a block for nearly each multiprocessor of the
/// largest device. The same everywhere, so that bits are too.
const BLOCKS: usize = 120;
const SPLITS_MAX: usize = 16;

/// Rows of x in a tile that there are kernels for. Bits do not depend on the choice.
const TOKEN_TILES: [usize; 3] = [8, 16, 32];
/// By rows of x in a tile and columns with one scale (32, 64, 128).
const FUSED: [[&str; 3]; 3] = [
    ["int4_linear_t8_g32", "int4_linear_t8_g64", "int4_linear_t8_g128"],
    ["int4_linear_t16_g32", "int4_linear_t16_g64", "int4_linear_t16_g128"],
    ["int4_linear_t32_g32", "int4_linear_t32_g64", "int4_linear_t32_g128"],
];
/// By columns with one scale.
const DEQUANTIZE: [&str; 3] =
    ["int4_dequantize_g32", "int4_dequantize_g64", "int4_dequantize_g128"];

/// A weight [N, K] in records.
pub(super) struct Int4<D: Driver> {
    rows: usize,
    cols: usize,
    /// Columns that the records have a place for, K or more; x lies in them after `lead`.
    lead: usize,
    stages: usize,
    unit: usize,
    splits: usize,
    /// [strips][stages] records.
    records: Array<D>,
    /// One counter for each tile and token tile, zero between launches.
    arrived: Array<D>,
    /// The column at each place, -1 for none, where columns are permuted.
    order: Option<Array<D>>,
}

impl<D: Driver> Int4<D> {
    /// Repacks `parts`, stacked by rows; `None` where the kernels cannot take them as they are.
    pub(super) fn new(driver: &D, parts: &[WeightPart<'_>]) -> Result<Option<Self>, KernelError> {
        let Some(parts) = Int4Part::all(parts) else { return Ok(None) };
        let (rows, cols) = (parts.iter().map(|part| part.rows).sum::<usize>(), parts[0].cols);
        let plan = Plan::of(&parts[0].columns());
        let bytes = Bytes::of(rows, &plan);
        let (strips, stages) = (rows.div_ceil(STRIP), plan.stages());
        let records = Array::zeroed(driver, "a weight", bytes.records)?;
        for strip in 0..strips {
            let packed = pack::strip(&parts, &plan, strip);
            driver.write(&records.memory, strip * stages * plan.record_bytes(), &packed)?;
        }
        let order = match plan.lead {
            Some(_) => None,
            None => {
                let place = |column: &Option<usize>| column.map_or(-1, |column| column as i32);
                let places: Vec<u8> =
                    plan.columns.iter().flat_map(|column| place(column).to_le_bytes()).collect();
                let order = Array::zeroed(driver, "an order of columns", bytes.order)?;
                order.write(driver, &places)?;
                Some(order)
            }
        };
        Ok(Some(Self {
            rows,
            cols,
            lead: plan.lead.unwrap_or(0),
            stages,
            unit: plan.unit,
            splits: splits(rows.div_ceil(TILE), stages),
            records,
            arrived: Array::zeroed(driver, "counters", bytes.arrived)?,
            order,
        }))
    }

    /// Columns of what the kernels multiply: K, or every place where columns are permuted.
    fn inputs(&self) -> usize {
        if self.order.is_some() { self.stages * STAGE_COLS } else { self.cols }
    }
}

/// Bytes of a weight's parts on the device.
struct Bytes {
    records: usize,
    order: usize,
    arrived: usize,
}

impl Bytes {
    fn of(rows: usize, plan: &Plan) -> Self {
        let order = if plan.lead.is_none() { plan.columns.len() * size_of::<i32>() } else { 0 };
        let token_tiles = FUSED_ROWS_MAX / TOKEN_TILES[0];
        Self {
            records: rows.div_ceil(STRIP) * plan.stages() * plan.record_bytes(),
            order,
            arrived: rows.div_ceil(TILE) * token_tiles * size_of::<u32>(),
        }
    }
}

/// Bytes that the device holds of a stack; `None` where the kernels cannot take it.
pub(super) fn bytes(stack: &[PartShape]) -> Option<usize> {
    let plan = Plan::of(&Columns::of(stack)?);
    let Bytes { records, order, arrived } =
        Bytes::of(stack.iter().map(|part| part.rows).sum(), &plan);
    Some(records + order + arrived)
}

/// Bytes of the workspace that products of up to `tokens` rows want; `None` as for [`bytes`].
pub(super) fn workspace_bytes(stack: &[PartShape], tokens: usize) -> Option<usize> {
    let of = Columns::of(stack)?;
    let plan = Plan::of(&of);
    let rows: usize = stack.iter().map(|part| part.rows).sum();
    let inputs = if plan.lead.is_none() { plan.columns.len() } else { of.cols };
    let row_bytes = inputs * Element::Bf16.bytes();
    let gathered = |tokens: usize| match plan.lead {
        None => aligned(tokens.saturating_mul(row_bytes)),
        Some(_) => 0,
    };
    let fused = tokens.min(FUSED_ROWS_MAX);
    let splits = splits(rows.div_ceil(TILE), plan.stages());
    let widest = TOKEN_TILES[TOKEN_TILES.len() - 1];
    let sums =
        if splits > 1 { sums_bytes(rows, fused.next_multiple_of(widest), splits) } else { 0 };
    let few = gathered(fused) + sums;
    let many = if tokens > fused { gathered(tokens).saturating_add(rows * row_bytes) } else { 0 };
    Some(few.max(many))
}

/// What splits leave for the last of them.
fn sums_bytes(rows: usize, tokens: usize, splits: usize) -> usize {
    rows.next_multiple_of(TILE) * tokens * splits * Element::F32.bytes()
}

/// Parts of the columns that are summed apart: by the weight's shape alone.
fn splits(tiles: usize, stages: usize) -> usize {
    // At least two stages each, or a split costs more than it gives.
    BLOCKS.div_ceil(tiles).min(SPLITS_MAX).min((stages / 2).max(1))
}

/// Shared memory of the fused kernel.
fn shared_bytes(unit: usize, token_tile: usize) -> usize {
    let x = token_tile * STAGE_COLS * Element::Bf16.bytes();
    STAGES * (TILE / STRIP * pack::record_bytes(unit) + x)
}

#[repr(C)]
#[derive(Clone, Copy)]
struct LinearArgs {
    weight: u64,
    x: u64,
    bias: u64,
    out: u64,
    sums: u64,
    arrived: u64,
    tokens: u32,
    rows: u32,
    cols: u32,
    lead: u32,
    stages: u32,
    token_tiles: u32,
    out_f32: u32,
    unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct DequantizeArgs {
    weight: u64,
    out: u64,
    rows: u32,
    cols: u32,
    lead: u32,
    stages: u32,
    strips: u32,
    unused: u32,
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

/// Bytes of the workspace, each part at a multiple of 256.
fn aligned(bytes: usize) -> usize {
    bytes.checked_next_multiple_of(256).unwrap_or(usize::MAX)
}

impl<D: Driver> Cuda<D> {
    /// out [T, N] = x [T, K] · weight [N, K]ᵀ (+ bias [1, N]).
    pub(super) fn int4_product(
        &self,
        out: &mut Tensor<Self>,
        x: &Tensor<Self>,
        weight: &Int4<D>,
        bias: Option<&Tensor<Self>>,
    ) -> Result<(), KernelError> {
        let fits = [x.rows, weight.rows, weight.cols, weight.stages * STAGE_COLS]
            .into_iter()
            .all(|extent| i32::try_from(extent).is_ok());
        ensure("linear", fits, || format!("{} rows of int4 products are too many", x.rows))?;
        let fused = x.rows <= FUSED_ROWS_MAX;
        let gathered = if weight.order.is_some() {
            aligned(x.rows * weight.inputs() * Element::Bf16.bytes())
        } else {
            0
        };
        let token_tile = self.token_tile(weight, x.rows);
        let rest = if fused && weight.splits > 1 {
            sums_bytes(weight.rows, x.rows.next_multiple_of(token_tile), weight.splits)
        } else if fused {
            0
        } else {
            weight.rows * weight.inputs() * Element::Bf16.bytes()
        };
        let workspace = if gathered + rest > 0 { self.workspace(gathered + rest)? } else { 0 };
        let inputs = match &weight.order {
            Some(order) => self.gather_columns(workspace, x, weight, order)?,
            None => self.at(x),
        };
        let rest = workspace + gathered as u64;
        let bias = bias.map(|bias| self.at(bias));
        if fused {
            return self.int4_fused(out, (inputs, rest), weight, bias);
        }
        self.int4_dequantize(rest, weight)?;
        self.driver.gemm(Gemm {
            out: self.at(out),
            out_element: out.data.element(),
            x: inputs,
            weight: rest,
            scales: None,
            bias,
            m: x.rows,
            n: weight.rows,
            k: weight.inputs(),
        })
    }

    /// Columns of x by place, at `to`.
    fn gather_columns(
        &self,
        to: u64,
        x: &Tensor<Self>,
        weight: &Int4<D>,
        order: &Array<D>,
    ) -> Result<u64, KernelError> {
        let places = weight.inputs() as u32;
        // Grids have at most 65535 rows.
        for first in (0..x.rows).step_by(65535) {
            let rows = (x.rows - first).min(65535);
            let row_bytes = |cols: usize| (first * cols * Element::Bf16.bytes()) as u64;
            let args = GatherArgs {
                out: to + row_bytes(weight.inputs()),
                x: self.at(x) + row_bytes(x.cols),
                order: order.address(&self.driver),
                cols: weight.cols as u32,
                places,
            };
            let grid = [places.div_ceil(THREADS), rows as u32, 1];
            self.driver.launch(Launch::new("int4_gather_columns", grid, THREADS, &args))?;
        }
        Ok(to)
    }

    /// Rows of x in a tile: the fewest that hold all, or as many as shared memory has room for.
    fn token_tile(&self, weight: &Int4<D>, tokens: usize) -> usize {
        let room = self.driver.facts().shared_bytes_max as usize;
        let fits = |tile: &&usize| shared_bytes(weight.unit, **tile) <= room;
        let tiles = || TOKEN_TILES.iter().filter(fits);
        let holds_all = tiles().find(|tile| **tile >= tokens);
        *holds_all.or_else(|| tiles().last()).unwrap_or(&TOKEN_TILES[0])
    }

    /// `x` and room for sums by address.
    fn int4_fused(
        &self,
        out: &mut Tensor<Self>,
        (x, sums): (u64, u64),
        weight: &Int4<D>,
        bias: Option<u64>,
    ) -> Result<(), KernelError> {
        let tile = self.token_tile(weight, out.rows);
        let token_tiles = out.rows.div_ceil(tile) as u32;
        let args = LinearArgs {
            weight: weight.records.address(&self.driver),
            x,
            bias: bias.unwrap_or(0),
            out: self.at(out),
            sums,
            arrived: weight.arrived.address(&self.driver),
            tokens: out.rows as u32,
            rows: weight.rows as u32,
            cols: weight.inputs() as u32,
            lead: weight.lead as u32,
            stages: weight.stages as u32,
            token_tiles,
            out_f32: u32::from(out.data.element() == Element::F32),
            unused: 0,
        };
        let kernel = FUSED[tile.ilog2() as usize - 3][weight.unit.ilog2() as usize - 5];
        let grid = [weight.rows.div_ceil(TILE) as u32 * token_tiles, weight.splits as u32, 1];
        let shared = shared_bytes(weight.unit, tile) as u32;
        let launch = Launch::new(kernel, grid, THREADS, &args).shared(shared);
        self.driver.launch(launch)
    }

    /// The weight as bf16 [N, inputs], at `to`.
    fn int4_dequantize(&self, to: u64, weight: &Int4<D>) -> Result<(), KernelError> {
        let strips = weight.rows.div_ceil(STRIP);
        let args = DequantizeArgs {
            weight: weight.records.address(&self.driver),
            out: to,
            rows: weight.rows as u32,
            cols: weight.inputs() as u32,
            lead: weight.lead as u32,
            stages: weight.stages as u32,
            strips: strips as u32,
            unused: 0,
        };
        let kernel = DEQUANTIZE[weight.unit.ilog2() as usize - 5];
        // A warp for each record.
        let blocks = (strips * weight.stages * 32).div_ceil(THREADS as usize) as u32;
        self.driver.launch(Launch::new(kernel, [blocks, 1, 1], THREADS, &args))
    }
}
