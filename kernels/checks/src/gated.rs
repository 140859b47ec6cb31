//! silu(gate) · up behind their product: against the oracle, and with the bits of the two ops
//! apart, in every number of rows.

use crate::{
    BF16, Check, Device,
    flat::{refused, text, unwritten, written},
    int4::Matrix,
    linear::{FP8, Product, quantised, widened},
    noise, random, rounded,
};
use cuda::{Cuda, Driver, RECORDS_ROWS_MAX};
use kernels::{Backend, Format, KernelError, RandomFormat, Tensor, WeightPart};

pub fn checks<D: Driver>() -> Vec<Check<D>> {
    vec![
        Check { name: "gated: bf16", run: bf16 },
        Check { name: "gated: e4m3", run: e4m3 },
        Check { name: "gated: int4", run: int4 },
        Check { name: "gated: int4 from a seed", run: from_seed },
        Check { name: "gated: weights that are no pairs", run: no_pairs },
        Check { name: "gated: what is refused", run: refusals },
    ]
}

/// The ends of kernels' numbers of rows, and of what is multiplied at once; then the device's own
/// product.
const ROWS: [usize; 8] = [1, 3, 8, 33, 64, 65, RECORDS_ROWS_MAX, RECORDS_ROWS_MAX + 1];

type Weight<D> = <Cuda<D> as Backend>::Weight;

/// Gate and up [I, K] each.
struct Pair<'a> {
    parts: &'a [WeightPart<'a>],
    /// [2 I, K] as the device holds it.
    held: Vec<f64>,
    /// I and K.
    shape: (usize, usize),
}

impl Pair<'_> {
    fn x(&self, m: usize) -> Vec<f32> {
        rounded(&noise(9, m * self.shape.1))
    }

    fn fused<D: Driver>(
        &self,
        device: &Cuda<D>,
        weight: &Weight<D>,
        x: &[f32],
    ) -> Result<Vec<f32>, String> {
        let (i, k) = self.shape;
        let x = Tensor::from_host(device, k, x).map_err(text)?;
        let mut room = unwritten(device, x.rows, 2 * i).map_err(text)?;
        let mut out = unwritten(device, x.rows, i).map_err(text)?;
        device.gated(&mut out, &mut room, &x, weight).map_err(text)?;
        written(device, &room)?;
        written(device, &out)
    }

    fn apart<D: Driver>(
        &self,
        device: &Cuda<D>,
        weight: &Weight<D>,
        x: &[f32],
    ) -> Result<Vec<f32>, String> {
        let (i, k) = self.shape;
        let x = Tensor::from_host(device, k, x).map_err(text)?;
        let mut both = unwritten(device, x.rows, 2 * i).map_err(text)?;
        let mut out = unwritten(device, x.rows, i).map_err(text)?;
        device.linear(&mut both, &x, weight, None).map_err(text)?;
        device.silu_mul(&mut out, &both).map_err(text)?;
        written(device, &out)
    }

    /// Both ways for each number of rows, twice: what the first one leaves behind must not reach
    /// the second.
    fn agrees<D: Driver>(&self, device: &Cuda<D>, rows: &[usize]) -> Result<(), String> {
        let fused = device.gate_up(self.parts).map_err(text)?;
        let apart = device.weight(self.parts).map_err(text)?;
        for &m in rows {
            let (what, x) = (format!("{m} × {:?}", self.shape), self.x(m));
            let wanted = self.apart(device, &apart, &x)?;
            for run in 0..2 {
                let got = self.fused(device, &fused, &x)?;
                same_bits(&format!("{what}, run {run}"), &got, &wanted)?;
            }
            // The device's own product rounds what it takes.
            if m <= RECORDS_ROWS_MAX {
                self.near(&what, &x, &wanted)?;
            }
        }
        Ok(())
    }

    /// Within what the rounding of gate and up, and of the result, allows.
    fn near(&self, what: &str, x: &[f32], got: &[f32]) -> Result<(), String> {
        let (i, k) = self.shape;
        let sum = |x: &[f32], row: usize| {
            let terms = || x.iter().zip(&self.held[row * k..]).map(|(x, w)| f64::from(*x) * w);
            let sum = terms().sum::<f64>();
            (sum, 1e-6 * terms().map(f64::abs).sum::<f64>() + sum.abs() / 256.0)
        };
        for (at, got) in got.iter().enumerate() {
            let x = &x[at / i * k..][..k];
            let ((gate, gate_off), (up, up_off)) = (sum(x, at % i), sum(x, i + at % i));
            let silu = gate / (1.0 + (-gate).exp());
            let wanted = silu * up;
            // silu is nowhere steeper than 1.1.
            let silu_off = 1.1 * gate_off;
            let allowed =
                silu_off * (up.abs() + up_off) + silu.abs() * up_off + wanted.abs() / 128.0;
            // Said so that NaN is refused.
            let fits = (f64::from(*got) - wanted).abs() <= allowed;
            if !fits {
                return Err(format!("{what}: element {at} is {got}, wanted {wanted} ± {allowed}"));
            }
        }
        Ok(())
    }
}

fn same_bits(what: &str, got: &[f32], wanted: &[f32]) -> Result<(), String> {
    match got.iter().zip(wanted).position(|(a, b)| a.to_bits() != b.to_bits()) {
        None => Ok(()),
        Some(at) => Err(format!("{what}: element {at} is {}, {} apart", got[at], wanted[at])),
    }
}

