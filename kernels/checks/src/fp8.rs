//! Quantisation to e4m3 and back.

use crate::flat::{refused, text, unwritten, written};
use crate::{BF16, Check, Device, Tolerance, compare, e4m3, noise, rounded};
use cuda::{Cuda, Driver, Fp8, Fp8Scaling};
use kernels::{KernelError, Tensor};

pub fn checks<D: Driver>() -> Vec<Check<D>> {
    vec![
        Check { name: "fp8: every bf16 to e4m3", run: every_bf16 },
        Check { name: "fp8: every e4m3 to bf16", run: every_code },
        Check { name: "fp8: a scale for each row", run: rows },
        Check { name: "fp8: rows of zeros, of NaN, small and large", run: odd_rows },
        Check { name: "fp8: one scale", run: one_scale },
        Check { name: "fp8: what is refused", run: refusals },
    ]
}

/// What an op left of codes and scales that were all ones, and two rows more than there were.
struct Quantised {
    codes: Vec<u8>,
    scales: Vec<f32>,
}

const GUARD: usize = 2;

fn quantise<D: Driver>(
    device: &Cuda<D>,
    x: &[f32],
    cols: usize,
    scaling: Fp8Scaling,
) -> Result<(Fp8<D>, Quantised), KernelError> {
    let driver = device.driver();
    let x = Tensor::from_host(device, cols, x)?;
    let mut out = Fp8::zeros(device, (x.rows + GUARD, cols), scaling)?;
    out.codes().write(driver, &vec![0xff; out.codes().bytes()])?;
    if scaling == Fp8Scaling::Row {
        out.scales().write(driver, &vec![0xff; out.scales().bytes()])?;
    }
    device.quantize_fp8(&mut out, &x)?;
    let (mut codes, mut scales) = (vec![0; out.codes().bytes()], vec![0; out.scales().bytes()]);
    out.codes().read(driver, &mut codes)?;
    out.scales().read(driver, &mut scales)?;
    let scales = scales.as_chunks::<4>().0.iter().map(|&v| f32::from_le_bytes(v)).collect();
    Ok((out, Quantised { codes, scales }))
}

impl Quantised {
    /// The codes of x, nothing behind them written.
    fn agree(&self, what: &str, x: &[f32], scale: impl Fn(usize) -> f32) -> Result<(), String> {
        let (codes, guard) = self.codes.split_at(x.len());
        if guard.iter().any(|&code| code != 0xff) {
            return Err(format!("{what}: written behind the codes"));
        }
        let scaled = x.iter().enumerate().map(|(at, v)| v * scale(at).recip());
        e4m3::compare(what, codes, &scaled.collect::<Vec<_>>())
    }
}

fn every_bf16<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let x: Vec<f32> = (0..=u16::MAX).map(|bits| half::bf16::from_bits(bits).to_f32()).collect();
    let (_, got) = quantise(&device, &x, 1024, Fp8Scaling::Tensor(1.0)).map_err(text)?;
    got.agree("every bf16", &x, |_| 1.0)
}

fn every_code<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let codes: Vec<u8> = (0..=255).collect();
    for scale in [1.0, 0.37] {
        let scaling = Fp8Scaling::Tensor(scale);
        let (fp8, _) = quantise(&device, &[0.0; 256], 64, scaling).map_err(text)?;
        fp8.codes().write(device.driver(), &codes).map_err(text)?;
        let mut out = unwritten(&device, 4, 64).map_err(text)?;
        device.dequantize_fp8(&mut out, &fp8).map_err(text)?;
        let value = |&code: &u8| e4m3::value(code).map_or(f32::NAN, |v| v as f32 * scale);
        let wanted: Vec<f32> = codes.iter().map(value).collect();
        let got = written(&device, &out)?;
        compare("every e4m3", &got, &wanted, Tolerance::Rounded)?;
        if got[0x80].is_sign_positive() || got[0].is_sign_negative() {
            return Err("zeros lose their sign".into());
        }
    }
    Ok(())
}

/// The scale of a row as f32 has it.
fn row_scale(row: &[f32]) -> f32 {
    let largest = row.iter().map(|v| v.abs()).fold(0.0, f32::max);
    (largest / 448.0).max(2f32.powi(-100))
}

