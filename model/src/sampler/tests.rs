//! Sampling against distributions and by hand.

use super::*;
use engine::plan::Admission;

fn params() -> SamplingParams {
    SamplingParams { temperature: 1.0, seed: 1, ..SamplingParams::GREEDY }
}

fn seen(params: &SamplingParams, tokens: &[u32], prompt_len: usize) -> Seen {
    Seen::new(&Admission { params: params.clone(), tokens: tokens.to_vec(), prompt_len })
}

impl Sampler {
    fn pick(
        &mut self,
        logits: &[f32],
        params: &SamplingParams,
        seen: &Seen,
        position: usize,
    ) -> Result<TokenLogprob, Refused> {
        self.sample(logits, &next_token(params, seen, position), params.logprobs)
    }
}

/// Normal-looking logits from a fixed generator.
fn row(len: usize, seed: u64) -> Vec<f32> {
    let sum =
        |i: usize| -> f64 { (0..4).map(|k| philox::uniform(seed, (i * 4 + k) as u64) - 0.5).sum() };
    (0..len).map(|i| (sum(i) * 6.0) as f32).collect()
}

/// Every token's probability after the filters, by sorting the whole row in f64.
fn naive(logits: &[f32], params: &SamplingParams) -> Vec<f64> {
    let peak = logits.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    let weight = |id: usize| (f64::from(logits[id] - peak) / f64::from(params.temperature)).exp();
    if params.top_k > 0 {
        order.truncate(params.top_k as usize);
    }
    let mass: f64 = order.iter().map(|&id| weight(id)).sum();
    let (mut sum, mut keep) = (0.0, 0);
    while keep < order.len() && (keep == 0 || sum < f64::from(params.top_p) * mass) {
        sum += weight(order[keep]);
        keep += 1;
    }
    if params.top_p < 1.0 {
        order.truncate(keep);
    }
    order.retain(|&id| weight(id) >= f64::from(params.min_p));
    let kept: f64 = order.iter().map(|&id| weight(id)).sum();
    let mut probabilities = vec![0.0; logits.len()];
    order.iter().for_each(|&id| probabilities[id] = weight(id) / kept);
    probabilities
}

/// The token that `uniform` falls on, walking the ids in order.
fn naive_draw(probabilities: &[f64], uniform: f64) -> u32 {
    let mut sum = 0.0;
    for (id, probability) in probabilities.iter().enumerate() {
        sum += probability;
        if sum > uniform {
            return id as u32;
        }
    }
    probabilities.iter().rposition(|&p| p > 0.0).unwrap() as u32
}

fn filters() -> Vec<SamplingParams> {
    let mut all = vec![params()];
    for top_k in [1, 2, 20, 500, 5000] {
        all.push(SamplingParams { top_k, ..params() });
    }
    for top_p in [1e-6, 0.1, 0.8, 0.95, 0.9999] {
        all.push(SamplingParams { top_p, ..params() });
    }
    for min_p in [0.01, 0.1, 0.5, 1.0] {
        all.push(SamplingParams { min_p, ..params() });
    }
    all.push(SamplingParams { top_k: 20, top_p: 0.8, ..params() });
    all.push(SamplingParams { top_k: 300, top_p: 0.99, min_p: 0.02, ..params() });
    all.push(SamplingParams { top_p: 0.9, min_p: 0.05, ..params() });
    all
}

#[test]
fn every_filter_draws_what_a_naive_one_draws() {
    for len in [1, 5, 64, 1000, 3001] {
        let logits = row(len, len as u64);
        let mut sampler = Sampler::new(len, len);
        for (index, filter) in filters().into_iter().enumerate() {
            for temperature in [0.05, 0.7, 1.0, 1.7, 30.0] {
                let params = SamplingParams { temperature, ..filter.clone() };
                let probabilities = naive(&logits, &params);
                let mut away = 0;
                for position in 0..50 {
                    let got = sampler.pick(&logits, &params, &Seen::default(), position);
                    let uniform = philox::uniform(params.seed, position as u64);
                    let token = got.unwrap().token;
                    assert!(probabilities[token as usize] > 0.0, "{len} {index} {temperature}");
                    away += usize::from(token != naive_draw(&probabilities, uniform));
                }
                // The walk's weights are rounded to f32: a draw may fall on the other side of one.
                assert!(away <= 1, "{away} draws differ: row of {len}, filter {index}");
            }
        }
    }
}

