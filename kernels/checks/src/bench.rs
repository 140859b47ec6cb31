//! How fast kernels are, beside what the same device can do at all.
//!
//! A bench prepares one op on one shape; a clock times it. What is bound by memory is told as a
//! share of the device's own copy, what is bound by arithmetic in FLOP/s beside the device's own
//! matrix product, both measured in the same run. Generic over the driver, so that tests run every
//! bench on tiny shapes without a device.

mod attention;
mod elementwise;
mod experts;
mod fp8;
mod int4;
mod linear;
mod measure;
mod report;
mod sampling;
mod step;

pub use linear::{ceiling, fp8_ceiling};
pub use measure::{Clock, Outcome, Pace, measure};
pub use report::{About, End, Report, Told};
pub use step::{Form, Layer, Sized, Step, StepOutcome, Timer, steps};

use crate::noise;
use cuda::{Cuda, CudaConfig, Driver};
use kernels::{
    Backend, Batch, BatchRoom, Format, Heads, KernelError, StepSequence, TableBlock, Tensor,
    WeightPart,
};

/// How large benches are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// What a large model asks of one device.
    Full,
    /// Just enough to run every line.
    Tiny,
}

impl Scale {
    /// The one that is meant.
    pub fn of<T>(self, full: T, tiny: T) -> T {
        match self {
            Self::Full => full,
            Self::Tiny => tiny,
        }
    }
}

/// What bounds an op.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Work {
    /// Bytes read and written.
    Bytes(f64),
    /// Multiplications and additions.
    Flops(f64),
}

/// What an op is expected to reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bar {
    /// At least this share of the copy's bytes per second.
    OfCopy(f64),
    /// At least so many TFLOP/s.
    Tflops(f64),
    /// At most so many microseconds.
    Microseconds(f64),
    /// At least so many times as fast as the bench's baseline.
    Times(f64),
    /// Told, not judged.
    None,
}

/// The same work elsewhere: what a peer is asked to time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Peer {
    /// Scaled dot-product attention, `rows` queries of each of `batch` sequences of `context`.
    Attention { batch: usize, rows: usize, context: usize, heads: Heads },
    /// [m, k] · [n, k]ᵀ in bf16.
    Product { m: usize, n: usize, k: usize },
}

/// Runs prepared work once.
pub type Run<D> = Box<dyn FnMut(&Cuda<D>) -> Result<(), KernelError>>;

/// Allocates and fills what the work needs.
pub type Prepare<D> = Box<dyn Fn(&Cuda<D>) -> Result<Run<D>, KernelError>>;

/// One op on one shape.
pub struct Bench<D: Driver> {
    pub op: &'static str,
    pub shape: String,
    pub config: CudaConfig,
    pub work: Work,
    pub bar: Bar,
    pub peer: Option<Peer>,
    pub prepare: Prepare<D>,
    /// What [`Bar::Times`] compares with.
    pub baseline: Option<Prepare<D>>,
}

/// Every bench.
pub fn all<D: Driver>(scale: Scale) -> Vec<Bench<D>> {
    [
        elementwise::benches(scale),
        fp8::benches(scale),
        linear::benches(scale),
        int4::benches(scale),
        experts::benches(scale),
        attention::benches(scale),
        sampling::benches(scale),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// [rows, cols] of noise, made by the device. Arithmetic on zeros takes less power, and so less
/// time.
pub(crate) fn noisy<D: Driver>(
    device: &Cuda<D>,
    rows: usize,
    cols: usize,
) -> Result<Tensor<Cuda<D>>, KernelError> {
    let mut x = Tensor::zeros(device, rows, cols)?;
    device.fill_noise(&mut x, 9)?;
    Ok(x)
}

/// Values of noise that large weights repeat, which is what the host need make and hold of them.
const PIECE: usize = 4 << 20;

/// Rows of each part of a weight whose parts are all the same.
pub(crate) fn parts_of(rows: usize, cols: usize) -> impl Iterator<Item = usize> {
    let each = (PIECE / cols / 16 * 16).max(16);
    (0..rows).step_by(each).map(move |first| each.min(rows - first))
}

/// A weight of one kind or another.
type Weight<D> = <Cuda<D> as Backend>::Weight;

/// Hands [rows, cols] of noise in bf16 to `upload`, in parts.
fn with_noise<T>(rows: usize, cols: usize, upload: impl FnOnce(&[WeightPart<'_>]) -> T) -> T {
    let most = parts_of(rows, cols).next().unwrap_or(0) * cols;
    let piece: Vec<u8> =
        noise(7, most).iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
    let part = |rows| WeightPart::plain(Format::Bf16, rows, cols, &piece[..2 * rows * cols]);
    upload(&parts_of(rows, cols).map(part).collect::<Vec<_>>())
}

/// A table [rows, cols] of noise.
pub(crate) fn noisy_table<D: Driver>(
    device: &Cuda<D>,
    rows: usize,
    cols: usize,
) -> Result<Weight<D>, KernelError> {
    with_noise(rows, cols, |parts| device.table(parts))
}

/// A weight [rows, cols] of noise.
pub(crate) fn noisy_weight<D: Driver>(
    device: &Cuda<D>,
    rows: usize,
    cols: usize,
) -> Result<Weight<D>, KernelError> {
    with_noise(rows, cols, |parts| device.weight(parts))
}

/// A step of `sequences` sequences with `rows` rows each at the end of contexts of `context`
/// tokens. Blocks of a sequence lie apart in the cache, as they do after a while of serving.
pub(crate) fn batch<D: Driver>(
    device: &Cuda<D>,
    sequences: usize,
    rows: usize,
    context: usize,
    heads: Heads,
) -> Result<Batch<Cuda<D>>, KernelError> {
    let tokens = sequences * rows;
    let room = BatchRoom { tokens, sequences, tables: sequences, context, heads };
    let ids = (0..tokens as i32).collect();
    let mut step = kernels::Step { ids, ..kernels::Step::default() };
    for table in 0..sequences {
        let start = context - rows;
        step.sequences.push(StepSequence { table, start, rows, rope_start: start });
        let block = |index| TableBlock { table, index, block: index * sequences + table };
        step.new_blocks.extend((0..room.table_cols()).map(block));
    }
    step.logit_rows = (0..tokens as i32).rev().collect();
    let mut batch = Batch::new(device, room, None)?;
    device.lay_out(&mut batch, &step)?;
    Ok(batch)
}
