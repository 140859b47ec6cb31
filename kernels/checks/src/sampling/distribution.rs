//! How often each token comes up, against the exact probabilities.

use super::cases::{Case, params, run};
use crate::{BF16, Device};
use engine::plan::SamplingParams;
use kernels::cuda::Driver;
use model::Sampler;

/// χ² of `DRAWS` draws of each case, below the 99.9th percentile of its distribution; each draw is
/// the host's as well.
pub fn follows<D: Driver, const DRAWS: usize>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let row: Vec<f32> = (0..40).map(|i| (i % 7) as f32 * 0.5 - (i % 3) as f32 * 0.3).collect();
    let mut sampler = Sampler::new(40, 40);
    for params in [
        params(),
        SamplingParams { temperature: 0.6, ..params() },
        SamplingParams { top_k: 12, ..params() },
        SamplingParams { top_p: 0.7, temperature: 1.3, ..params() },
        SamplingParams { min_p: 0.2, ..params() },
    ] {
        let cases: Vec<_> =
            (0..DRAWS).map(|position| Case { position, ..Case::new(&params, 0) }).collect();
        let answers = run(&device, 40, std::slice::from_ref(&row), &cases)?;
        let mut counts = [0u32; 40];
        for (case, answer) in cases.iter().zip(answers) {
            let token = answer.map_err(|refused| refused.to_string())?.token;
            counts[token as usize] += 1;
            let host = sampler.sample(&row, &params, &Default::default(), case.position);
            let host = host.map_err(|error| error.to_string())?.token;
            if token != host {
                let at = case.position;
                return Err(format!("draw {at} of {params:?} is {token}, the host's {host}"));
            }
        }
        fits(&counts, &probabilities(&row, &params), DRAWS)
            .map_err(|error| format!("{params:?}: {error}"))?;
    }
    Ok(())
}

fn fits(counts: &[u32], probabilities: &[f64], draws: usize) -> Result<(), String> {
    let mut chi2 = 0.0;
    for (id, (&count, &probability)) in counts.iter().zip(probabilities).enumerate() {
        let expected = probability * draws as f64;
        if probability > 0.0 {
            chi2 += (f64::from(count) - expected).powi(2) / expected;
        } else if count > 0 {
            return Err(format!("token {id} came up, which no filter keeps"));
        }
    }
    let freedom = probabilities.iter().filter(|&&p| p > 0.0).count() as f64 - 1.0;
    // Wilson–Hilferty.
    let spread = 2.0 / (9.0 * freedom);
    let bound = freedom * (1.0 - spread + 3.09 * spread.sqrt()).powi(3);
    if chi2 < bound {
        return Ok(());
    }
    Err(format!("χ² {chi2} with {freedom} degrees of freedom, bound {bound}"))
}

/// Every token's probability after the filters, by sorting the whole row in f64.
fn probabilities(row: &[f32], params: &SamplingParams) -> Vec<f64> {
    let peak = row.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
    let weight = |id: usize| (f64::from(row[id] - peak) / f64::from(params.temperature)).exp();
    if params.top_k > 0 {
        order.truncate(params.top_k as usize);
    }
    let mass: f64 = order.iter().map(|&id| weight(id)).sum();
    let mut sum = 0.0;
    order.retain(|&id| {
        let before = sum;
        sum += weight(id);
        params.top_p >= 1.0 || before < f64::from(params.top_p) * mass
    });
    order.retain(|&id| weight(id) >= f64::from(params.min_p));
    let kept: f64 = order.iter().map(|&id| weight(id)).sum();
    let mut probabilities = vec![0.0; row.len()];
    order.iter().for_each(|&id| probabilities[id] = weight(id) / kept);
    probabilities
}