#[test]
fn ties_at_a_boundary_go_to_the_lower_ids() {
    let logits = vec![1.0; 100];
    let mut sampler = Sampler::new(100, 100);
    let params = SamplingParams { top_k: 3, ..params() };
    let drawn: std::collections::BTreeSet<u32> = (0..200)
        .map(|at| sampler.pick(&logits, &params, &Seen::default(), at).unwrap().token)
        .collect();
    assert_eq!(drawn.into_iter().collect::<Vec<_>>(), [0, 1, 2]);
    let greedy = SamplingParams { temperature: 0.0, ..params };
    assert_eq!(sampler.pick(&logits, &greedy, &Seen::default(), 0).unwrap().token, 0);
}

/// χ² of 100,000 draws against the exact probabilities; 99.9th percentile of its distribution.
#[test]
fn draws_follow_the_distribution() {
    let logits: Vec<f32> = (0..40).map(|i| (i % 7) as f32 * 0.5 - (i % 3) as f32 * 0.3).collect();
    let mut sampler = Sampler::new(40, 40);
    let cases = [
        params(),
        SamplingParams { temperature: 0.6, ..params() },
        SamplingParams { top_k: 12, ..params() },
        SamplingParams { top_p: 0.7, temperature: 1.3, ..params() },
        SamplingParams { min_p: 0.2, ..params() },
    ];
    for (case, params) in cases.iter().enumerate() {
        let probabilities = naive(&logits, params);
        let mut counts = [0u32; 40];
        for position in 0..100_000 {
            let token = sampler.pick(&logits, params, &Seen::default(), position).unwrap().token;
            counts[token as usize] += 1;
        }
        let mut chi2 = 0.0;
        for (&count, &probability) in counts.iter().zip(&probabilities) {
            let expected = probability * 1e5;
            if probability == 0.0 {
                assert_eq!(count, 0);
            } else {
                chi2 += (f64::from(count) - expected).powi(2) / expected;
            }
        }
        let freedom = probabilities.iter().filter(|&&p| p > 0.0).count() as f64 - 1.0;
        // Wilson–Hilferty.
        let spread = 2.0 / (9.0 * freedom);
        let bound = freedom * (1.0 - spread + 3.09 * spread.sqrt()).powi(3);
        assert!(chi2 < bound, "case {case}: χ² {chi2} with {freedom} degrees, bound {bound}");
    }
}

#[test]
fn a_draw_depends_on_seed_and_position_alone() {
    let logits = row(5000, 3);
    let params = SamplingParams { top_p: 0.9, ..params() };
    let tokens = |sampler: &mut Sampler, seed: u64| -> Vec<u32> {
        let params = SamplingParams { seed, ..params.clone() };
        let one = |at| sampler.pick(&logits, &params, &Seen::default(), at).unwrap().token;
        (10..60).map(one).collect()
    };
    let mut used = Sampler::new(5000, 5000);
    used.pick(&row(5000, 9), &self::params(), &Seen::default(), 4).unwrap();
    let first = tokens(&mut used, 1);
    assert_eq!(first, tokens(&mut Sampler::new(5000, 5000), 1));
    assert_ne!(first, tokens(&mut used, 2));
}

#[test]
fn penalties_by_hand() {
    let params = SamplingParams {
        repetition_penalty: 2.0,
        presence_penalty: 0.5,
        frequency_penalty: 0.25,
        logit_bias: vec![(3, 1.5), (4, -0.5)],
        ..params()
    };
    // Prompt 0 1, answer 1 2 2.
    let mut seen = seen(&params, &[0, 1, 1, 2], 2);
    seen.push(2);
    let mut row = vec![3.0, -1.0, 4.0, 1.0, 1.0, 1.0];
    penalties::apply(&mut row, &next_token(&params, &seen, 0)).unwrap();
    assert_eq!(row, [1.5, -2.75, 1.0, 2.5, 0.5, 1.0]);
}

