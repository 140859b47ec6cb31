//! Prefill attention: sequences with several rows.

use crate::{
    BF16, Check, Device, Tolerance, compare, laid_out,
    paged::{Case, Rows},
};
use cuda::{CudaConfig, Driver, KvFormat, PrefillKernel};

/// A kernel, and the cache's format.
pub(crate) type On = (PrefillKernel, KvFormat);

pub fn checks<D: Driver>() -> Vec<Check<D>> {
    const MMA: On = (PrefillKernel::Mma, KvFormat::Bf16);
    const FP8: On = (PrefillKernel::Mma, KvFormat::Fp8);
    vec![
        Check { name: "prefill: rows and prefixes about blocks' ends", run: |d| lengths(d, MMA) },
        Check { name: "prefill: several tiles", run: |d| tiles(d, MMA) },
        Check { name: "prefill: windows", run: |d| windows(d, MMA) },
        Check { name: "prefill: other company, other chunks", run: |d| company(d, MMA) },
        Check { name: "prefill: e4m3 cache", run: e4m3 },
        Check { name: "prefill: spans of keys", run: |d| spans(d, MMA) },
        Check { name: "prefill: spans of an e4m3 cache", run: |d| spans(d, FP8) },
        Check { name: "prefill: spans, other company", run: |d| spans_company(d, MMA) },
        Check { name: "prefill: spans and none agree", run: |d| spans_or_none(d, MMA) },
        Check { name: "prefill: what is refused", run: refusals },
    ]
}

/// Weights and results are rounded to bf16; values are of order 1.
const NEAR: Tolerance = Tolerance::Absolute(1e-2);

fn run<D: Driver>(
    device: Device<'_, D>,
    (prefill, kv_format): On,
    case: &Case,
) -> Result<Vec<f32>, String> {
    let device = device(CudaConfig { kv_format, prefill, ..CudaConfig::default() });
    case.run(&device).map_err(|error| format!("{case:?}: {error}"))
}

pub(crate) fn agree<D: Driver>(device: Device<'_, D>, on: On, case: &Case) -> Result<(), String> {
    let case = case.clone().format(on.1);
    let got = run(device, on, &case)?;
    let wanted = case.oracle().map_err(|error| error.to_string())?;
    compare(&format!("{case:?}"), &got, &wanted, NEAR)
}

pub(crate) fn lengths<D: Driver>(device: Device<'_, D>, on: On) -> Result<(), String> {
    for (heads, sequences) in [
        ((9, 3, 64), &[(0, 2), (1, 15), (15, 16), (16, 17)][..]),
        ((14, 2, 64), &[(49, 15)]),
        ((8, 8, 128), &[(63, 2), (0, 33)]),
        ((16, 2, 128), &[(15, 17)]),
        ((2, 1, 128), &[(500, 3), (0, 2), (31, 65)]),
    ] {
        agree(device, on, &Case::new(heads, sequences))?;
    }
    Ok(())
}

pub(crate) fn tiles<D: Driver>(device: Device<'_, D>, on: On) -> Result<(), String> {
    agree(device, on, &Case::new((2, 1, 64), &[(0, 300), (500, 128), (15, 127)]))?;
    agree(device, on, &Case::new((1, 1, 128), &[(16, 129), (1, 300)]))
}

pub(crate) fn windows<D: Driver>(device: Device<'_, D>, on: On) -> Result<(), String> {
    for window in [1, 7, 64, 1000] {
        agree(device, on, &Case::new((1, 1, 64), &[(60, 129), (500, 20)]).window(window))?;
        agree(device, on, &Case::new((2, 2, 128), &[(90, 70)]).window(window))?;
    }
    Ok(())
}

/// Rows of `sequence` alone, so many at a time.
fn in_chunks<D: Driver>(
    device: Device<'_, D>,
    on: On,
    (case, sequence): (&Case, Rows),
    chunk: usize,
) -> Result<Vec<f32>, String> {
    let mut got = Vec::new();
    for start in (0..sequence.rows).step_by(chunk) {
        let (prefix, rows) = (sequence.prefix + start, chunk.min(sequence.rows - start));
        let alone = Case { sequences: vec![Rows { prefix, rows, ..sequence }], ..case.clone() };
        got.extend(run(device, on, &alone)?);
    }
    Ok(got)
}

