//! Products in bf16, the device's ceiling for arithmetic, and in fp8, on the shapes of a model's
//! layers. Of few rows the weight's bytes are what bounds them, beside the device's copy.

use super::{Bar, Bench, Peer, Prepare, Scale, Work, noisy, noisy_table, noisy_weight};
use crate::BF16;
use cuda::{Cuda, CudaConfig, Driver, Fp8, Fp8Scaling, Gemm, Scales, WeightFormat};
use kernels::{Backend, Tensor};

/// Rows of a decode.
pub(super) const FEW: [usize; 4] = [1, 8, 32, 64];
/// Query, key and value, attention's output, gate and up, and down of Qwen2.5-72B on one card.
pub(super) const WHOLE: [(usize, usize); 4] =
    [(10240, 8192), (8192, 8192), (59136, 8192), (8192, 29568)];
/// The same of four cards that sum the second and the last; then those of Qwen-72B, which has keys
/// and values for every head, on one card and on four.
const OTHERS: [(usize, usize); 10] = [
    (2560, 8192),
    (8192, 2048),
    (14784, 8192),
    (8192, 7392),
    (24576, 8192),
    (49152, 8192),
    (8192, 24576),
    (6144, 8192),
    (12288, 8192),
    (8192, 6144),
];
/// What a product that reads its weight once is to reach of the copy.
pub(super) const OF_COPY: f64 = 0.92;

/// What the device's own product multiplies at best: of rows, as a table has them.
pub fn ceiling<D: Driver>(scale: Scale) -> Bench<D> {
    let (m, n, k) = scale.of((8192, 8192, 8192), (5, 16, 24));
    let prepare: Prepare<D> = Box::new(move |device| {
        let weight = noisy_table(device, n, k)?;
        let (x, mut out) = (noisy(device, m, k)?, Tensor::zeros(device, m, n)?);
        Ok(Box::new(move |device: &Cuda<D>| device.linear(&mut out, &x, &weight, None)))
    });
    Bench { prepare, ..product((m, n, k)) }
}

/// What it multiplies in e4m3, rounded already.
pub fn fp8_ceiling<D: Driver>(scale: Scale) -> Bench<D> {
    let shape = scale.of((8192, 8192, 8192), (5, 16, 32));
    let (m, n, k) = shape;
    let work = Work::Flops(2.0 * (m * n) as f64 * k as f64);
    let prepare = rounded_already(shape);
    Bench { work, bar: Bar::None, prepare, baseline: None, ..fp8_product(shape) }
}

pub fn benches<D: Driver>(scale: Scale) -> Vec<Bench<D>> {
    let few = |shapes: &[(usize, usize)]| -> Vec<(usize, usize, usize)> {
        let of = |m| shapes.iter().map(move |&(n, k)| (m, n, k)).collect::<Vec<_>>();
        FEW.into_iter().flat_map(of).collect()
    };
    // A prefill by gate and up, and by down.
    let many = [(8192, 49152, 8192), (8192, 8192, 24576)];
    let whole = scale.of(few(&WHOLE), vec![(3, 16, 32)]);
    let others = scale.of(few(&OTHERS), vec![(65, 16, 32)]);
    let many = scale.of(many.to_vec(), vec![(193, 16, 32)]);
    let narrow = whole.iter().chain(&many).map(|&shape| product(shape));
    let fp8 = whole.iter().chain(&others).chain(&many).map(|&shape| fp8_product(shape));
    narrow.chain(fp8).collect()
}

/// Few rows: the weight as it lies. Many: with the activations' rounding, beside the library's
/// product of what is rounded already.
fn fp8_product<D: Driver>((m, n, k): (usize, usize, usize)) -> Bench<D> {
    let bytes = (2 * m * k + n * k + 2 * m * n) as f64;
    let flops = 2.0 * (m * n) as f64 * k as f64;
    let few = m < 256;
    // Tensor cores bound 64.
    let bar = if m <= 32 { Bar::OfCopy(OF_COPY) } else { Bar::None };
    Bench {
        op: "linear in fp8",
        shape: format!("{m} × [{n}, {k}]"),
        config: CudaConfig { weights: WeightFormat::Fp8, ..BF16 },
        work: if few { Work::Bytes(bytes) } else { Work::Flops(flops) },
        bar: if few { bar } else { Bar::Times(0.85) },
        peer: None,
        prepare: prepared((m, n, k)),
        baseline: (!few).then(|| rounded_already((m, n, k))),
    }
}

/// As [`fp8_product`], of x in e4m3; in bf16 on devices without such products.
fn rounded_already<D: Driver>((m, n, k): (usize, usize, usize)) -> Prepare<D> {
    Box::new(move |device| {
        if !device.driver().facts().fp8_products() {
            return prepared((m, n, k))(device);
        }
        let quantised = |rows| {
            let mut codes = Fp8::zeros(device, (rows, k), Fp8Scaling::Row)?;
            device.quantize_fp8(&mut codes, &noisy(device, rows, k)?)?;
            Ok::<_, kernels::KernelError>(codes)
        };
        let (x, weight) = (quantised(m)?, quantised(n)?);
        let out = Tensor::<Cuda<D>>::zeros(device, m, n)?;
        Ok(Box::new(move |device: &Cuda<D>| {
            let driver = device.driver();
            driver.gemm(Gemm {
                out: out.data.address(driver),
                out_element: out.data.element(),
                x: x.codes().address(driver),
                weight: weight.codes().address(driver),
                scales: Some(Scales {
                    x: x.scales().address(driver),
                    weight: weight.scales().address(driver),
                }),
                bias: None,
                m,
                n,
                k,
            })
        }))
    })
}

fn product<D: Driver>((m, n, k): (usize, usize, usize)) -> Bench<D> {
    let bytes = 2.0 * (m * k + n * k + m * n) as f64;
    let flops = 2.0 * (m * n) as f64 * k as f64;
    Bench {
        op: "linear",
        shape: format!("{m} × [{n}, {k}]"),
        config: BF16,
        // Below some hundred rows the weight's bytes bound it.
        work: if m < 256 { Work::Bytes(bytes) } else { Work::Flops(flops) },
        bar: if m < 256 { Bar::OfCopy(OF_COPY) } else { Bar::None },
        peer: Some(Peer::Product { m, n, k }),
        prepare: prepared((m, n, k)),
        baseline: None,
    }
}

/// x [m, k] · weight [n, k]ᵀ.
pub(super) fn prepared<D: Driver>((m, n, k): (usize, usize, usize)) -> Prepare<D> {
    Box::new(move |device| {
        let weight = noisy_weight(device, n, k)?;
        let (x, mut out) = (noisy(device, m, k)?, Tensor::zeros(device, m, n)?);
        Ok(Box::new(move |device: &Cuda<D>| device.linear(&mut out, &x, &weight, None)))
    })
}
