//! Products at every number of rows from 1 to 33, where the device's library chooses its algorithm
//! for a power of two of them: one that it refuses at another number shows here.

use crate::{BF16, Check, Device};
use cuda::{CudaConfig, Driver, WeightFormat};
use kernels::{Backend, Format, KernelError, Tensor, WeightPart};

const ROWS_MAX: usize = 33;
const N: usize = 96;
const K: usize = 256;

pub fn checks<D: Driver>() -> Vec<Check<D>> {
    vec![
        Check { name: "linear in bf16 for 1 to 33 rows", run: |device| every(device, BF16) },
        Check {
            name: "linear in fp8 for 1 to 33 rows",
            run: |device| every(device, CudaConfig { weights: WeightFormat::Fp8, ..BF16 }),
        },
    ]
}

/// -2 to 2: rows of these are exact in e4m3 with a scale of 2 / 448, and sums of K products of
/// them are exact in f32.
fn value(seed: usize, at: usize) -> f32 {
    [0.0, 2.0, -1.0, 0.0, 1.0, -2.0, 0.0][(at.wrapping_mul(seed) >> 3) % 61 % 7]
}

fn every<D: Driver>(device: Device<'_, D>, config: CudaConfig) -> Result<(), String> {
    let device = device(config);
    let text = |error: KernelError| error.to_string();
    let weight: Vec<f32> = (0..N * K).map(|at| value(7919, at)).collect();
    let stored: Vec<u8> =
        weight.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
    let uploaded = device.weight(&[WeightPart::plain(Format::Bf16, N, K, stored)]);
    let uploaded = uploaded.map_err(text)?;
    let bias: Vec<f32> = (0..N).map(|at| value(104_729, at)).collect();
    let added = Tensor::from_host(&device, N, &bias).map_err(text)?;
    for rows in 1..=ROWS_MAX {
        let x: Vec<f32> = (0..rows * K).map(|at| value(15_485_863, at + rows)).collect();
        let on_device = Tensor::from_host(&device, K, &x).map_err(text)?;
        for bias in [None, Some(&bias)] {
            let mut out = Tensor::zeros(&device, rows, N).map_err(text)?;
            let added = bias.map(|_| &added);
            device.linear(&mut out, &on_device, &uploaded, added).map_err(text)?;
            let mut got = vec![0.0; rows * N];
            device.read_floats(&mut got, &out.data).map_err(text)?;
            for (at, got) in got.into_iter().enumerate() {
                let (row, col) = (at / N, at % N);
                let terms = x[row * K..][..K].iter().zip(&weight[col * K..]);
                let sum: f32 = terms.map(|(x, w)| x * w).sum();
                let wanted = sum + bias.map_or(0.0, |bias| bias[col]);
                // A step of bf16; said so that NaN is refused.
                let near = (got - wanted).abs() <= wanted.abs() / 128.0 + 1e-3;
                if !near {
                    let bias = if bias.is_some() { ", bias" } else { "" };
                    return Err(format!(
                        "{rows} rows{bias}: row {row}, output {col} is {got}, wanted {wanted}"
                    ));
                }
            }
        }
    }
    Ok(())
}
