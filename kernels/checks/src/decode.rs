//! Attention of sequences with one row: blocks, splits and windows at their edges.

use crate::{
    BF16, Check, Device, Tolerance, compare, laid_out,
    paged::{Case, Rows, SPLIT_TOKENS as SPLIT},
};
use cuda::{CudaConfig, Driver, KvFormat};

/// Weights are rounded to bf16 before they meet the values, results at the end; values are below 1.
const TOLERANCE: Tolerance = Tolerance::Absolute(8e-3);

pub fn checks<D: Driver>() -> Vec<Check<D>> {
    vec![
        Check { name: "decode: lengths", run: lengths },
        Check { name: "decode: heads", run: heads },
        Check { name: "decode: windows", run: windows },
        Check { name: "decode: e4m3", run: e4m3 },
        Check { name: "decode: the batch changes nothing", run: batch_changes_nothing },
        Check { name: "decode: twice the same", run: twice },
        Check { name: "decode: what is refused", run: refusals },
    ]
}

/// Those that take long where the device is emulated under AddressSanitizer.
pub fn long_checks<D: Driver>() -> Vec<Check<D>> {
    vec![Check { name: "decode: long context", run: long_context }]
}

/// Sequences with such contexts and one row each.
fn contexts(heads: (usize, usize, usize), contexts: &[usize]) -> Case {
    let sequences: Vec<_> = contexts.iter().map(|context| (context - 1, 1)).collect();
    Case::new(heads, &sequences).needles()
}

fn run<D: Driver>(device: Device<'_, D>, case: &Case) -> Result<Vec<f32>, String> {
    let config = CudaConfig { kv_format: case.format, ..CudaConfig::default() };
    case.run(&device(config)).map_err(|error| format!("{case:?}: {error}"))
}

fn agrees<D: Driver>(device: Device<'_, D>, case: &Case) -> Result<(), String> {
    let got = run(device, case)?;
    let wanted = case.oracle().map_err(|error| error.to_string())?;
    compare(&format!("{case:?}"), &got, &wanted, TOLERANCE)
}

fn lengths<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    for dim in [64, 128] {
        let edges = [1, 15, 16, 17, 63, 64, 65, SPLIT - 1, SPLIT, SPLIT + 1, 3 * SPLIT + 5];
        agrees(device, &contexts((2, 1, dim), &edges))?;
    }
    agrees(device, &contexts((14, 2, 64), &[17, 3 * SPLIT + 5, 1, SPLIT, SPLIT + 1]))
}

/// Groups of 1, 4, 5, 7, 8 and 16 query heads to a key head, and more than one tile has.
fn heads<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    for heads in [(8, 8, 64), (40, 8, 128), (64, 8, 128), (16, 1, 128), (35, 1, 64)] {
        agrees(device, &contexts(heads, &[37, 1]))?;
    }
    agrees(device, &contexts((32, 8, 128), &[SPLIT + 20]))?;
    agrees(device, &contexts((34, 2, 64), &[SPLIT + 20]))
}

fn windows<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    for window in [1, 16, 100, SPLIT, SPLIT + 9, 5000] {
        let case = contexts((16, 1, 64), &[1, 17, 100, SPLIT, 2 * SPLIT + 1, 3 * SPLIT + 5]);
        agrees(device, &case.window(window))?;
    }
    agrees(device, &contexts((4, 2, 128), &[3 * SPLIT + 5]).window(700))
}

fn e4m3<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    for heads in [(16, 1, 128), (7, 1, 64), (4, 2, 64)] {
        let case = contexts(heads, &[1, 17, 65, SPLIT + 1, 2 * SPLIT + 30]);
        agrees(device, &case.clone().format(KvFormat::Fp8))?;
        agrees(device, &case.format(KvFormat::Fp8).window(600))?;
    }
    Ok(())
}

fn refusals<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let case = contexts((4, 2, 64), &[41, SPLIT + 6, 17]);
    laid_out::refusals(&device(BF16), &case)
}

fn long_context<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    agrees(device, &contexts((2, 1, 64), &[32 * 1024]))
}

/// A sequence alone, beside others, and under a window that holds all of it: the same bits.
fn batch_changes_nothing<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    for (heads, format) in [((7, 1, 64), KvFormat::Bf16), ((4, 1, 128), KvFormat::Fp8)] {
        let together = contexts(heads, &[5, 700, SPLIT, 1, 1100]).format(format);
        let all = run(device, &together)?;
        for (among, sequence) in all.chunks_exact(heads.0 * heads.2).zip(&together.sequences) {
            let alone = Case { sequences: vec![*sequence], ..together.clone() };
            same(&alone, &run(device, &alone)?, among)?;
            let Rows { prefix, .. } = *sequence;
            same(&alone, &run(device, &alone.clone().window(prefix + 1))?, among)?;
        }
    }
    Ok(())
}

/// Counters are as they were: the same batch again has the same bits.
fn twice<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let case = contexts((4, 2, 64), &[SPLIT + 6, 17, 2 * SPLIT + 1]);
    let again = case.run_again(&device(BF16)).map_err(|error| error.to_string())?;
    same(&case, &again, &run(device, &case)?)
}

fn same(case: &Case, got: &[f32], wanted: &[f32]) -> Result<(), String> {
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    if bits(got) == bits(wanted) {
        return Ok(());
    }
    Err(format!("{case:?}: other bits than alone or at first"))
}
