//! embed, add, silu_mul, gather_rows.

use crate::flat::{Indices, guarded, refused, text, unwritten, written};
use crate::{BF16, Check, Device, Tolerance, compare, noise, rounded};
use cuda::Driver;
use kernels::{Backend, Format, KernelError, Tensor, WeightPart, plain::Plain};

pub fn checks<D: Driver>() -> Vec<Check<D>> {
    vec![
        Check { name: "add", run: add },
        Check { name: "silu_mul", run: silu_mul },
        Check { name: "silu_mul at the ends of bf16", run: silu_mul_extremes },
        Check { name: "embed", run: embed },
        Check { name: "gather_rows", run: gather_rows },
        Check { name: "element-wise: what is refused", run: refusals },
    ]
}

fn add<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    for (rows, cols) in [(0, 8), (1, 8), (3, 64), (1, 4096), (1, 4104), (7, 5120)] {
        let (x, delta) = (rounded(&noise(1, rows * cols)), rounded(&noise(2, rows * cols)));
        let mut to = guarded(&device, cols, &x).map_err(text)?;
        let delta_there = Tensor::from_host(&device, cols, &delta).map_err(text)?;
        device.add(&mut to, &delta_there).map_err(text)?;
        let wanted: Vec<f32> = x.iter().zip(&delta).map(|(x, d)| x + d).collect();
        let got = written(&device, &to)?;
        compare(&format!("add [{rows}, {cols}]"), &got, &wanted, Tolerance::Rounded)?;
    }
    Ok(())
}

/// The device's and the oracle's.
fn gated<D: Driver>(
    device: Device<'_, D>,
    cols: usize,
    x: &[f32],
) -> Result<(Vec<f32>, Vec<f32>), String> {
    fn run<B: Backend>(device: &B, cols: usize, x: &[f32]) -> Result<Tensor<B>, KernelError> {
        let x = Tensor::from_host(device, 2 * cols, x)?;
        let mut out = unwritten(device, x.rows, cols)?;
        device.silu_mul(&mut out, &x)?;
        Ok(out)
    }
    let device = device(BF16);
    let got = written(&device, &run(&device, cols, x).map_err(text)?)?;
    Ok((got, written(&Plain, &run(&Plain, cols, x).map_err(text)?)?))
}

fn silu_mul<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    for (rows, cols) in [(0, 8), (1, 8), (3, 64), (2, 2048), (1, 4104), (5, 1112)] {
        let x: Vec<f32> = noise(3, rows * 2 * cols).iter().map(|v| v * 8.0).collect();
        let (got, wanted) = gated(device, cols, &rounded(&x))?;
        compare(&format!("silu_mul [{rows}, {cols}]"), &got, &wanted, Tolerance::Ulps(1))?;
    }
    Ok(())
}

/// Gates from all over bf16, beside 1: nothing overflows on the way, NaNs stay.
fn silu_mul_extremes<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let gates: Vec<f32> =
        (0..=u16::MAX).step_by(31).map(|bits| half::bf16::from_bits(bits).to_f32()).collect();
    let near = (-1600..1600).map(|i| i as f32 / 16.0);
    let special = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MIN, f32::MAX];
    let mut gates: Vec<f32> = gates.into_iter().chain(near).chain(special).collect();
    gates.resize(gates.len().next_multiple_of(8), 1.0);
    let cols = gates.len();
    gates.extend(vec![1.0; cols]);
    let (got, wanted) = gated(device, cols, &rounded(&gates))?;
    for (at, (got, wanted)) in got.iter().zip(&wanted).enumerate() {
        // f32 has no numbers below 1e-38 to hold the last bits of results there.
        let near = (got - wanted).abs() < 1e-38;
        let tolerance = if near { Tolerance::Absolute(1e-38) } else { Tolerance::Ulps(1) };
        compare(&format!("silu of {}", gates[at]), &[*got], &[*wanted], tolerance)?;
    }
    Ok(())
}