/// Bit for bit: every sequence beside the others as alone, in each of `chunks`.
fn alone_as_together<D: Driver>(
    device: Device<'_, D>,
    on: On,
    case: &Case,
    chunks: &[usize],
) -> Result<(), String> {
    let together = run(device, on, case)?;
    let cols = case.heads.q * case.heads.dim;
    let mut first = 0;
    for &sequence in &case.sequences {
        let wanted = &together[first * cols..][..sequence.rows * cols];
        first += sequence.rows;
        for &chunk in chunks {
            let got = in_chunks(device, on, (case, sequence), chunk.min(sequence.rows))?;
            let what = format!("{sequence:?} by {chunk}, {:?}", case.window);
            compare(&what, &got, wanted, Tolerance::Rounded)?;
        }
    }
    Ok(())
}

/// Beside sequences that decode: keys are looked at in steps that begin at fixed positions, and a
/// step that a row does not see leaves no trace in it.
pub(crate) fn company<D: Driver>(device: Device<'_, D>, on: On) -> Result<(), String> {
    let mut case = Case::new((2, 1, 64), &[(0, 150), (600, 1), (37, 40), (0, 1), (0, 20)]);
    for window in [None, Some(50)] {
        (case.window, case.format) = (window, on.1);
        alone_as_together(device, on, &case, &[usize::MAX, 33])?;
    }
    Ok(())
}

fn e4m3<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    for (heads, sequences, window) in [
        ((4, 2, 64), &[(0, 2), (15, 17), (75, 30)][..], None),
        ((2, 1, 128), &[(47, 129), (1, 31)], None),
        ((2, 1, 128), &[(100, 40)], Some(70)),
    ] {
        let mut case = Case::new(heads, sequences);
        case.window = window;
        agree(device, (PrefillKernel::Mma, KvFormat::Fp8), &case)?;
    }
    Ok(())
}

/// Up to 32 rows have spans of 1024 keys, up to 64 of 2048, up to 128 of 4096: contexts that end
/// about a span's end, rows on both sides of it, windows that leave out spans or all but one.
pub(crate) fn spans<D: Driver>(device: Device<'_, D>, on: On) -> Result<(), String> {
    for case in [
        Case::new((2, 1, 64), &[(1022, 2), (1023, 2), (1040, 31), (2030, 33)]),
        Case::new((1, 1, 128), &[(2046, 32), (2020, 50)]),
        Case::new((1, 1, 64), &[(4020, 100)]),
        Case::new((2, 2, 64), &[(3000, 20), (1030, 3)]).window(100),
        Case::new((1, 1, 128), &[(3060, 20)]).window(1500),
        Case::new((1, 1, 64), &[(2040, 20)]).window(1),
    ] {
        agree(device, on, &case.needles())?;
    }
    Ok(())
}

/// Beside others, and beside so many that their sums have no room at once.
pub(crate) fn spans_company<D: Driver>(device: Device<'_, D>, on: On) -> Result<(), String> {
    let rows = [(1030, 9), (5, 140), (2100, 20), (1500, 1), (1024, 32), (40, 7), (1001, 32)];
    let mut case = Case::new((2, 1, 64), &rows);
    for window in [None, Some(600)] {
        (case.window, case.format) = (window, on.1);
        alone_as_together(device, on, &case, &[usize::MAX])?;
    }
    Ok(())
}

/// A sequence of more rows than are cut, and the same in pieces that are.
fn spans_or_none<D: Driver>(device: Device<'_, D>, on: On) -> Result<(), String> {
    let whole = Case::new((2, 1, 64), &[(1500, 150)]);
    let wanted = run(device, on, &whole)?;
    let got = in_chunks(device, on, (&whole, whole.sequences[0]), 30)?;
    compare("by 30 rows", &got, &wanted, Tolerance::Absolute(4e-3))
}

fn refusals<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    laid_out::refusals(&device(BF16), &Case::new((4, 2, 64), &[(40, 3), (0, 130), (16, 1)]))
}