/// I that end inside strips and tiles, K that end inside records.
const SHAPES: [((usize, usize), &[usize]); 3] =
    [((40, 144), &ROWS), ((8, 16), &[1, 65, 193]), ((136, 272), &[5, 17])];

/// Matrices of rows of very different sizes, so that no scale can stand for another's; in two parts
/// and in three, whose seams are not those of gate and up.
fn of_numbers<D: Driver>(device: &Cuda<D>, is_fp8: bool) -> Result<(), String> {
    for (seed, ((i, k), rows)) in SHAPES.into_iter().enumerate() {
        let product = Product::new(seed as u64, (0, 2 * i, k), false);
        let data = product.stored();
        let part = |rows: std::ops::Range<usize>| {
            let bytes = &data[rows.start * 2 * k..rows.end * 2 * k];
            WeightPart::plain(Format::Bf16, rows.len(), k, bytes)
        };
        let parts = match seed {
            0 => vec![part(0..i), part(i..2 * i)],
            _ => vec![part(0..3), part(3..i + 1), part(i + 1..2 * i)],
        };
        let held = match is_fp8 {
            true => quantised(&product.weight, k),
            false => widened(&product.weight),
        };
        Pair { parts: &parts, held, shape: (i, k) }.agrees(device, rows)?;
    }
    Ok(())
}

fn bf16<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    of_numbers(&device(BF16), false)
}

fn e4m3<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    of_numbers(&device(FP8), true)
}

/// Every length of groups, columns that begin inside one, and permuted ones.
fn int4<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let cases: [([usize; 4], bool, &[usize]); 4] = [
        ([40, 144, 128, 112], false, &ROWS),
        ([72, 256, 32, 0], false, &[9, 64]),
        ([16, 192, 64, 0], false, &[33]),
        ([24, 192, 64, 0], true, &[1, 10, 193]),
    ];
    for (seed, (shape, is_permuted, rows)) in cases.into_iter().enumerate() {
        let [i, k, ..] = shape;
        let matrices = [0, 1].map(|of| {
            let mut matrix = Matrix::new((100 + 10 * seed + of) as u64, shape);
            if is_permuted {
                matrix.column_groups = Some((0..k).map(|col| col * 3 / 7 % 3).collect());
            }
            matrix
        });
        let parts = matrices.each_ref().map(Matrix::part);
        let row = |at: usize| (0..k).map(move |col| (at, col));
        let held = (0..2 * i).flat_map(row);
        let held = held.map(|(at, col)| f64::from(matrices[at / i].weight(at % i, col))).collect();
        Pair { parts: &parts, held, shape: (i, k) }.agrees(&device, rows)?;
    }
    Ok(())
}

/// What the device makes is what the host makes, in the same places.
fn from_seed<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let shape = (40, 136);
    let random = random::stack(RandomFormat::Int4 { group: 32 }, &[40, 40], (8, 136));
    let made: Vec<_> = random.iter().map(|part| part.made().into_owned()).collect();
    for m in [3, RECORDS_ROWS_MAX + 1] {
        let [got, wanted] = [&random, &made].map(|parts| {
            let weight = device.gate_up(parts).map_err(text)?;
            let pair = Pair { parts, held: Vec::new(), shape };
            pair.fused(&device, &weight, &pair.x(m))
        });
        same_bits(&format!("{m} rows from a seed"), &got?, &wanted?)?;
    }
    Ok(())
}

/// Rows that lie one after another, in records and not, go through the two ops.
fn no_pairs<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let (i, k) = (24, 80);
    let product = Product::new(3, (0, 2 * i, k), false);
    let parts = [WeightPart::plain(Format::Bf16, 2 * i, k, product.stored())];
    let pair = Pair { parts: &parts, held: widened(&product.weight), shape: (i, k) };
    let x = pair.x(5);
    for weight in [device.weight(&parts), device.table(&parts)] {
        let weight = weight.map_err(text)?;
        let got = pair.fused(&device, &weight, &x)?;
        same_bits("no pairs", &got, &pair.apart(&device, &weight, &x)?)?;
        pair.near("no pairs", &x, &got)?;
    }
    Ok(())
}

fn refusals<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let weight = |rows: usize| {
        let part = WeightPart::plain(Format::Bf16, rows, 16, vec![0; rows * 32]);
        device.gate_up(&[part]).map_err(text)
    };
    let zeros = |cols| Tensor::zeros(&device, 1, cols).map_err(text);
    let gated = |rows: usize, out: usize| {
        let (mut out, mut room) = (zeros(out)?, zeros(rows)?);
        Ok::<Result<(), KernelError>, String>(device.gated(
            &mut out,
            &mut room,
            &zeros(16)?,
            &weight(rows)?,
        ))
    };
    refused("12 outputs", gated(24, 12)?, "multiple of 8")?;
    refused("another width", gated(32, 8)?, "silu_mul")?;
    let pairs = weight(32)?;
    refused("linear", device.linear(&mut zeros(32)?, &zeros(16)?, &pairs, None), "`gated` alone")?;
    let exact = Tensor::exact_zeros(&device, 1, 16).map_err(text)?;
    let narrow = device.gated(&mut zeros(16)?, &mut zeros(32)?, &exact, &pairs);
    refused("x in f32", narrow, "not bf16")
}
