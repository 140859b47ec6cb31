//! Products of the device's library at 33 numbers of rows in succession, for whose next power of
//! two it chooses its algorithm: one that it refuses at another number shows here.

use crate::{BF16, Check, Device};
use cuda::{Cuda, CudaConfig, Driver, RECORDS_ROWS_MAX, WeightFormat};
use kernels::{Backend, Format, KernelError, Tensor, WeightPart};

const ROWS: usize = 33;

pub fn checks<D: Driver>() -> Vec<Check<D>> {
    vec![
        Check { name: "linear in bf16 for 1 to 33 rows", run: bf16 },
        Check { name: "linear in fp8 for 33 more rows than records take", run: fp8 },
    ]
}

/// A table is multiplied by the library alone.
fn bf16<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let table = |parts: &[WeightPart<'_>]| device.table(parts);
    [(96, 256), (256, 2048)].into_iter().try_for_each(|shape| with(&device, &table, shape, 1))
}

fn fp8<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(CudaConfig { weights: WeightFormat::Fp8, ..BF16 });
    with(&device, &|parts| device.weight(parts), (96, 256), RECORDS_ROWS_MAX + 1)
}

/// -2 to 2: rows of these are exact in e4m3 with a scale of 2 / 448, and sums of K products of
/// them are exact in f32.
fn value(seed: usize, at: usize) -> f32 {
    [0.0, 2.0, -1.0, 0.0, 1.0, -2.0, 0.0][(at.wrapping_mul(seed) >> 3) % 61 % 7]
}

type Upload<'a, D> =
    &'a dyn Fn(&[WeightPart<'_>]) -> Result<<Cuda<D> as Backend>::Weight, KernelError>;

/// Products of `first` rows and more by a weight [n, k].
fn with<D: Driver>(
    device: &Cuda<D>,
    upload: Upload<'_, D>,
    (n, k): (usize, usize),
    first: usize,
) -> Result<(), String> {
    let rows_max = first + ROWS - 1;
    let text = |error: KernelError| error.to_string();
    let weight: Vec<f32> = (0..n * k).map(|at| value(7919, at)).collect();
    let stored: Vec<u8> =
        weight.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
    let uploaded = upload(&[WeightPart::plain(Format::Bf16, n, k, stored)]);
    let uploaded = uploaded.map_err(text)?;
    let bias: Vec<f32> = (0..n).map(|at| value(104_729, at)).collect();
    let added = Tensor::from_host(device, n, &bias).map_err(text)?;
    let x: Vec<f32> = (0..rows_max * k).map(|at| value(15_485_863, at)).collect();
    let sum = |at: usize| -> f32 {
        let terms = x[at / n * k..][..k].iter().zip(&weight[at % n * k..]);
        terms.map(|(x, w)| x * w).sum()
    };
    let sums: Vec<f32> = (0..rows_max * n).map(sum).collect();
    let mut x = Tensor::from_host(device, k, &x).map_err(text)?;
    for rows in first..=rows_max {
        x.rows = rows;
        for with_bias in [false, true] {
            let mut out = Tensor::zeros(device, rows, n).map_err(text)?;
            let added = with_bias.then_some(&added);
            device.linear(&mut out, &x, &uploaded, added).map_err(text)?;
            let mut got = vec![0.0; rows * n];
            device.read_floats(&mut got, &out.data).map_err(text)?;
            for (at, (got, sum)) in got.into_iter().zip(&sums).enumerate() {
                let wanted = if with_bias { sum + bias[at % n] } else { *sum };
                // A step of bf16; said so that NaN is refused.
                let near = (got - wanted).abs() <= wanted.abs() / 128.0 + 1e-2;
                if !near {
                    let (row, col) = (at / n, at % n);
                    return Err(format!(
                        "{rows} rows by [{n}, {k}], bias {with_bias}: row {row}, output {col} is \
                         {got}, wanted {wanted}"
                    ));
                }
            }
        }
    }
    Ok(())
}
