//! Prefill attention: sequences with several rows.

use crate::{
    BF16, Check, Device, Tolerance, compare, laid_out,
    paged::{Case, Rows},
};
use cuda::{CudaConfig, Driver, KvFormat, PrefillKernel};

pub fn checks<D: Driver>() -> Vec<Check<D>> {
    const MMA: PrefillKernel = PrefillKernel::Mma;
    vec![
        Check { name: "prefill: rows and prefixes about blocks' ends", run: |d| lengths(d, MMA) },
        Check { name: "prefill: several tiles", run: |d| tiles(d, MMA) },
        Check { name: "prefill: windows", run: |d| windows(d, MMA) },
        Check { name: "prefill: other company, other chunks", run: |d| company(d, MMA) },
        Check { name: "prefill: e4m3 cache", run: e4m3 },
        Check { name: "prefill: what is refused", run: refusals },
    ]
}

/// Weights and results are rounded to bf16; values are of order 1.
const NEAR: Tolerance = Tolerance::Absolute(1e-2);

fn run<D: Driver>(
    device: Device<'_, D>,
    kernel: PrefillKernel,
    case: &Case,
) -> Result<Vec<f32>, String> {
    let device =
        device(CudaConfig { kv_format: case.format, prefill: kernel, ..CudaConfig::default() });
    case.run(&device).map_err(|error| format!("{case:?}: {error}"))
}

pub(crate) fn agree<D: Driver>(
    device: Device<'_, D>,
    kernel: PrefillKernel,
    case: &Case,
) -> Result<(), String> {
    let got = run(device, kernel, case)?;
    let wanted = case.oracle().map_err(|error| error.to_string())?;
    compare(&format!("{case:?}"), &got, &wanted, NEAR)
}

pub(crate) fn lengths<D: Driver>(
    device: Device<'_, D>,
    kernel: PrefillKernel,
) -> Result<(), String> {
    for (heads, sequences) in [
        ((9, 3, 64), &[(0, 2), (1, 15), (15, 16), (16, 17)][..]),
        ((14, 2, 64), &[(49, 15)]),
        ((8, 8, 128), &[(63, 2), (0, 33)]),
        ((16, 2, 128), &[(15, 17)]),
        ((2, 1, 128), &[(500, 3), (0, 2), (31, 65)]),
    ] {
        agree(device, kernel, &Case::new(heads, sequences))?;
    }
    Ok(())
}

pub(crate) fn tiles<D: Driver>(device: Device<'_, D>, kernel: PrefillKernel) -> Result<(), String> {
    agree(device, kernel, &Case::new((2, 1, 64), &[(0, 300), (500, 128), (15, 127)]))?;
    agree(device, kernel, &Case::new((1, 1, 128), &[(16, 129), (1, 300)]))
}

pub(crate) fn windows<D: Driver>(
    device: Device<'_, D>,
    kernel: PrefillKernel,
) -> Result<(), String> {
    for window in [1, 7, 64, 1000] {
        agree(device, kernel, &Case::new((1, 1, 64), &[(60, 129), (500, 20)]).window(window))?;
        agree(device, kernel, &Case::new((2, 2, 128), &[(90, 70)]).window(window))?;
    }
    Ok(())
}

/// Bit for bit, beside sequences that decode: keys are looked at in steps that begin at fixed
/// positions, and a step that a row does not see leaves no trace in it.
pub(crate) fn company<D: Driver>(
    device: Device<'_, D>,
    kernel: PrefillKernel,
) -> Result<(), String> {
    for window in [None, Some(50)] {
        let mut case = Case::new((2, 1, 64), &[(0, 150), (600, 1), (37, 40), (0, 1), (0, 20)]);
        case.window = window;
        let together = run(device, kernel, &case)?;
        let cols = case.heads.q * case.heads.dim;
        let mut first = 0;
        for sequence in case.sequences.clone() {
            let wanted = &together[first * cols..][..sequence.rows * cols];
            first += sequence.rows;
            for chunk in [sequence.rows, 33] {
                let mut got = Vec::new();
                for start in (0..sequence.rows).step_by(chunk) {
                    let mut alone = case.clone();
                    let rows = chunk.min(sequence.rows - start);
                    let prefix = sequence.prefix + start;
                    alone.sequences = vec![Rows { prefix, rows, ..sequence }];
                    got.extend(run(device, kernel, &alone)?);
                }
                compare(&format!("{sequence:?} by {chunk}"), &got, wanted, Tolerance::Rounded)?;
            }
        }
    }
    Ok(())
}

fn e4m3<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    for (heads, sequences, window) in [
        ((4, 2, 64), &[(0, 2), (15, 17), (75, 30)][..], None),
        ((2, 1, 128), &[(47, 129), (1, 31)], None),
        ((2, 1, 128), &[(100, 40)], Some(70)),
    ] {
        let mut case = Case::new(heads, sequences).format(KvFormat::Fp8);
        case.window = window;
        agree(device, PrefillKernel::Mma, &case)?;
    }
    Ok(())
}

fn refusals<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    laid_out::refusals(&device(BF16), &Case::new((4, 2, 64), &[(40, 3), (0, 130), (16, 1)]))
}
