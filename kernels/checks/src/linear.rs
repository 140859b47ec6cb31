//! Products with weights in bf16 and in e4m3, uploaded from every kind of storage.

use crate::{BF16, Check, Device, Tolerance, compare, e4m3, flat::refused, noise, rounded};
use cuda::{Cuda, CudaConfig, Driver, WeightFormat};
use kernels::{Backend, Format, KernelError, Scaled, Stored, Tensor, WeightPart, plain::dequant};

pub fn checks<D: Driver>() -> Vec<Check<D>> {
    vec![
        Check { name: "linear in bf16", run: narrow },
        Check { name: "linear in fp8", run: fp8 },
        Check { name: "linear: parts of every storage", run: parts },
        Check { name: "linear: a weight in several pieces", run: pieces },
        Check { name: "linear: e4m3 as stored", run: stored_e4m3 },
        Check { name: "linear: tables and odd sizes stay bf16 beside fp8", run: exempt },
        Check { name: "linear: what is refused", run: refusals },
    ]
}

pub(crate) const FP8: CudaConfig = CudaConfig { weights: WeightFormat::Fp8, ..BF16 };

/// Written where no op may write.
const CANARY: f32 = 77.0;

/// A product x [m, k] · weight [n, k]ᵀ (+ bias).
pub(crate) struct Product {
    pub shape: (usize, usize, usize),
    pub x: Vec<f32>,
    pub weight: Vec<f32>,
    pub bias: Option<Vec<f32>>,
}

impl Product {
    /// Rows of very different sizes, so that no scale can stand for another's.
    pub fn new(seed: u64, (m, n, k): (usize, usize, usize), bias: bool) -> Self {
        let sized = |seed, rows: usize| -> Vec<f32> {
            let size = |row: usize| [1.0, 0.04, 6.0, 0.5, 25.0][row % 5];
            let values = noise(seed, rows * k).into_iter().enumerate();
            rounded(&values.map(|(at, v)| v * size(at / k)).collect::<Vec<_>>())
        };
        let bias = bias.then(|| rounded(&noise(seed + 2, n)));
        Self { shape: (m, n, k), x: sized(seed, m), weight: sized(seed + 1, n), bias }
    }

    pub fn stored(&self) -> Vec<u8> {
        let bf16 = |v: &f32| half::bf16::from_f32(*v).to_le_bytes();
        self.weight.iter().flat_map(bf16).collect()
    }

    /// On the device; the row behind the last is looked at too.
    pub fn run<D: Driver>(
        &self,
        device: &Cuda<D>,
        weight: &<Cuda<D> as Backend>::Weight,
        exact: bool,
    ) -> Result<Vec<f32>, String> {
        let text = |error: KernelError| error.to_string();
        let (m, n, k) = self.shape;
        let x = [&self.x[..], &vec![f32::NAN; k]].concat();
        let mut x = Tensor::from_host(device, k, &x).map_err(text)?;
        let bias = self.bias.as_ref().map(|bias| Tensor::from_host(device, n, bias));
        let bias = bias.transpose().map_err(text)?;
        let mut got = vec![CANARY; (m + 1) * n];
        let out = match exact {
            true => Tensor::exact_from_host(device, n, &got),
            false => Tensor::from_host(device, n, &got),
        };
        let mut out = out.map_err(text)?;
        (x.rows, out.rows) = (m, m);
        device.linear(&mut out, &x, weight, bias.as_ref()).map_err(text)?;
        device.read_floats(&mut got, &out.data).map_err(text)?;
        if got.split_off(m * n).iter().any(|&v| v != CANARY) {
            return Err("a row past the last was written".into());
        }
        Ok(got)
    }

    /// In f64, and for each result the sum of its terms' sizes, which bounds its rounding.
    pub fn oracle(&self, x: &[f64], weight: &[f64]) -> Vec<(f64, f64)> {
        let (_, n, k) = self.shape;
        let bias = |col: usize| self.bias.as_ref().map_or(0.0, |bias| f64::from(bias[col]));
        let one = |x: &[f64], col: usize| {
            let terms = || x.iter().zip(&weight[col * k..]).map(|(x, w)| x * w);
            (terms().sum::<f64>() + bias(col), terms().map(f64::abs).sum::<f64>())
        };
        x.chunks_exact(k).flat_map(|x| (0..n).map(move |col| one(x, col))).collect()
    }
}

