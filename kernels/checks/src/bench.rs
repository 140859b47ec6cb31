//! How fast kernels are, beside what the same device can do at all.
//!
//! A bench prepares one op on one shape; a clock times it. What is bound by memory is told as a
//! share of the device's own copy, what is bound by arithmetic in FLOP/s beside the device's own
//! matrix product, both measured in the same run. Generic over the driver, so that tests run every
//! bench on tiny shapes without a device.

mod attention;
mod elementwise;
mod fp8;
mod int4;
mod linear;
mod measure;
mod report;
mod sampling;

pub use linear::ceiling;
pub use measure::{Clock, Outcome, Pace, measure};
pub use report::{About, Report};

use crate::noise;
use cuda::{Cuda, CudaConfig, Driver};
use kernels::{BLOCK_TOKENS, Backend, Batch, Format, Heads, KernelError, Tensor, WeightPart};

/// How large benches are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// What a large model asks of one device.
    Full,
    /// Just enough to run every line.
    Tiny,
}

impl Scale {
    pub(crate) fn of<T>(self, full: T, tiny: T) -> T {
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
        attention::benches(scale),
        sampling::benches(scale),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// [rows, cols] of noise. Arithmetic on zeros takes less power, and so less time.
pub(crate) fn noisy<D: Driver>(
    device: &Cuda<D>,
    rows: usize,
    cols: usize,
) -> Result<Tensor<Cuda<D>>, KernelError> {
    Tensor::from_host(device, cols, &repeated(&noise(9, PIECE.min(rows * cols)), rows * cols))
}

/// Values of noise that large inputs repeat: more than a cache's lines hold, and no multiple of a
/// row.
const PIECE: usize = (1 << 20) + 21;

fn repeated<T: Copy>(piece: &[T], len: usize) -> Vec<T> {
    let mut all = Vec::with_capacity(len);
    while all.len() < len {
        all.extend_from_slice(&piece[..piece.len().min(len - all.len())]);
    }
    all
}

/// [rows, cols] of noise in bf16.
fn noisy_bytes(rows: usize, cols: usize) -> Vec<u8> {
    let piece: Vec<u8> = noise(7, PIECE.min(rows * cols))
        .iter()
        .flat_map(|v| half::bf16::from_f32(*v).to_le_bytes())
        .collect();
    repeated(&piece, 2 * rows * cols)
}

/// A table [rows, cols] of noise.
pub(crate) fn noisy_table<D: Driver>(
    device: &Cuda<D>,
    rows: usize,
    cols: usize,
) -> Result<<Cuda<D> as Backend>::Weight, KernelError> {
    device.table(&[WeightPart::plain(Format::Bf16, rows, cols, noisy_bytes(rows, cols))])
}

/// A weight [rows, cols] of noise.
pub(crate) fn noisy_weight<D: Driver>(
    device: &Cuda<D>,
    rows: usize,
    cols: usize,
) -> Result<<Cuda<D> as Backend>::Weight, KernelError> {
    device.weight(&[WeightPart::plain(Format::Bf16, rows, cols, noisy_bytes(rows, cols))])
}

pub(crate) fn ints<D: Driver>(
    device: &Cuda<D>,
    values: &[i32],
) -> Result<<Cuda<D> as Backend>::Ints, KernelError> {
    let mut ints = device.ints(values.len())?;
    device.write_ints(&mut ints, values)?;
    Ok(ints)
}

/// A step of `sequences` sequences with `rows` rows each at the end of contexts of `context`
/// tokens. Blocks of a sequence lie apart in the cache, as they do after a while of serving.
pub(crate) fn batch<D: Driver>(
    device: &Cuda<D>,
    sequences: usize,
    rows: usize,
    context: usize,
) -> Result<Batch<Cuda<D>>, KernelError> {
    let cols = context.div_ceil(BLOCK_TOKENS);
    let block = |s: usize, at: usize| at * sequences + s;
    let each = |f: &dyn Fn(usize, usize) -> usize| -> Vec<i32> {
        let of = |s| (context - rows..context).map(move |p| f(s, p) as i32);
        (0..sequences).flat_map(of).collect()
    };
    let positions = each(&|_, position| position);
    let slots = each(&|s, p| block(s, p / BLOCK_TOKENS) * BLOCK_TOKENS + p % BLOCK_TOKENS);
    let tables = (0..sequences).flat_map(|s| (0..cols).map(move |at| block(s, at) as i32));
    let tokens = sequences * rows;
    let starts: Vec<i32> = (0..=sequences).map(|s| (s * rows) as i32).collect();
    let mut batch = Batch {
        tokens,
        sequences,
        logit_rows_len: tokens,
        ids: ints(device, &(0..tokens as i32).collect::<Vec<_>>())?,
        positions: ints(device, &positions)?,
        rope_rows: ints(device, &positions)?,
        slots: ints(device, &slots)?,
        row_starts: ints(device, &starts)?,
        context_lens: ints(device, &vec![context as i32; sequences])?,
        block_tables: ints(device, &tables.collect::<Vec<_>>())?,
        block_table_cols: cols,
        logit_rows: ints(device, &(0..tokens as i32).rev().collect::<Vec<_>>())?,
        q_scale: None,
        cuts: device.cuts(tokens, sequences)?,
    };
    device.cut(&mut batch)?;
    Ok(batch)
}
