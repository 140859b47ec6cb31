//! Sampling on the device against the host sampler, token by token, and against distributions.

mod cases;
mod distribution;
mod edges;
mod refusals;

use crate::{BF16, Check, Device, noise};
pub(crate) use cases::normal_row;
use cases::{Case, agree, filters, params, run, run_by};
use cuda::Driver;
use engine::plan::SamplingParams;

pub fn checks<D: Driver>() -> Vec<Check<D>> {
    vec![
        Check { name: "greedy", run: greedy },
        Check { name: "every filter draws what the host draws", run: every_filter::<D, 1> },
        Check { name: "draws follow the distribution", run: distribution::follows::<D, 60> },
        Check { name: "ties and flat rows", run: ties },
        Check { name: "extreme temperatures and outliers", run: extremes },
        Check { name: "bias, penalties and masks", run: adjusted },
        Check { name: "bias and penalties to the last bit", run: edges::exact_adjustments },
        Check { name: "tails of tiny weights", run: edges::light_tails },
        Check { name: "heads that two filters end", run: edges::two_ends },
        Check { name: "logprobs and scores", run: logprobs },
        Check { name: "rows beside others", run: alone_and_beside_others },
        Check { name: "a whole vocabulary", run: whole_vocabulary },
        Check { name: "refused rows", run: refusals::rows },
        Check { name: "refused calls", run: refusals::calls },
    ]
}

/// One that takes seconds where the device is emulated.
pub fn many_draws<D: Driver>() -> Vec<Check<D>> {
    vec![Check {
        name: "100,000 draws, bisected, follow the distribution",
        run: distribution::bisected::<D, 100_000>,
    }]
}

/// Those that take minutes where the device is emulated, or a sanitizer watches it.
pub fn long_checks<D: Driver>() -> Vec<Check<D>> {
    vec![
        Check {
            name: "100,000 draws follow the distribution",
            run: distribution::follows::<D, 100_000>,
        },
        Check { name: "every filter, many draws", run: every_filter::<D, 24> },
    ]
}

/// Row lengths around the sizes that kernels cut at, and no multiples of four.
const LENGTHS: [usize; 5] = [1, 33, 512, 513, 4099];

fn greedy<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    for len in LENGTHS {
        let drawable = len - len / 7;
        let mut rows: Vec<Vec<f32>> = (0..3).map(|seed| normal_row(len, seed)).collect();
        // The padding is likeliest; then zeros of both signs and ties; then all the same.
        rows[0][drawable..].fill(9.0);
        rows[1] = noise(5, len).iter().map(|v| -(v * 2.0).round().abs()).collect();
        rows[1][len / 2] = 0.0;
        rows[2].fill(-3.0);
        let greedy = SamplingParams { logprobs: Some(1), ..SamplingParams::GREEDY };
        let cases: Vec<Case> = (0..3).map(|row| Case::new(&greedy, row)).collect();
        agree(&device, drawable, &rows, &cases)?;
    }
    Ok(())
}

fn every_filter<D: Driver, const DRAWS: usize>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    for len in [1, 64, 1537] {
        let rows: Vec<_> = (0..4).map(|seed| normal_row(len, seed)).collect();
        let mut cases = Vec::new();
        for (index, filter) in filters().into_iter().enumerate() {
            for temperature in [0.7, 30.0] {
                let params = SamplingParams { temperature, ..filter.clone() };
                // Of both words of the counter.
                let positions = (0..DRAWS).map(|at| (index << 33) + index + 1000 * at);
                cases.extend(
                    positions.map(|at| Case { position: at, ..Case::new(&params, at % 4) }),
                );
            }
        }
        agree(&device, len, &rows, &cases)?;
    }
    Ok(())
}

/// Heads that end among equal logits, and more ids in doubt than the list of candidates holds.
fn ties<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let len = 5000;
    let steps: Vec<f32> = noise(3, len).iter().map(|v| (v * 2.0).round()).collect();
    let rows = [vec![0.25; len], steps, normal_row(len, 4)];
    let mut cases = Vec::new();
    for (index, (top_k, top_p)) in
        [(3, 1.0), (1, 0.5), (600, 1.0), (0, 0.5), (0, 0.999_999), (0, 1e-7), (4500, 0.75)]
            .into_iter()
            .enumerate()
    {
        let params = SamplingParams { top_k, top_p, ..params() };
        cases.extend((0..3).map(|row| Case { position: index, ..Case::new(&params, row) }));
    }
    agree(&device, len, &rows, &cases)?;
    // Every id that a small head may hold comes up, and no other.
    let three = SamplingParams { top_k: 3, ..params() };
    let cases: Vec<_> = (0..8).map(|position| Case { position, ..Case::new(&three, 0) }).collect();
    agree(&device, 40, &[vec![1.0; 40]], &cases)
}