/// A table [rows, cols] of distinct rows.
fn table(rows: usize, cols: usize) -> Vec<f32> {
    rounded(&noise(rows as u64, rows * cols))
}

fn part(cols: usize, values: &[f32]) -> WeightPart<'static> {
    let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    WeightPart::plain(Format::F32, values.len() / cols, cols, data)
}

fn embed<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    fn run<B: Backend>(
        device: &B,
        (first, cols, table): (usize, usize, &[f32]),
        ids: &[i32],
    ) -> Result<Tensor<B>, KernelError> {
        let batch = Indices { tokens: ids.len(), ids: ids.to_vec(), ..Indices::default() };
        let table = device.table(&[part(cols, table)])?;
        let mut out = unwritten(device, ids.len(), cols)?;
        device.embed(&mut out, &table, first, &batch.batch(device)?)?;
        Ok(out)
    }
    let device = device(BF16);
    for (cols, rows, first) in [(8, 1, 0), (64, 7, 0), (896, 5, 100), (4104, 3, 151_933)] {
        let (start, end) = (first as i32, (first + rows) as i32);
        let ids = [start, end - 1, start - 1, end, -1, 0, i32::MAX, i32::MIN, start];
        let values = table(rows, cols);
        for ids in [&ids[..], &ids[..1], &[]] {
            let from = (first, cols, &values[..]);
            let got = written(&device, &run(&device, from, ids).map_err(text)?)?;
            let wanted = written(&Plain, &run(&Plain, from, ids).map_err(text)?)?;
            let what = format!("embed [{rows}, {cols}] from {first}, ids {ids:?}");
            compare(&what, &got, &wanted, Tolerance::Rounded)?;
        }
    }
    Ok(())
}

fn gather<B: Backend>(
    device: &B,
    (cols, x): (usize, &[f32]),
    rows: &[i32],
    (first, len): (usize, usize),
) -> Result<Tensor<B>, KernelError> {
    let batch = Indices { logit_rows: rows.to_vec(), ..Indices::default() };
    let x = Tensor::from_host(device, cols, x)?;
    let mut out = unwritten(device, len, cols)?;
    device.gather_rows(&mut out, &x, &batch.batch(device)?, first, len)?;
    Ok(out)
}

fn gather_rows<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let rows = [6, 0, 3, 3, 5];
    for cols in [8, 896, 4104] {
        let x = table(7, cols);
        for (first, len) in [(0, 5), (2, 3), (4, 1), (5, 0)] {
            let range = (first, len);
            let got = gather(&device, (cols, &x), &rows, range).map_err(text)?;
            let wanted = gather(&Plain, (cols, &x), &rows, range).map_err(text)?;
            let what = format!("gather_rows of {cols} columns, rows {range:?}");
            let (got, wanted) = (written(&device, &got)?, written(&Plain, &wanted)?);
            compare(&what, &got, &wanted, Tolerance::Rounded)?;
        }
    }
    Ok(())
}

fn refusals<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let zeros = |rows, cols| Tensor::zeros(&device, rows, cols).map_err(text);
    let exact = Tensor::exact_zeros(&device, 1, 8).map_err(text)?;
    refused("12 columns", device.add(&mut zeros(1, 12)?, &zeros(1, 12)?), "multiple of 8")?;
    refused("f32", device.add(&mut zeros(1, 8)?, &exact), "not bf16")?;
    refused("12 columns", device.silu_mul(&mut zeros(1, 12)?, &zeros(1, 24)?), "multiple of 8")?;
    let step = Indices { tokens: 3, ids: vec![0; 3], logit_rows: vec![0], ..Indices::default() };
    let (batch, x) = (step.batch(&device).map_err(text)?, zeros(2, 8)?);
    let few = device.gather_rows(&mut zeros(1, 8)?, &x, &batch, 0, 1);
    refused("rows of another step", few, "2 rows of a step of 3 tokens")
}
