//! Rows on which the last bit decides: logits an ulp apart, tails of tiny weights, heads that two
//! filters end.

use super::cases::{Case, agree, params, run};
use crate::{BF16, Device, noise};
use cuda::Driver;
use engine::plan::SamplingParams;

/// Bias and penalties to the last bit. The token that they change is likeliest beside a rival whose
/// logit is an ulp below the sum written out here, not beside one an ulp above, and the lower id is
/// where both are equal.
pub fn exact_adjustments<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    const CHANGED: usize = 70;
    let device = device(BF16);
    // Their order shows: the second takes the first one's last bits.
    let biases = [0.1, 3e4, -3e4];
    let greedy = SamplingParams {
        repetition_penalty: 1.3,
        presence_penalty: 0.4,
        frequency_penalty: 0.15,
        ..SamplingParams::GREEDY
    };
    let (mut rows, mut cases, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
    for logit in [1.7f32, -2.3] {
        for biases in [&biases[..0], &biases] {
            for (prompt, answer) in [(0, 0), (2, 0), (0, 1), (1, 3)] {
                let logit_bias = biases.iter().map(|&bias| (CHANGED as u32, bias)).collect();
                let params = SamplingParams { logit_bias, ..greedy.clone() };
                let mut tokens = vec![CHANGED as u32; prompt + answer];
                // Seen as well, and far below.
                tokens.insert(prompt, 5);
                let mut changed = biases.iter().fold(logit, |sum, bias| sum + bias);
                if prompt + answer > 0 {
                    changed = if changed > 0.0 { changed / 1.3 } else { changed * 1.3 };
                }
                if answer > 0 {
                    changed -= 0.4 + 0.15 * answer as f32;
                }
                for (rival, at, likeliest) in [
                    (10, changed.next_down(), CHANGED),
                    (10, changed, 10),
                    (300, changed, CHANGED),
                    (300, changed.next_up(), 300),
                ] {
                    let mut row = vec![-50.0; 600];
                    row[CHANGED] = logit;
                    row[rival] = at;
                    let case = Case::new(&params, rows.len());
                    cases.push(Case { tokens: tokens.clone(), prompt_len: prompt, ..case });
                    rows.push(row);
                    wanted.push(likeliest);
                }
            }
        }
    }
    let answers = run(&device, 600, &rows, &cases)?;
    for ((case, answer), wanted) in cases.iter().zip(answers).zip(wanted) {
        let token = answer.map_err(|refused| refused.to_string())?.token as usize;
        if token != wanted {
            let Case { params, tokens, .. } = case;
            return Err(format!("{token} of {params:?} after {tokens:?}, not {wanted}"));
        }
    }
    Ok(())
}

/// Tokens that are drawn once in thousands of times, and never more than one in millions: which
/// one hangs on bits of the uniform number and of masses far behind the first.
pub fn light_tails<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let (mut rows, mut cases) = (Vec::new(), Vec::new());
    for (depth, filter, positions) in [
        (16.0, params(), [4571, 6739, 8933]),
        (16.0, SamplingParams { top_p: 0.9998, ..params() }, [4571, 11697, 15049]),
        (16.0, SamplingParams { top_k: 3000, ..params() }, [4571, 6739, 8933]),
        (18.0, params(), [15049, 42006, 52975]),
    ] {
        let mut row = vec![-depth; 4097];
        row[1000] = 0.0;
        cases.extend(positions.map(|at| Case { position: at, ..Case::new(&filter, rows.len()) }));
        rows.push(row);
    }
    agree(&device, 4097, &rows, &cases)?;
    // Positions were chosen so that it is the tail which is drawn from.
    let drawn = run(&device, 4097, &rows, &cases)?;
    match drawn.iter().position(|answer| !matches!(answer, Ok(drawn) if drawn.token != 1000)) {
        Some(at) => Err(format!("draw {at} is not of the tail")),
        None => Ok(()),
    }
}

/// Heads that top-k would end further down than min-p does, a min-p that only ties fulfil, and a
/// top-p of what top-k keeps, which ends far before it.
pub fn two_ends<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let steps: Vec<f32> = noise(3, 600).iter().map(|v| (v * 2.0).round()).collect();
    let best = steps.iter().filter(|step| **step == 2.0).count() as u32;
    let mut cases = Vec::new();
    for (top_k, top_p, min_p) in [(150, 1.0, 0.5), (3, 1.0, 1.0), (best + 5, 0.5, 0.0)] {
        let params = SamplingParams { top_k, top_p, min_p, ..params() };
        cases.extend((0..12).map(|position| Case { position, ..Case::new(&params, 0) }));
    }
    agree(&device, 600, &[steps], &cases)
}