#[test]
fn unused_penalties_keep_nothing() {
    let params = params();
    let mut seen = seen(&params, &[0, 1, 2], 2);
    seen.push(5);
    assert!(seen.ascending().is_empty());
}

#[test]
fn bias_and_penalties_decide_greedy_choices() {
    let mut sampler = Sampler::new(6, 6);
    let logits = [3.0, 2.9, 1.0, 0.0, 0.0, 0.0];
    let greedy = SamplingParams { temperature: 0.0, ..params() };
    let token = |sampler: &mut Sampler, params: &SamplingParams, seen: &Seen| {
        sampler.pick(&logits, params, seen, 1).unwrap().token
    };
    assert_eq!(token(&mut sampler, &greedy, &Seen::default()), 0);
    let biased = SamplingParams { logit_bias: vec![(4, 10.0)], ..greedy.clone() };
    assert_eq!(token(&mut sampler, &biased, &Seen::default()), 4);
    let penalized = SamplingParams { presence_penalty: 0.2, ..greedy };
    assert_eq!(token(&mut sampler, &penalized, &seen(&penalized, &[0], 1)), 0);
    assert_eq!(token(&mut sampler, &penalized, &seen(&penalized, &[0], 0)), 1);
}

#[test]
fn a_ban_holds_below_its_position_whatever_favours_the_token() {
    let mut sampler = Sampler::new(6, 6);
    let logits = [9.0, 2.9, 1.0, 0.0, 0.0, 8.0];
    for temperature in [0.0, 0.5, 2.0] {
        let mut params = SamplingParams {
            temperature,
            repetition_penalty: 100.0,
            logit_bias: vec![(0, 100.0), (1, 100.0)],
            logprobs: Some(1),
            ..params()
        };
        params.ban(40, [0, 5]);
        for seed in 0..50 {
            params.seed = seed;
            for position in 0..40 {
                let seen = seen(&params, &[0, 5, 1], 2);
                let said = sampler.pick(&logits, &params, &seen, position).unwrap();
                assert!(![0, 5].contains(&said.token), "{said:?} at {position}");
                assert_eq!(said.top[0].0, 0, "logprobs are the model's own");
            }
        }
        let free = sampler.pick(&logits, &params, &Seen::default(), 40).unwrap();
        assert_eq!(free.token, 0);
    }
}

#[test]
fn logprobs_are_those_of_the_unmodified_logits() {
    let logits = row(997, 5);
    let mut sampler = Sampler::new(997, 997);
    let params = SamplingParams {
        temperature: 0.3,
        top_k: 3,
        logit_bias: vec![(17, 100.0)],
        logprobs: Some(4),
        ..params()
    };
    let got = sampler.pick(&logits, &params, &Seen::default(), 9).unwrap();
    assert_eq!(got.token, 17);
    let normalizer = logits.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
    let close = |logprob: f32, id: u32| {
        (f64::from(logprob) - (f64::from(logits[id as usize]) - normalizer)).abs() < 1e-6
    };
    assert!(close(got.logprob.unwrap(), 17));
    assert_eq!(got.top.len(), 4);
    assert!(got.top.iter().all(|&(id, logprob)| close(logprob, id)));
    let mut best: Vec<u32> = (0..997).collect();
    best.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
    assert_eq!(got.top.iter().map(|top| top.0).collect::<Vec<_>>(), best[..4]);
    let scored = sampler.score(&logits, 5, 2000).unwrap();
    assert!(close(scored.logprob.unwrap(), 5));
    assert_eq!(scored.top.len(), 997);
}

#[test]
fn padding_rows_are_never_chosen() {
    let mut logits = vec![0.0; 16];
    logits[14] = 9.0;
    let mut sampler = Sampler::new(16, 12);
    for temperature in [0.0, 1.0] {
        let params = SamplingParams { temperature, logit_bias: vec![(15, 50.0)], ..params() };
        for position in 0..100 {
            let got = sampler.pick(&logits, &params, &Seen::default(), position).unwrap();
            assert!(got.token < 12);
        }
    }
}

