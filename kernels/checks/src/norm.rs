//! rms_norm and add_rms_norm.

use crate::flat::{guarded, refused, text, unwritten, written};
use crate::{BF16, Check, Device, Tolerance, compare, noise, rounded};
use cuda::{Cuda, Driver};
use kernels::{Backend, KernelError, Tensor, plain::Plain};

pub fn checks<D: Driver>() -> Vec<Check<D>> {
    vec![
        Check { name: "rms_norm", run: rms_norm },
        Check { name: "add_rms_norm is add, then rms_norm", run: add_rms_norm },
        Check { name: "rms_norm: rows of zeros, of NaN, small and large", run: odd_rows },
        Check { name: "rms_norm: what is refused", run: refusals },
    ]
}

const EPS: f32 = 1e-6;

/// Rows and columns about the ends of what a warp and what each block holds.
const SHAPES: [(usize, usize); 13] = [
    (1, 8),
    (5, 64),
    (4, 896),
    (3, 1016),
    (9, 1024),
    (2, 1032),
    (2, 2048),
    (1, 2056),
    (2, 5120),
    (1, 8192),
    (2, 8200),
    (1, 16384),
    (0, 5120),
];

fn normed<B: Backend>(
    device: &B,
    x: &[f32],
    weight: &[f32],
    eps: f32,
) -> Result<Tensor<B>, KernelError> {
    let x = Tensor::from_host(device, weight.len(), x)?;
    let weight = Tensor::from_host(device, weight.len(), weight)?;
    let mut out = unwritten(device, x.rows, x.cols)?;
    device.rms_norm(&mut out, &x, &weight, eps)?;
    Ok(out)
}

/// Compares with the oracle and gives the device's rows.
fn agree<D: Driver>(
    device: &Cuda<D>,
    what: &str,
    (x, weight): (&[f32], &[f32]),
    eps: f32,
) -> Result<Vec<f32>, String> {
    let got = written(device, &normed(device, x, weight, eps).map_err(text)?)?;
    let wanted = written(&Plain, &normed(&Plain, x, weight, eps).map_err(text)?)?;
    compare(what, &got, &wanted, Tolerance::Ulps(1))?;
    Ok(got)
}

fn rms_norm<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    for (rows, cols) in SHAPES {
        let (x, weight) = (rounded(&noise(1, rows * cols)), rounded(&noise(2, cols)));
        agree(&device, &format!("rms_norm [{rows}, {cols}]"), (&x, &weight), EPS)?;
    }
    Ok(())
}

fn add_rms_norm<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    for (rows, cols) in SHAPES {
        let what = format!("add_rms_norm [{rows}, {cols}]");
        let (x, delta) = (rounded(&noise(3, rows * cols)), rounded(&noise(4, rows * cols)));
        let weight = rounded(&noise(5, cols));
        let run = || -> Result<_, KernelError> {
            let mut sum = guarded(&device, cols, &x)?;
            let delta = Tensor::from_host(&device, cols, &delta)?;
            let weight = Tensor::from_host(&device, cols, &weight)?;
            let mut out = unwritten(&device, rows, cols)?;
            device.add_rms_norm(&mut out, &mut sum, &delta, &weight, EPS)?;
            Ok((sum, out))
        };
        let (sum, out) = run().map_err(text)?;
        let (sum, out) = (written(&device, &sum)?, written(&device, &out)?);
        let wanted: Vec<f32> = x.iter().zip(&delta).map(|(x, d)| x + d).collect();
        compare(&what, &sum, &wanted, Tolerance::Rounded)?;
        let apart = agree(&device, &what, (&sum, &weight), EPS)?;
        if out.iter().zip(&apart).any(|(a, b)| a.to_bits() != b.to_bits()) {
            return Err(format!("{what}: other bits than add, then rms_norm"));
        }
    }
    Ok(())
}

fn odd_rows<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    for cols in [1024, 3584] {
        let row = noise(6, cols);
        let scaled = |by: f32| row.iter().map(move |v| v * by);
        // 1e-4 is near the square root of eps; the sum of 1e16's squares fits f32.
        let mut x: Vec<f32> =
            scaled(0.0).chain(scaled(1e-4)).chain(scaled(1e-20)).chain(scaled(1e16)).collect();
        x.extend(scaled(1.0));
        let weight = rounded(&noise(7, cols));
        let alone = agree(&device, "rows of all sizes", (&rounded(&x), &weight), EPS)?;
        x[3 * cols + 17] = f32::NAN;
        let beside = agree(&device, "a row with a NaN", (&rounded(&x), &weight), EPS)?;
        let other = |at: &usize| at / cols != 3;
        let same = |at: usize| alone[at].to_bits() == beside[at].to_bits();
        if !(0..x.len()).filter(other).all(same) {
            return Err("a NaN changes other rows".into());
        }
        agree(&device, "another eps", (&rounded(&x[..3 * cols]), &weight), 1e-2)?;
    }
    Ok(())
}

fn refusals<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let norm = |cols: usize| normed(&device, &vec![1.0; cols], &vec![1.0; cols], EPS).map(drop);
    refused("12 columns", norm(12), "multiple of 8")?;
    refused("16392 columns", norm(16392), "16384 at most")
}
