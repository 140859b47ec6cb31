//! Products in bf16, the device's ceiling for arithmetic, and in fp8, on the shapes of a model's
//! layers.

use super::{Bar, Bench, Peer, Prepare, Scale, Work, noisy, noisy_weight};
use crate::BF16;
use cuda::{Cuda, CudaConfig, Driver, Fp8, Fp8Scaling, Gemm, Scales, WeightFormat};
use kernels::{Backend, Tensor};

/// What the device multiplies at best.
pub fn ceiling<D: Driver>(scale: Scale) -> Bench<D> {
    product(scale.of((8192, 8192, 8192), (5, 16, 24)))
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
    let shapes: &[_] = scale.of(
        // Rows of a decode and of a prefill by a 72B model's gate and up, and by its down.
        &[(16, 49152, 8192), (64, 49152, 8192), (8192, 49152, 8192), (8192, 8192, 24576)],
        &[(3, 16, 32)],
    );
    shapes.iter().flat_map(|&shape| [product(shape), fp8_product(shape)]).collect()
}

/// With the activations' rounding, beside the library's product of what is rounded already.
fn fp8_product<D: Driver>((m, n, k): (usize, usize, usize)) -> Bench<D> {
    let bytes = (2 * m * k + n * k + 2 * m * n) as f64;
    let flops = 2.0 * (m * n) as f64 * k as f64;
    Bench {
        op: "linear in fp8",
        shape: format!("{m} × [{n}, {k}]"),
        config: CudaConfig { weights: WeightFormat::Fp8, ..BF16 },
        work: if m < 256 { Work::Bytes(bytes) } else { Work::Flops(flops) },
        bar: Bar::Times(0.85),
        peer: None,
        prepare: prepared((m, n, k)),
        baseline: Some(rounded_already((m, n, k))),
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
        bar: Bar::None,
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