/// `Ok` where every result is within `share` of the sum of its terms' sizes, or one step of bf16.
pub(crate) fn near(
    what: &str,
    got: &[f32],
    wanted: &[(f64, f64)],
    share: f64,
) -> Result<(), String> {
    for (at, (&got, &(wanted, sizes))) in got.iter().zip(wanted).enumerate() {
        let allowed = share * sizes + wanted.abs() / 256.0;
        // Said so that NaN is refused.
        let fits = (f64::from(got) - wanted).abs() <= allowed;
        if !fits {
            return Err(format!("{what}: element {at} is {got}, wanted {wanted} ± {allowed}"));
        }
    }
    Ok(())
}

pub(crate) fn widened(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

/// Rows as e4m3 with a scale each holds them.
pub(crate) fn quantised(values: &[f32], cols: usize) -> Vec<f64> {
    let row = |row: &[f32]| -> Vec<f64> {
        let scale = row.iter().fold(0.0f32, |largest, v| largest.max(v.abs())) / 448.0;
        let code = |v: &f32| e4m3::nearest(v * scale.recip()).and_then(e4m3::value);
        row.iter().map(|v| code(v).unwrap_or(f64::NAN) * f64::from(scale)).collect()
    };
    values.chunks_exact(cols).flat_map(row).collect()
}

const SHAPES: [(usize, usize, usize); 5] =
    [(1, 16, 16), (3, 48, 64), (17, 32, 208), (2, 16, 1040), (5, 144, 32)];

fn narrow<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    for (seed, shape) in SHAPES.into_iter().chain([(2, 8, 24), (1, 24, 8)]).enumerate() {
        for bias in [false, true] {
            let product = Product::new(seed as u64, shape, bias);
            let data = product.stored();
            let weight = uploaded(&data, shape, |parts| device.weight(parts))?;
            let got = product.run(&device, &weight, !bias)?;
            let wanted = product.oracle(&widened(&product.x), &widened(&product.weight));
            near(&format!("{shape:?}"), &got, &wanted, 1e-6)?;
        }
    }
    Ok(())
}

/// Weights rounded to e4m3, activations as they are.
fn fp8<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(FP8);
    for (seed, shape) in SHAPES.into_iter().enumerate() {
        for bias in [false, true] {
            let product = Product::new(seed as u64, shape, bias);
            let data = product.stored();
            let weight = uploaded(&data, shape, |parts| device.weight(parts))?;
            let got = product.run(&device, &weight, !bias)?;
            let weight = quantised(&product.weight, shape.2);
            let wanted = product.oracle(&widened(&product.x), &weight);
            near(&format!("{shape:?}"), &got, &wanted, 1e-6)?;
        }
    }
    Ok(())
}

/// A weight [n, k] stored in bf16, as `upload` takes it.
pub(crate) fn uploaded<W>(
    data: &[u8],
    (_, n, k): (usize, usize, usize),
    upload: impl Fn(&[WeightPart<'_>]) -> Result<W, KernelError>,
) -> Result<W, String> {
    upload(&[part(Format::Bf16, n, k, data)]).map_err(|error| error.to_string())
}

fn part(format: Format, rows: usize, cols: usize, data: &[u8]) -> WeightPart<'_> {
    WeightPart::plain(format, rows, cols, data)
}

/// Rows in f32 and bf16 on top of each other.
fn parts<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let shape = (3, 48, 32);
    let product = Product::new(7, shape, true);
    let rows = |range: std::ops::Range<usize>| &product.weight[range.start * 32..range.end * 32];
    let f32s: Vec<u8> = rows(0..10).iter().flat_map(|v| v.to_le_bytes()).collect();
    let bf16s: Vec<u8> = product.stored()[10 * 64..48 * 64].to_vec();
    let parts = [part(Format::F32, 10, 32, &f32s), part(Format::Bf16, 38, 32, &bf16s)];
    for config in [BF16, FP8] {
        let device = device(config);
        let stacked = device.weight(&parts).map_err(|error| error.to_string())?;
        let data = product.stored();
        let whole = uploaded(&data, shape, |parts| device.weight(parts))?;
        let got = product.run(&device, &stacked, false)?;
        let wanted = product.run(&device, &whole, false)?;
        compare("parts beside a whole", &got, &wanted, Tolerance::Rounded)?;
    }
    Ok(())
}

