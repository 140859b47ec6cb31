//! Quantisation to e4m3 and back, bound by memory.

use super::{Bar, Bench, Prepare, Scale, Work, noisy};
use crate::BF16;
use cuda::{Cuda, Driver, Fp8, Fp8Scaling};
use kernels::Tensor;

pub fn benches<D: Driver>(scale: Scale) -> Vec<Bench<D>> {
    // What a 72B model's layers multiply: the hidden state, and what its down takes.
    let shapes: &[_] = scale.of(&[(16384, 8192), (16384, 24576)], &[(3, 64)]);
    let one = |&(rows, cols): &(usize, usize)| {
        let shape = (rows, cols);
        [
            bench("quantize_fp8, a scale a row", shape, 4 * rows, quantize(shape, Fp8Scaling::Row)),
            bench("quantize_fp8, one scale", shape, 0, quantize(shape, Fp8Scaling::Tensor(0.01))),
            bench("dequantize_fp8", shape, 4 * rows, dequantize(shape)),
        ]
    };
    shapes.iter().flat_map(one).collect()
}

/// Two bytes an element on one side, one on the other, and scales.
fn bench<D: Driver>(
    op: &'static str,
    (rows, cols): (usize, usize),
    scales: usize,
    prepare: Prepare<D>,
) -> Bench<D> {
    Bench {
        op,
        shape: format!("{rows} × {cols}"),
        config: BF16,
        work: Work::Bytes((3 * rows * cols + scales) as f64),
        bar: Bar::OfCopy(0.85),
        peer: None,
        prepare,
        baseline: None,
    }
}

fn quantize<D: Driver>((rows, cols): (usize, usize), scaling: Fp8Scaling) -> Prepare<D> {
    Box::new(move |device| {
        let (x, mut out) = (noisy(device, rows, cols)?, Fp8::zeros(device, (rows, cols), scaling)?);
        Ok(Box::new(move |device: &Cuda<D>| device.quantize_fp8(&mut out, &x)))
    })
}

fn dequantize<D: Driver>((rows, cols): (usize, usize)) -> Prepare<D> {
    Box::new(move |device| {
        let mut x = Fp8::zeros(device, (rows, cols), Fp8Scaling::Row)?;
        device.quantize_fp8(&mut x, &noisy(device, rows, cols)?)?;
        let mut out = Tensor::zeros(device, rows, cols)?;
        Ok(Box::new(move |device: &Cuda<D>| device.dequantize_fp8(&mut out, &x)))
    })
}
