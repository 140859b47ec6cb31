//! Weights made on the device from a seed. Kernels: `random.cu`.

use super::{Cuda, Driver, Launch};
use kernels::{
    KernelError, Random, Stored, WeightPart,
    shape::ensure,
    weight::{RANDOM_INT4_ZERO, RANDOM_STEP, random_int4_scale},
};

const THREADS: u32 = 256;
/// Numbers of a thread.
const DEPTH: usize = 8;
/// Matrices in one stack that the kernel takes.
pub(super) const PARTS: usize = 3;
/// 128 as bf16.
const BIASED: u32 = 0x4300;

#[repr(C)]
#[derive(Clone, Copy)]
struct RandomArgs {
    out: u64,
    seed: u64,
    first_row: u64,
    first_col: u64,
    numbers: u64,
    cols: u32,
    step: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RandomPart {
    seed: u64,
    first_row: u64,
    first_col: u64,
    rows: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RandomInt4Args {
    records: u64,
    parts: [RandomPart; PARTS],
    words: u64,
    cols: u32,
    lead: u32,
    strip_records: u32,
    group: u32,
    factor: u32,
    zero: u32,
    pairs: u32,
    unused: u32,
}

/// Records of integers of 4 bits to be filled, by address.
pub(super) struct RandomRecords {
    pub address: u64,
    pub bytes: usize,
    pub cols: usize,
    pub lead: usize,
    /// Of a strip.
    pub records: usize,
    /// Columns with one scale.
    pub group: usize,
    /// As [`Extent`](crate::skinny::Extent)'s.
    pub pairs: usize,
}

/// The seed and place of a part without numbers.
pub(super) fn random(part: &WeightPart<'_>) -> Option<Random> {
    match part.stored {
        Stored::Random(random) => Some(random),
        _ => None,
    }
}

fn blocks(threads: usize) -> Result<u32, KernelError> {
    let blocks = i32::try_from(threads.div_ceil(THREADS as usize));
    ensure("random", blocks.is_ok(), || format!("{threads} threads are more than a grid has"))?;
    Ok(blocks.unwrap_or_default() as u32)
}

impl<D: Driver> Cuda<D> {
    /// Rows `first..first + rows` of a part, in bf16 at `to`.
    pub(super) fn random_rows(
        &self,
        to: u64,
        random: Random,
        (first, rows, cols): (usize, usize, usize),
    ) -> Result<(), KernelError> {
        let numbers = rows * cols;
        let args = RandomArgs {
            out: to,
            seed: random.seed,
            first_row: (random.first_row + first) as u64,
            first_col: random.first_col as u64,
            numbers: numbers as u64,
            cols: cols as u32,
            step: RANDOM_STEP,
        };
        if numbers == 0 {
            return Ok(());
        }
        let grid = [blocks(numbers.div_ceil(DEPTH))?, 1, 1];
        self.driver.launch(Launch::new("random_bf16", grid, THREADS, &args))
    }

    /// The records of a stack of up to [`PARTS`] parts.
    pub(super) fn random_records(
        &self,
        to: &RandomRecords,
        parts: &[(Random, usize)],
    ) -> Result<(), KernelError> {
        let mut args = RandomInt4Args {
            records: to.address,
            parts: [RandomPart::default(); PARTS],
            words: (to.bytes / 4) as u64,
            cols: to.cols as u32,
            lead: to.lead as u32,
            strip_records: to.records as u32,
            group: to.group as u32,
            factor: (BIASED | u32::from(RANDOM_INT4_ZERO)) << 16
                | u32::from(random_int4_scale().to_bits()),
            zero: u32::from(RANDOM_INT4_ZERO),
            pairs: to.pairs as u32,
            unused: 0,
        };
        for (place, (random, rows)) in args.parts.iter_mut().zip(parts) {
            *place = RandomPart {
                seed: random.seed,
                first_row: random.first_row as u64,
                first_col: random.first_col as u64,
                rows: *rows as u64,
            };
        }
        let grid = [blocks(to.bytes / 4)?, 1, 1];
        self.driver.launch(Launch::new("random_int4_records", grid, THREADS, &args))
    }
}
