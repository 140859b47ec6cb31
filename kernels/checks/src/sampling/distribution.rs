//! How often each token comes up, against the exact probabilities.

use super::cases::{Case, params, run};
use crate::{BF16, Device};
use cuda::Driver;
use engine::plan::SamplingParams;
use kernels::sampling::{Refused, Sampled};
use model::Sampler;
use std::collections::BTreeSet;

const VOCAB: usize = 40;

fn row() -> Vec<f32> {
    (0..VOCAB).map(|i| (i % 7) as f32 * 0.5 - (i % 3) as f32 * 0.3).collect()
}

fn filters() -> [SamplingParams; 6] {
    [
        params(),
        SamplingParams { temperature: 0.6, ..params() },
        SamplingParams { top_k: 12, ..params() },
        SamplingParams { top_p: 0.7, temperature: 1.3, ..params() },
        SamplingParams { min_p: 0.2, ..params() },
        SamplingParams { top_k: 20, top_p: 0.9, min_p: 0.3, temperature: 0.9, ..params() },
    ]
}

/// χ² of `DRAWS` draws of each case, below the 99.9th percentile of its distribution; each draw is
/// the host's as well.
pub fn follows<D: Driver, const DRAWS: usize>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let row = row();
    let mut sampler = Sampler::new(VOCAB, VOCAB);
    for params in filters() {
        let cases: Vec<_> =
            (0..DRAWS).map(|position| Case { position, ..Case::new(&params, 0) }).collect();
        let answers = run(&device, VOCAB, std::slice::from_ref(&row), &cases)?;
        let mut counts = [0u32; VOCAB];
        for (case, answer) in cases.iter().zip(answers) {
            let token = answer.map_err(|refused| refused.to_string())?.token;
            counts[token as usize] += 1;
            let host = case.host(&mut sampler, &row);
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

/// χ² of `DRAWS` draws of each case, of which the device makes some hundreds. A draw walks the ids
/// in order to where its uniform number falls, so that tokens rise with it: sorted by it, draws of
/// a token lie side by side, and where they begin and end is found by bisection. Draws between must
/// fit in.
pub fn bisected<D: Driver, const DRAWS: usize>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let row = row();
    for params in filters() {
        let mut positions: Vec<usize> = (0..DRAWS).collect();
        positions.sort_by_key(|&position| philox(params.seed, position as u64));
        let ask = |draws: &[usize]| -> Result<Vec<usize>, String> {
            let case = |&at: &usize| Case { position: positions[at], ..Case::new(&params, 0) };
            let cases: Vec<Case> = draws.iter().map(case).collect();
            let answers = run(&device, VOCAB, std::slice::from_ref(&row), &cases)?;
            let token = |answer: Result<Sampled, Refused>| answer.map(|drawn| drawn.token as usize);
            answers.into_iter().map(|a| token(a).map_err(|refused| refused.to_string())).collect()
        };
        let ends = ends(DRAWS, &ask)?;
        let counts: Vec<u32> = ends.array_windows().map(|[a, b]| (b - a) as u32).collect();
        fits(&counts, &probabilities(&row, &params), DRAWS)
            .map_err(|error| format!("{params:?}: {error}"))?;
        let between: Vec<usize> = (0..DRAWS).step_by(DRAWS / 64).collect();
        for (&at, token) in between.iter().zip(ask(&between)?) {
            if !(ends[token]..ends[token + 1]).contains(&at) {
                return Err(format!("draw {} of {params:?} is {token}", positions[at]));
            }
        }
    }
    Ok(())
}

/// Tells the tokens of draws.
type Ask<'a> = dyn Fn(&[usize]) -> Result<Vec<usize>, String> + 'a;

/// Where the draws of each token begin, and all of them end, given the tokens of any of them.
fn ends(draws: usize, ask: &Ask<'_>) -> Result<Vec<usize>, String> {
    // The first draw of a token or a higher one lies in there.
    let mut places = vec![0..draws; VOCAB + 1];
    loop {
        let open = places.iter().filter(|place| !place.is_empty());
        let middles: BTreeSet<usize> = open.map(|place| place.start.midpoint(place.end)).collect();
        if middles.is_empty() {
            return Ok(places.into_iter().map(|place| place.start).collect());
        }
        let middles: Vec<usize> = middles.into_iter().collect();
        for (&at, token) in middles.iter().zip(ask(&middles)?) {
            for (id, place) in places.iter_mut().enumerate().filter(|(_, p)| p.contains(&at)) {
                *place = if token < id { at + 1..place.end } else { place.start..at };
            }
        }
    }
}

/// The first 64 bits of Philox4x32-10 at counter (position, 0) under key seed.
fn philox(seed: u64, position: u64) -> u64 {
    let (mut key, mut counter) = ([seed as u32, (seed >> 32) as u32], [0; 4]);
    (counter[0], counter[1]) = (position as u32, (position >> 32) as u32);
    for _ in 0..10 {
        let [a, b] = [(0xd251_1f53_u64, 0), (0xcd9e_8d57, 2)]
            .map(|(factor, at)| factor * u64::from(counter[at]));
        let high = |product: u64| (product >> 32) as u32;
        counter =
            [high(b) ^ counter[1] ^ key[0], b as u32, high(a) ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    u64::from(counter[0]) << 32 | u64::from(counter[1])
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
