//! Weights that the device makes from a seed are those that the host makes, bit for bit.

use crate::{BF16, Check, Device, noise, rounded};
use cuda::{Cuda, CudaConfig, Driver, RECORDS_ROWS_MAX, WeightFormat};
use kernels::{Backend, KernelError, Random, RandomFormat, Stored, Tensor, WeightPart};

pub fn checks<D: Driver>() -> Vec<Check<D>> {
    vec![
        Check { name: "random weights in bf16", run: bf16 },
        Check { name: "random weights rounded to fp8", run: fp8 },
        Check { name: "random weights in int4", run: int4 },
    ]
}

/// Matrices of a stack, each from a seed of its own, beginning inside a larger one.
pub(crate) fn stack(format: RandomFormat, rows: &[usize], (first, cols): (usize, usize)) -> Parts {
    let part = |(index, rows): (usize, &usize)| {
        let seed = 0x1234_5678_9abc_def0 + index as u64;
        let random = Random { seed, first_row: 7 * index, first_col: first, format };
        WeightPart { rows: *rows, cols, stored: Stored::Random(random) }
    };
    rows.iter().enumerate().map(part).collect()
}

pub(crate) type Parts = Vec<WeightPart<'static>>;

/// A product of `tokens` rows with a weight, in f32.
fn product<D: Driver>(
    device: &Cuda<D>,
    parts: &[WeightPart<'_>],
    tokens: usize,
) -> Result<Vec<f32>, KernelError> {
    let (rows, cols) = WeightPart::check(parts)?;
    let weight = device.weight(parts)?;
    let x = Tensor::from_host(device, cols, &rounded(&noise(5, tokens * cols)))?;
    let mut out = Tensor::exact_zeros(device, tokens, rows)?;
    device.linear(&mut out, &x, &weight, None)?;
    let mut values = vec![0.0; tokens * rows];
    device.read_floats(&mut values, &out.data)?;
    Ok(values)
}

fn same<D: Driver>(
    device: &Cuda<D>,
    parts: &[WeightPart<'_>],
    tokens: usize,
) -> Result<(), String> {
    let made: Vec<_> = parts.iter().map(|part| part.made().into_owned()).collect();
    let text = |error: KernelError| error.to_string();
    let got = product(device, parts, tokens).map_err(text)?;
    let wanted = product(device, &made, tokens).map_err(text)?;
    if wanted.iter().all(|value| *value == 0.0) {
        return Err("all results are zero".into());
    }
    match got.iter().zip(&wanted).position(|(got, wanted)| got.to_bits() != wanted.to_bits()) {
        None => Ok(()),
        Some(at) => Err(format!("{tokens} rows: {} at {at}, wanted {}", got[at], wanted[at])),
    }
}

fn bf16<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    same(&device, &stack(RandomFormat::Bf16, &[40, 24, 8], (72, 72)), 3)?;
    same(&device, &stack(RandomFormat::Bf16, &[300], (0, 64)), 1)
}

fn fp8<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(CudaConfig { weights: WeightFormat::Fp8, ..BF16 });
    same(&device, &stack(RandomFormat::Bf16, &[48, 16], (16, 64)), 3)
}

fn int4<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let int4 = |group| RandomFormat::Int4 { group };
    // The last strip, stage and group are not whole, and the first group has begun before.
    same(&device, &stack(int4(32), &[72, 24, 8], (8, 136)), 3)?;
    same(&device, &stack(int4(128), &[200], (0, 256)), 3)?;
    // By the weight in bf16, and by what no kernel takes as it is.
    same(&device, &stack(int4(64), &[64], (64, 192)), RECORDS_ROWS_MAX + 1)?;
    same(&device, &stack(int4(64), &[12], (0, 64)), 2)
}
