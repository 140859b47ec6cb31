//! Prefill attention: sequences with several rows.

use crate::{BF16, Check, Device, Tolerance, compare, paged::Case};
use kernels::cuda::{Cuda, Driver};

pub fn checks<D: Driver>() -> Vec<Check<D>> {
    vec![
        Check { name: "prefill: rows and prefixes about blocks' ends", run: lengths },
        Check { name: "prefill: several tiles", run: tiles },
        Check { name: "prefill: windows", run: windows },
        Check { name: "prefill: other company, other chunks", run: company },
    ]
}

/// Weights and results are rounded to bf16; values are of order 1.
const NEAR: Tolerance = Tolerance::Absolute(1e-2);

fn agree<D: Driver>(device: &Cuda<D>, case: &Case) -> Result<(), String> {
    let got = case.run(device).map_err(|error| format!("{case:?}: {error}"))?;
    let wanted = case.oracle().map_err(|error| error.to_string())?;
    compare(&format!("{case:?}"), &got, &wanted, NEAR)
}

fn lengths<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    for (heads, sequences) in [
        ((9, 3, 64), &[(0, 2), (1, 15), (15, 16), (16, 17)][..]),
        ((14, 2, 64), &[(49, 15)]),
        ((8, 8, 128), &[(63, 2), (0, 33)]),
        ((16, 2, 128), &[(15, 17)]),
        ((2, 1, 128), &[(500, 3), (0, 2), (31, 65)]),
    ] {
        agree(&device, &Case::new(heads, sequences))?;
    }
    Ok(())
}

fn tiles<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    agree(&device, &Case::new((2, 1, 64), &[(0, 300), (500, 128), (15, 127)]))?;
    agree(&device, &Case::new((1, 1, 128), &[(16, 129), (1, 300)]))
}

fn windows<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    for window in [1, 7, 64, 1000] {
        agree(&device, &Case::new((1, 1, 64), &[(60, 129), (500, 20)]).window(window))?;
        agree(&device, &Case::new((2, 2, 128), &[(90, 70)]).window(window))?;
    }
    Ok(())
}

/// Bit for bit: keys are looked at in steps that begin at fixed positions, and a step that a row
/// does not see leaves no trace in it.
fn company<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    for window in [None, Some(50)] {
        let mut case = Case::new((2, 1, 64), &[(0, 150), (37, 40), (0, 20)]);
        case.window = window;
        let run = |case: &Case| case.run(&device).map_err(|error| format!("{case:?}: {error}"));
        let together = run(&case)?;
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
                    alone.sequences = vec![crate::paged::Rows { prefix, rows, ..sequence }];
                    got.extend(run(&alone)?);
                }
                compare(&format!("{sequence:?} by {chunk}"), &got, wanted, Tolerance::Rounded)?;
            }
        }
    }
    Ok(())
}