fn extremes<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let len = 900;
    let mut outlier = normal_row(len, 7);
    outlier[17] = -1e30;
    outlier[450] = 3e38;
    outlier[451] = -3e38;
    let mut low = normal_row(len, 8);
    low[5] = -1e30;
    let subnormal: Vec<f32> = noise(9, len).iter().map(|v| v * 1e-39).collect();
    let rows = [outlier, low, subnormal];
    let mut cases = Vec::new();
    for (index, filter) in filters().into_iter().enumerate() {
        for temperature in [1e-44, f32::MAX] {
            let params = SamplingParams { temperature, ..filter.clone() };
            let row = (index + cases.len()) % 3;
            cases.push(Case { position: index, ..Case::new(&params, row) });
        }
    }
    agree(&device, len, &rows, &cases)
}

fn adjusted<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let len = 1402;
    let rows: Vec<_> = (0..2).map(|seed| normal_row(len, 20 + seed)).collect();
    let answer: Vec<u32> = (0..900).map(|i| i * i % 1499).collect();
    let mut cases = Vec::new();
    for (index, filter) in filters().into_iter().enumerate().step_by(2) {
        let logit_bias = vec![(1401, 3.0), (3, 0.1), (600, -9.0), (3, 0.7), (0, 1.5), (599, 4.0)];
        let adjusted = SamplingParams {
            repetition_penalty: if index % 2 == 0 { 1.3 } else { 1.0 },
            presence_penalty: if index % 3 == 0 { 0.4 } else { 0.0 },
            frequency_penalty: if index % 5 == 0 { -0.1 } else { 0.2 },
            logit_bias: if index % 4 == 0 { Vec::new() } else { logit_bias },
            temperature: if index % 6 == 0 { 0.0 } else { 0.9 },
            logprobs: (index % 2 == 0).then_some(3),
            ..filter
        };
        let seen = Case { tokens: answer.clone(), prompt_len: 300, ..Case::new(&adjusted, 0) };
        // Every third id, and one span without any.
        let bit = |id: usize| u32::from(id % 3 == index % 3 && id / 512 != 1) << (id % 32);
        let word = |word: usize| (0..32).map(|id| bit(word * 32 + id)).sum();
        let allowed: Vec<u32> = (0..len.div_ceil(32)).map(word).collect();
        let masked = Case { row: 1, allowed: Some(allowed.clone()), ..seen.clone() };
        let plain = SamplingParams { temperature: 0.8, top_k: 40, ..params() };
        cases.push(Case { position: index, ..seen });
        cases.push(Case { position: index, ..masked });
        cases.push(Case { position: index, allowed: Some(allowed), ..Case::new(&plain, 0) });
        cases.push(Case { position: index, ..Case::new(&plain, 1) });
    }
    agree(&device, 1400, &rows, &cases)
}

fn logprobs<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    for len in [7, 515] {
        let mut rows: Vec<_> = (0..2).map(|seed| normal_row(len, 40 + seed)).collect();
        rows.push(vec![-2.5; len]);
        // The likeliest all in one span, and padding among them.
        let end = len.min(30);
        rows[1][len - end..].iter_mut().for_each(|v| *v += 40.0);
        let mut cases = Vec::new();
        for row in 0..3 {
            for top in [0, 1, 20] {
                let params = SamplingParams { logprobs: Some(top), temperature: 0.5, ..params() };
                cases.push(Case::new(&params, row));
            }
            let params = SamplingParams { logprobs: Some(5), ..params() };
            cases.push(Case { score: Some(len as u32 / 2), ..Case::new(&params, row) });
        }
        agree(&device, len - len / 9, &rows, &cases)?;
    }
    Ok(())
}

fn alone_and_beside_others<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let len = 3001;
    let rows: Vec<_> = (0..9).map(|seed| normal_row(len, 60 + seed)).collect();
    let mut cases = Vec::new();
    for (index, filter) in filters().into_iter().take(9).enumerate() {
        let params = SamplingParams { logprobs: Some(4), ..filter };
        cases.push(Case { position: 7, ..Case::new(&params, index) });
    }
    let together = run(&device, len, &rows, &cases)?;
    // What a call leaves behind in its room means nothing to the next.
    if run_by(&device, len, &rows, &cases, 2)? != together {
        return Err("other answers in several calls than in one".into());
    }
    for (index, case) in cases.iter().enumerate() {
        let alone = run(&device, len, &rows, std::slice::from_ref(case))?;
        if alone[0] != together[index] {
            return Err(format!("alone {:?}, beside others {:?}", alone[0], together[index]));
        }
    }
    Ok(())
}

fn whole_vocabulary<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let rows: Vec<_> = [normal_row(152_064, 80)].into();
    let top_p = SamplingParams { top_p: 0.9, logprobs: Some(20), ..params() };
    let both = SamplingParams { top_k: 20, top_p: 0.8, temperature: 0.7, ..params() };
    let cases = [Case::new(&top_p, 0), Case::new(&both, 0)];
    agree(&device, 151_936, &rows, &cases)
}
