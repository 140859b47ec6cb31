//! Products with 4-bit weights, beside those with the same weight in bf16.

use super::linear::{self, FEW, WHOLE};
use super::{Bar, Bench, Prepare, Scale, Work, noisy, parts_of};
use crate::{BF16, noise};
use cuda::{Cuda, Driver, RECORDS_ROWS_MAX};
use half::f16;
use kernels::{Backend, Grouped, Groups, KernelError, Stored, Tensor, WeightPart};

/// Columns with one scale.
const GROUP: usize = 128;

pub fn benches<D: Driver>(scale: Scale) -> Vec<Bench<D>> {
    let shapes: &[_] = scale.of(&WHOLE, &[(16, 256)]);
    let few = FEW.into_iter().chain([16, 256]).collect();
    let tokens: Vec<usize> = scale.of(few, vec![1, RECORDS_ROWS_MAX + 1]);
    let shapes = shapes.iter().flat_map(|&(n, k)| tokens.iter().map(move |&m| (m, n, k)));
    shapes.map(product).collect()
}

fn product<D: Driver>((m, n, k): (usize, usize, usize)) -> Bench<D> {
    let in_records = m <= RECORDS_ROWS_MAX;
    let weight = weight_bytes((n, k));
    // As bf16 it is written, then read.
    let unpacked = if in_records { 0 } else { 2 * 2 * n * k };
    let bar = match m {
        0..=8 => Bar::OfCopy(linear::OF_COPY),
        9..=16 => Bar::Times(3.0),
        _ => Bar::None,
    };
    Bench {
        op: if in_records { "int4 linear" } else { "int4 linear, dequantised" },
        shape: format!("{m} × [{n}, {k}], groups of {GROUP}"),
        config: BF16,
        work: Work::Bytes((weight + unpacked + 2 * m * (k + n)) as f64),
        bar,
        peer: None,
        prepare: prepared((m, n, k)),
        // Beside a weight of bf16.
        baseline: (m == 16).then(|| linear::prepared((m, n, k))),
    }
}

fn prepared<D: Driver>((m, n, k): (usize, usize, usize)) -> Prepare<D> {
    Box::new(move |device| {
        let weight = weight((n, k), |parts| device.weight(parts))?;
        let (x, mut out) = (noisy(device, m, k)?, Tensor::zeros(device, m, n)?);
        Ok(Box::new(move |device: &Cuda<D>| device.linear(&mut out, &x, &weight, None)))
    })
}

/// [n, k] of noise in groups of 128, as `upload` takes it.
pub(super) fn weight<W>(
    (n, k): (usize, usize),
    upload: impl FnOnce(&[WeightPart<'_>]) -> Result<W, KernelError>,
) -> Result<W, KernelError> {
    let integer = |v: &f32| ((v + 1.0) * 8.0) as u8 & 15;
    let most = parts_of(n, k).next().unwrap_or(0) * k;
    let piece: Vec<u8> = noise(9, most).iter().map(integer).collect();
    let piece = Grouped::packed(4, k, &piece);
    let part = |rows: usize| {
        let count = rows * k.div_ceil(GROUP);
        let stored = Stored::Grouped(Grouped {
            bits: 4,
            values: (&piece[..rows * k / 2]).into(),
            groups: Groups::Runs { size: GROUP, first: 0 },
            scales: vec![f16::ONE; count],
            zeros: vec![8; count],
        });
        WeightPart { rows, cols: k, stored }
    };
    upload(&parts_of(n, k).map(part).collect::<Vec<_>>())
}

/// Bytes of it: a number in half a byte, and 4 bytes of scale and zero point for each group of a
/// row.
pub(super) fn weight_bytes((n, k): (usize, usize)) -> usize {
    n * k / 2 + 4 * n * k.div_ceil(GROUP)
}
