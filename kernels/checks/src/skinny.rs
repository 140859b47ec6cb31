//! Products with weights in records: every number of rows that has a kernel of its own and its
//! neighbours, rows and columns that end inside records, more records than a ring has stages, and
//! the same bits for a row in every company.

use crate::{
    BF16, Check, Device,
    linear::{FP8, Product, near, quantised, uploaded, widened},
};
use cuda::{Cuda, CudaConfig, Driver, RECORDS_ROWS_MAX};
use kernels::Backend;

pub fn checks<D: Driver>() -> Vec<Check<D>> {
    vec![
        Check { name: "records: rows of bf16", run: rows_of_bf16 },
        Check { name: "records: rows of e4m3", run: rows_of_e4m3 },
        Check { name: "records: ends of rows and columns of bf16", run: ends_of_bf16 },
        Check { name: "records: ends of rows and columns of e4m3", run: ends_of_e4m3 },
        Check { name: "records: many columns", run: many_columns },
        Check { name: "records: more rows than they are multiplied with", run: unpacked },
        Check { name: "records: a row alone and in company", run: company },
    ]
}

/// Kernels take 8, 16, 32 and 64.
const ROWS: [usize; 8] = [1, 2, 7, 8, 9, 16, 33, 64];

/// The product against the oracle, both types of output, the second of two runs: what the first one
/// leaves behind must not reach the second.
fn agrees<D: Driver>(device: &Cuda<D>, product: &Product, is_fp8: bool) -> Result<(), String> {
    let shape = product.shape;
    let data = product.stored();
    let held = uploaded(&data, shape, |parts| device.weight(parts))?;
    let weight = match is_fp8 {
        true => quantised(&product.weight, shape.2),
        false => widened(&product.weight),
    };
    let wanted = product.oracle(&widened(&product.x), &weight);
    let exact = product.bias.is_none();
    for run in 0..2 {
        let got = product.run(device, &held, exact)?;
        near(&format!("{shape:?}, run {run}"), &got, &wanted, 1e-6)?;
    }
    Ok(())
}

fn each_count<D: Driver>(device: &Cuda<D>, is_fp8: bool) -> Result<(), String> {
    for (seed, m) in ROWS.into_iter().enumerate() {
        agrees(device, &Product::new(seed as u64, (m, 80, 144), m % 2 == 0), is_fp8)?;
    }
    Ok(())
}

fn rows_of_bf16<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    each_count(&device(BF16), false)
}

fn rows_of_e4m3<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    each_count(&device(FP8), true)
}

/// Strips and tiles that are not full, records that end after 16 columns, GPTQ's 231 records of a
/// row scaled down to seven.
fn ends<D: Driver>(device: &Cuda<D>, is_fp8: bool) -> Result<(), String> {
    let shapes = [(3, 16, 16), (2, 272, 272), (9, 64, 896), (1, 528, 48), (5, 336, 240)];
    for (seed, shape) in shapes.into_iter().enumerate() {
        agrees(device, &Product::new(20 + seed as u64, shape, seed % 2 == 0), is_fp8)?;
    }
    Ok(())
}

fn ends_of_bf16<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    ends(&device(BF16), false)
}

fn ends_of_e4m3<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    ends(&device(FP8), true)
}

/// Parts of several records, and units of more of them than a ring has stages.
fn many_columns<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let product = Product::new(30, (1, 16, 40000), false);
    agrees(&device(BF16), &product, false)?;
    let product = Product::new(31, (3, 16, 31 * 128 + 16), false);
    agrees(&device(FP8), &product, true)
}

/// The device's own product of the weight out of records; in fp8 of rounded activations, where it
/// has such products.
fn unpacked<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let (narrow, fp8) = (device(BF16), device(FP8));
    for (seed, (n, k)) in [(16, 16), (80, 144), (24, 72)].into_iter().enumerate() {
        let product = Product::new(40 + seed as u64, (RECORDS_ROWS_MAX + 1, n, k), seed == 1);
        agrees(&narrow, &product, false)?;
        if n % 16 > 0 {
            continue;
        }
        let data = product.stored();
        let held = uploaded(&data, product.shape, |parts| fp8.weight(parts))?;
        let got = product.run(&fp8, &held, product.bias.is_none())?;
        let weight = quantised(&product.weight, k);
        let (x, weight, share) = if fp8.driver().facts().fp8_products() {
            // Tensor cores keep about 13 bits of a sum of fp8 products before it is added up, of
            // the largest term's size: of few products that is more than of many.
            (quantised(&product.x, k), weight, 5e-4)
        } else {
            let round = |w: f64| f64::from(half::bf16::from_f64(w).to_f32());
            (widened(&product.x), weight.into_iter().map(round).collect(), 1e-6)
        };
        near(&format!("fp8 [{n}, {k}]"), &got, &product.oracle(&x, &weight), share)?;
    }
    Ok(())
}

/// Row i of 64 as the last of i + 1, and as the first of 64 - i: of every number of rows, in every
/// place that a kernel has for it.
fn company<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    const ALL: usize = 64;
    for config in [BF16, FP8] {
        let device = device(config);
        let (n, k) = (48, 272);
        let whole = Product::new(50, (ALL, n, k), false);
        let data = whole.stored();
        let held = uploaded(&data, whole.shape, |parts| device.weight(parts))?;
        let wanted = whole.run(&device, &held, true)?;
        for rows in (0..ALL).flat_map(|i| [0..i + 1, i..ALL]).chain((0..ALL).map(|i| i..i + 1)) {
            let x = whole.x[rows.start * k..rows.end * k].to_vec();
            let part = Product { shape: (rows.len(), n, k), x, bias: None, weight: Vec::new() };
            let got = part.run(&device, &held, true)?;
            same_bits(&config, &rows, &got, &wanted[rows.start * n..rows.end * n])?;
        }
    }
    Ok(())
}

fn same_bits(
    config: &CudaConfig,
    rows: &std::ops::Range<usize>,
    got: &[f32],
    wanted: &[f32],
) -> Result<(), String> {
    match got.iter().zip(wanted).position(|(a, b)| a.to_bits() != b.to_bits()) {
        None => Ok(()),
        Some(at) => Err(format!(
            "{config:?}, rows {rows:?} of 64: element {at} is {}, {} among all",
            got[at], wanted[at]
        )),
    }
}
