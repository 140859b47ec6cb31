//! embed, gather_rows, silu_mul, add, rms_norm, add_rms_norm, rotate_and_store: all bound by
//! memory.

use super::{Bar, Bench, Run, Scale, Work, batch, noisy, noisy_table};
use crate::BF16;
use cuda::{Cuda, CudaConfig, Driver, KvFormat};
use kernels::{BLOCK_TOKENS, Backend, Batch, Heads, KernelError, Rotation, Tensor};

/// Rows, then the widths of a 72B model.
struct Shape {
    rows: usize,
    hidden: usize,
    intermediate: usize,
    vocab: usize,
}

pub fn benches<D: Driver>(scale: Scale) -> Vec<Bench<D>> {
    // Several times what a cache holds, and long beside what a launch takes.
    let full = Shape { rows: 16384, hidden: 8192, intermediate: 24576, vocab: 32768 };
    let tiny = Shape { rows: 3, hidden: 64, intermediate: 96, vocab: 40 };
    let Shape { rows, hidden, intermediate, vocab } = scale.of(full, tiny);
    let row_bytes = (2 * rows * hidden) as f64;
    let bench = |op, (rows, cols): (usize, usize), bytes: f64, prepare| Bench {
        op,
        shape: format!("{rows} × {cols}"),
        config: BF16,
        work: Work::Bytes(bytes),
        bar: Bar::OfCopy(0.85),
        peer: None,
        prepare,
        baseline: None,
    };
    let whole = (rows, hidden);
    let gate = (rows, intermediate);
    let gate_bytes = (2 * 3 * rows * intermediate) as f64;
    vec![
        bench("add", whole, 3.0 * row_bytes, Box::new(move |d| add(d, whole))),
        bench("rms_norm", whole, 2.0 * row_bytes, Box::new(move |d| norm(d, whole))),
        bench("add_rms_norm", whole, 4.0 * row_bytes, Box::new(move |d| add_norm(d, whole))),
        bench("silu_mul", gate, gate_bytes, Box::new(move |d| silu_mul(d, gate))),
        bench("embed", whole, 2.0 * row_bytes, Box::new(move |d| embed(d, whole, vocab))),
        bench("gather_rows", whole, 2.0 * row_bytes, Box::new(move |d| gather(d, whole))),
        rotation(scale, KvFormat::Bf16),
        rotation(scale, KvFormat::Fp8),
    ]
}

fn add<D: Driver>(device: &Cuda<D>, (rows, cols): (usize, usize)) -> Result<Run<D>, KernelError> {
    let (mut x, delta) = (noisy(device, rows, cols)?, noisy(device, rows, cols)?);
    Ok(Box::new(move |device| device.add(&mut x, &delta)))
}

fn norm<D: Driver>(device: &Cuda<D>, (rows, cols): (usize, usize)) -> Result<Run<D>, KernelError> {
    let (x, weight) = (noisy(device, rows, cols)?, noisy(device, 1, cols)?);
    let mut out = Tensor::zeros(device, rows, cols)?;
    Ok(Box::new(move |device| device.rms_norm(&mut out, &x, &weight, 1e-6)))
}

fn add_norm<D: Driver>(
    device: &Cuda<D>,
    (rows, cols): (usize, usize),
) -> Result<Run<D>, KernelError> {
    let (mut x, delta) = (noisy(device, rows, cols)?, noisy(device, rows, cols)?);
    let (mut out, weight) = (Tensor::zeros(device, rows, cols)?, noisy(device, 1, cols)?);
    Ok(Box::new(move |device| device.add_rms_norm(&mut out, &mut x, &delta, &weight, 1e-6)))
}

fn silu_mul<D: Driver>(
    device: &Cuda<D>,
    (rows, cols): (usize, usize),
) -> Result<Run<D>, KernelError> {
    let (x, mut out) = (noisy(device, rows, 2 * cols)?, Tensor::zeros(device, rows, cols)?);
    Ok(Box::new(move |device| device.silu_mul(&mut out, &x)))
}

/// A step of rows that no attention looks at.
fn rows_alone<D: Driver>(device: &Cuda<D>, rows: usize) -> Result<Batch<Cuda<D>>, KernelError> {
    batch(device, 1, rows, rows, Heads { q: 1, kv: 1, dim: 64 })
}

fn embed<D: Driver>(
    device: &Cuda<D>,
    (rows, cols): (usize, usize),
    vocab: usize,
) -> Result<Run<D>, KernelError> {
    let table = noisy_table(device, vocab, cols)?;
    let (batch, mut out) = (rows_alone(device, rows)?, Tensor::zeros(device, rows, cols)?);
    Ok(Box::new(move |device| device.embed(&mut out, &table, 0, &batch)))
}

fn gather<D: Driver>(
    device: &Cuda<D>,
    (rows, cols): (usize, usize),
) -> Result<Run<D>, KernelError> {
    let (x, mut out) = (noisy(device, rows, cols)?, Tensor::zeros(device, rows, cols)?);
    let batch = rows_alone(device, rows)?;
    Ok(Box::new(move |device| device.gather_rows(&mut out, &x, &batch, 0, rows)))
}

/// Reads packed rows, writes queries back, and keys and values to the cache.
fn rotation<D: Driver>(scale: Scale, kv_format: KvFormat) -> Bench<D> {
    let rows = scale.of(16384, 5);
    let heads = scale.of(Heads { q: 64, kv: 8, dim: 128 }, Heads { q: 4, kv: 2, dim: 64 });
    let Heads { q, kv, dim } = heads;
    let packed = 2 * (heads.qkv_cols() + q * dim);
    let cached = 2 * kv * dim * kv_format.element_bytes();
    Bench {
        op: match kv_format {
            KvFormat::Bf16 => "rotate_and_store",
            KvFormat::Fp8 => "rotate_and_store, fp8 cache",
        },
        shape: format!("{rows} × ({q} + 2·{kv}) heads of {dim}, with head norms"),
        config: CudaConfig { kv_format, ..BF16 },
        work: Work::Bytes((rows * (packed + cached + 4 * dim)) as f64),
        bar: Bar::OfCopy(0.80),
        peer: None,
        prepare: Box::new(move |device| {
            let mut qkv = noisy(device, rows, heads.qkv_cols())?;
            let (q, k) = (noisy(device, 1, dim)?, noisy(device, 1, dim)?);
            let table = crate::noise(5, rows * dim);
            let cos_sin = Tensor::exact_from_host(device, dim, &table)?;
            let batch = batch(device, 1, rows, rows, heads)?;
            let mut kv = device.kv(rows.div_ceil(BLOCK_TOKENS), heads)?;
            Ok(Box::new(move |device: &Cuda<D>| {
                let norm = Some((&q, &k, 1e-6));
                let rotation = Rotation { norm, cos_sin: &cos_sin, heads };
                device.rotate_and_store(&mut kv, &mut qkv, &rotation, &batch)
            }))
        }),
        baseline: None,
    }
}