/// More bytes than are sent at once, the last piece shorter, from one storage that is sent as it is
/// and one that is not.
fn pieces<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let shape = (1, 336, 16384);
    let product = Product::new(11, shape, false);
    let f32s: Vec<u8> = product.weight.iter().flat_map(|v| v.to_le_bytes()).collect();
    let bf16s = product.stored();
    let (x, weight) = (&product.x, &product.weight);
    let wanted = product.oracle(&widened(x), &widened(weight));
    for (format, data) in [(Format::Bf16, &bf16s), (Format::F32, &f32s)] {
        for (config, share) in [(BF16, 1e-6), (FP8, 0.02)] {
            let device = device(config);
            let weight = device.weight(&[part(format, 336, 16384, data)]);
            let weight = weight.map_err(|error| error.to_string())?;
            let got = product.run(&device, &weight, true)?;
            near(&format!("{format:?} in pieces, {config:?}"), &got, &wanted, share)?;
        }
    }
    Ok(())
}

/// Codes that the device widens give the bits of the numbers that they stand for, rounded here.
fn stored_e4m3<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    // The last is more than a piece; of the others one has runs that the host must widen.
    let shapes: [[usize; 3]; 4] =
        [[48, 64, 64], [24, 256, 128], [16, 160, 128], [260, 16384, 16384]];
    for [rows, cols, run] in shapes {
        let codes =
            (0..rows * cols).map(|at| (at * 37 % 251) as u8).map(|code| match code & 0x7f {
                0x7f => 0x11,
                _ => code,
            });
        let codes: Vec<u8> = codes.collect();
        let count = rows * cols.div_ceil(run);
        let scales = noise(31, count).iter().map(|scale| scale / 300.0).collect();
        let scaled = Scaled { values: codes.into(), run, scales };
        let stored = WeightPart { rows, cols, stored: Stored::Scaled(scaled) };
        let mut row = vec![0.0; cols];
        let widened = (0..rows).flat_map(|n| {
            dequant::part_row(&stored, n, &mut row);
            row.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>()
        });
        let widened = WeightPart::plain(Format::F32, rows, cols, widened.collect::<Vec<u8>>());
        let product = Product::new(32, (1, rows, cols), false);
        let configs = if cols < 1000 { &[BF16, FP8][..] } else { &[BF16] };
        for &config in configs {
            let device = device(config);
            let run = |part: &WeightPart<'_>| {
                let text = |error: KernelError| error.to_string();
                let parts = std::slice::from_ref(part);
                let weight = device.weight(parts).map_err(text)?;
                let table = device.table(parts).map_err(text)?;
                let both =
                    [product.run(&device, &weight, true)?, product.run(&device, &table, true)?];
                Ok::<_, String>(both.concat())
            };
            let (got, wanted) = (run(&stored)?, run(&widened)?);
            let what = format!("[{rows}, {cols}] of e4m3, {config:?}");
            compare(&what, &got, &wanted, Tolerance::Absolute(0.0))?;
        }
    }
    Ok(())
}

fn exempt<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let (narrow, fp8) = (device(BF16), device(FP8));
    for shape in [(2, 24, 32), (3, 16, 40)] {
        let product = Product::new(5, shape, false);
        let data = product.stored();
        let odd = uploaded(&data, shape, |parts| fp8.weight(parts))?;
        let wanted = uploaded(&data, shape, |parts| narrow.weight(parts))?;
        let (got, wanted) = (product.run(&fp8, &odd, true)?, product.run(&narrow, &wanted, true)?);
        compare("odd sizes", &got, &wanted, Tolerance::Absolute(0.0))?;
    }
    let shape = (2, 32, 32);
    let product = Product::new(6, shape, false);
    let data = product.stored();
    let table = uploaded(&data, shape, |parts| fp8.table(parts))?;
    let got = product.run(&fp8, &table, true)?;
    let wanted = product.oracle(&widened(&product.x), &widened(&product.weight));
    near("a table", &got, &wanted, 1e-6)
}

fn refusals<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(FP8);
    let shape = (1, 16, 16);
    let product = Product::new(8, shape, true);
    let data = product.stored();
    let weight = uploaded(&data, shape, |parts| device.weight(parts))?;
    let exact = product.run(&device, &weight, true);
    let message = exact.err().unwrap_or_default();
    if !message.contains("no output in f32 takes a bias") {
        return Err(format!("a bias beside f32 was answered by: {message}"));
    }
    let text = |error: KernelError| error.to_string();
    let batch = crate::flat::Indices { tokens: 1, ids: vec![3], ..Default::default() };
    let batch = batch.batch(&device).map_err(text)?;
    let mut out = Tensor::zeros(&device, 1, 16).map_err(text)?;
    let looked_up = device.embed(&mut out, &weight, 0, &batch);
    refused("rows in fp8 looked up", looked_up, "upload the matrix as a table")
}