/// As if the forbidden tokens were not there: from a row of the allowed ones alone.
#[test]
fn what_a_mask_forbids_is_never_chosen() {
    let logits = row(700, 11);
    // Every third id, none of the ids 320 to 639, and padding that is no token.
    let fits = |id: usize| id % 3 == 1 && !(320..640).contains(&id);
    let word = |word: usize| (0..32).map(|bit| u32::from(fits(word * 32 + bit)) << bit).sum();
    let mask: Vec<u32> = (0..22).map(word).collect();
    let ids: Vec<u32> = (0..690).filter(|&id| fits(id as usize)).collect();
    let kept: Vec<f32> = ids.iter().map(|&id| logits[id as usize]).collect();
    let (mut whole, mut alone) = (Sampler::new(700, 690), Sampler::new(ids.len(), ids.len()));
    let (free, greedy) = (Seen::default(), SamplingParams { temperature: 0.0, ..params() });
    for params in filters().into_iter().chain([greedy]) {
        for position in 0..40 {
            let next = NextToken { allowed: Some(&mask), ..next_token(&params, &free, position) };
            let got = whole.sample(&logits, &next, None).unwrap().token;
            let wanted = alone.pick(&kept, &params, &free, position).unwrap().token;
            assert_eq!(got, ids[wanted as usize], "{params:?} at {position}");
        }
    }
    for mask in [&[][..], &[0; 22], &[0, 0]] {
        let next = NextToken { allowed: Some(mask), ..NextToken::GREEDY };
        assert_eq!(whole.sample(&logits, &next, None), Err(Refused::NothingAllowed));
    }
}

#[test]
fn rows_that_are_no_numbers_and_bad_parameters_are_refused() {
    let mut sampler = Sampler::new(64, 64);
    let mut logits = vec![0.0; 64];
    let none = Seen::default();
    logits[40] = f32::NAN;
    assert_eq!(sampler.pick(&logits, &params(), &none, 3), Err(Refused::NotFinite));
    assert_eq!(sampler.score(&logits, 1, 0), Err(Refused::NotFinite));
    logits[40] = 0.0;
    assert_eq!(sampler.score(&logits, 64, 0), Err(Refused::Token { token: 64, vocab: 64 }));
    let bias = SamplingParams { logit_bias: vec![(64, 1.0)], ..params() };
    assert_eq!(sampler.pick(&logits, &bias, &none, 3), Err(Refused::Bias { token: 64, vocab: 64 }));
    let bias = SamplingParams { logit_bias: vec![(6, f32::INFINITY)], ..params() };
    assert_eq!(sampler.pick(&logits, &bias, &none, 3), Err(Refused::Adjusted));
    for bad in [
        SamplingParams { temperature: f32::NAN, ..params() },
        SamplingParams { temperature: -1.0, ..params() },
        SamplingParams { top_p: 0.0, ..params() },
        SamplingParams { min_p: 1.5, ..params() },
        SamplingParams { repetition_penalty: 0.0, ..params() },
        SamplingParams { presence_penalty: f32::INFINITY, ..params() },
    ] {
        let refused = sampler.pick(&logits, &bad, &none, 3);
        assert!(matches!(refused, Err(Refused::Parameter { .. })), "{bad:?}");
    }
}

#[test]
fn extreme_temperatures_stay_in_range() {
    let logits = row(300, 8);
    let peak = logits::finite_peak(&logits).unwrap();
    let best = logits::first_at(&logits, peak);
    let mut sampler = Sampler::new(300, 300);
    for filter in filters() {
        let cold = SamplingParams { temperature: 1e-44, ..filter.clone() };
        assert_eq!(sampler.pick(&logits, &cold, &Seen::default(), 0).unwrap().token, best);
        let hot = SamplingParams { temperature: f32::MAX, ..filter };
        assert!(sampler.pick(&logits, &hot, &Seen::default(), 0).unwrap().token < 300);
    }
}