fn rows<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let shapes = [(1, 8), (5, 1024), (2, 1032), (1, 8192), (2, 8200), (1, 24576), (1, 32768)];
    for (rows, cols) in shapes {
        let what = format!("rows [{rows}, {cols}]");
        let mut x = rounded(&noise(1, rows * cols));
        // The largest of a row is the last, then the first.
        for (row, x) in x.chunks_exact_mut(cols).enumerate() {
            x[if row % 2 == 0 { cols - 1 } else { 0 }] = -2.5 - row as f32;
        }
        let (fp8, got) = quantise(&device, &x, cols, Fp8Scaling::Row).map_err(text)?;
        let scales: Vec<f32> = x.chunks_exact(cols).map(row_scale).collect();
        if got.scales[..rows] != scales[..] || got.scales[rows..].iter().any(|s| !s.is_nan()) {
            return Err(format!("{what}: scales {:?}, wanted {scales:?}", got.scales));
        }
        got.agree(&what, &x, |at| scales[at / cols])?;
        let mut back = unwritten(&device, rows, cols).map_err(text)?;
        device.dequantize_fp8(&mut back, &fp8).map_err(text)?;
        let code = |(at, &code): (usize, &u8)| {
            e4m3::value(code).map_or(f32::NAN, |v| v as f32 * scales[at / cols])
        };
        let wanted: Vec<f32> = got.codes[..x.len()].iter().enumerate().map(code).collect();
        compare(&what, &written(&device, &back)?, &wanted, Tolerance::Rounded)?;
    }
    Ok(())
}

fn odd_rows<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    for cols in [1024, 1536] {
        let row = noise(2, cols);
        let scaled = |by: f32| row.iter().map(move |v| v * by);
        let mut x: Vec<f32> = scaled(0.0).chain(scaled(1e-36)).chain(scaled(1e36)).collect();
        x.extend(scaled(1.0));
        x.extend(scaled(1.0));
        x = rounded(&x);
        let (nan, infinity) = (3 * cols + 5, 4 * cols + cols - 1);
        (x[nan], x[infinity]) = (f32::NAN, f32::NEG_INFINITY);
        let (_, got) = quantise(&device, &x, cols, Fp8Scaling::Row).map_err(text)?;
        let scales: Vec<f32> = x.chunks_exact(cols).map(row_scale).collect();
        if got.scales[..5] != scales[..] {
            return Err(format!("scales {:?}, wanted {scales:?}", got.scales));
        }
        got.agree("odd rows", &x, |at| scales[at / cols])?;
        for at in [nan, infinity] {
            if e4m3::value(got.codes[at]).is_some() {
                return Err(format!("{} became {:#04x}", x[at], got.codes[at]));
            }
        }
    }
    Ok(())
}

fn one_scale<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    for (rows, cols, scale) in [(0, 8, 1.0), (1, 8, 0.01), (3, 1368, 0.0007), (1, 4104, 3.0)] {
        let x = rounded(&noise(3, rows * cols));
        let (fp8, got) = quantise(&device, &x, cols, Fp8Scaling::Tensor(scale)).map_err(text)?;
        got.agree(&format!("[{rows}, {cols}] by {scale}"), &x, |_| scale)?;
        if (fp8.rows(), fp8.cols()) != (rows, cols) || got.scales != [scale] {
            return Err(format!("{} rows with scales {:?}", fp8.rows(), got.scales));
        }
    }
    Ok(())
}

fn refusals<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    for scale in [0.0, -1.0, f32::INFINITY, f32::NAN, 1e-45] {
        let result = Fp8::zeros(&device, (1, 8), Fp8Scaling::Tensor(scale)).map(drop);
        refused("a scale", result, "finite inverse")?;
    }
    let quantised =
        |cols: usize| quantise(&device, &vec![1.0; cols], cols, Fp8Scaling::Row).map(drop);
    refused("32776 columns", quantised(32776), "32768 at most")?;
    refused("12 columns", quantised(12), "multiple of 8")?;
    let mut out = Fp8::zeros(&device, (1, 8), Fp8Scaling::Row).map_err(text)?;
    let x = Tensor::zeros(&device, 2, 8).map_err(text)?;
    refused("two rows for one", device.quantize_fp8(&mut out, &x), "out [1, 8]")
}
