//! The one place where sampling parameters are checked, whichever API they came by.
//!
//! Absent values come from the model's own `generation_config`, then from the defaults that
//! `inference.proto` names. A value outside its range is refused with its name and the range.

use crate::RouterError;
use proto::v1::{self, SamplingParams};
use text::{GenerationDefaults, Stops};

/// Choices of one prompt.
const N_MAX: u32 = 128;
const LOGPROBS_MAX: u32 = 20;
const STOPS_MAX: usize = 64;
const STOP_BYTES_MAX: usize = 1024;
const STOP_IDS_MAX: usize = 256;
const LOGIT_BIAS_MAX: usize = 1024;

/// What is valid and complete, but for the seed of each choice.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Sampling {
    /// `seed` is not yet that of a choice.
    pub params: SamplingParams,
    /// The client's.
    pub seed: Option<u64>,
    /// `None`: up to the context.
    pub max_tokens: Option<u32>,
    pub n: u32,
    pub stops: Stops,
    /// Those of stop strings and end-of-sequence ids included, unless the latter are ignored.
    pub stop_ids: Vec<u32>,
    pub echo: bool,
}

/// Checks everything and fills in the defaults. `special` knows the ids of special tokens by their
/// names. Errors: `Invalid`, with the parameter's name.
pub(crate) fn resolve(
    input: v1::Sampling,
    defaults: &GenerationDefaults,
    vocab_size: usize,
    special: impl Fn(&str) -> Option<u32>,
) -> Result<Sampling, RouterError> {
    let n = input.n.unwrap_or(1);
    if !(1..=N_MAX).contains(&n) {
        return Err(outside("n", n, &format!("1 to {N_MAX}")));
    }
    if let Some(k) = input.logprobs.filter(|&k| k > LOGPROBS_MAX) {
        return Err(outside("logprobs", k, &format!("0 to {LOGPROBS_MAX}")));
    }
    if input.max_tokens == Some(0) && !input.echo {
        return Err(outside("max_tokens", 0, "at least 1 (0 only with echo)"));
    }
    if let Some(max) = input.max_tokens.filter(|&max| max < input.min_tokens) {
        return Err(outside("min_tokens", input.min_tokens, &format!("0 to max_tokens, {max}")));
    }
    check_stops(&input.stop)?;
    check_ids(&input, vocab_size)?;
    let params = params(&input, defaults)?;
    let mut stops = Stops::new(input.stop, special);
    stops.named.retain(|(id, _)| (*id as usize) < vocab_size);
    stops.keep = input.include_stop_str_in_output;
    stops.min_tokens = input.min_tokens;
    let mut stop_ids = input.stop_token_ids;
    stop_ids.extend(stops.named.iter().map(|(id, _)| id));
    if !input.ignore_eos {
        stop_ids.extend(&defaults.eos_ids);
    }
    stop_ids.sort_unstable();
    stop_ids.dedup();
    Ok(Sampling {
        params,
        seed: input.seed,
        max_tokens: input.max_tokens,
        n,
        stops,
        stop_ids,
        echo: input.echo,
    })
}

/// The seed of the choice with this index over all prompts of a request: that of the client for
/// the first, a mix of both for the others (the finaliser of SplitMix64), so that seeds and choices
/// that are neighbours have nothing in common.
pub(crate) fn choice_seed(seed: u64, index: u32) -> u64 {
    if index == 0 {
        return seed;
    }
    let mut mixed = seed.wrapping_add(u64::from(index).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ mixed >> 31
}

fn params(
    input: &v1::Sampling,
    defaults: &GenerationDefaults,
) -> Result<SamplingParams, RouterError> {
    let unit = |name, value: Option<f32>| ranged(name, value, 0.0..=1.0, "[0, 1]");
    let penalty = |name, value: Option<f32>| ranged(name, value, -2.0..=2.0, "[-2, 2]");
    let temperature = ranged("temperature", input.temperature, 0.0..=2.0, "[0, 2]")?;
    let top_p = unit("top_p", input.top_p)?.or(defaults.top_p).unwrap_or(1.0);
    let top_k = input.top_k.or(defaults.top_k).unwrap_or(0);
    // No mass at all still leaves the likeliest token, and only that.
    let (top_p, top_k) = if top_p == 0.0 { (1.0, 1) } else { (top_p, top_k) };
    let repetition = ranged(
        "repetition_penalty",
        input.repetition_penalty,
        f32::MIN_POSITIVE..=100.0,
        "(0, 100]",
    )?;
    for value in input.logit_bias.values() {
        ranged("logit_bias", Some(*value), -100.0..=100.0, "[-100, 100]")?;
    }
    Ok(SamplingParams {
        temperature: temperature.unwrap_or(defaults.temperature.unwrap_or(1.0)),
        top_p,
        top_k,
        min_p: unit("min_p", input.min_p)?.or(defaults.min_p).unwrap_or(0.0),
        repetition_penalty: repetition.or(defaults.repetition_penalty).unwrap_or(1.0),
        presence_penalty: penalty("presence_penalty", input.presence_penalty)?.unwrap_or(0.0),
        frequency_penalty: penalty("frequency_penalty", input.frequency_penalty)?.unwrap_or(0.0),
        seed: 0,
        logit_bias: input.logit_bias.clone(),
        logprobs: input.logprobs,
        min_tokens: input.min_tokens,
    })
}

/// NaN is in no range.
fn ranged(
    name: &str,
    value: Option<f32>,
    range: std::ops::RangeInclusive<f32>,
    words: &str,
) -> Result<Option<f32>, RouterError> {
    match value {
        Some(value) if !range.contains(&value) => Err(outside(name, value, words)),
        value => Ok(value),
    }
}

fn outside(name: &str, value: impl std::fmt::Display, range: &str) -> RouterError {
    RouterError::invalid(name, format!("{name} must be in {range}, not {value}"))
}

fn check_stops(stops: &[String]) -> Result<(), RouterError> {
    if stops.len() > STOPS_MAX {
        let many = format!("stop takes at most {STOPS_MAX} strings, not {}", stops.len());
        return Err(RouterError::invalid("stop", many));
    }
    for stop in stops {
        if stop.is_empty() || stop.len() > STOP_BYTES_MAX {
            let range = format!("1 to {STOP_BYTES_MAX} bytes each");
            return Err(outside("stop", format!("{} bytes", stop.len()), &range));
        }
    }
    Ok(())
}

fn check_ids(input: &v1::Sampling, vocab_size: usize) -> Result<(), RouterError> {
    let lengths = [
        ("stop_token_ids", input.stop_token_ids.len(), STOP_IDS_MAX),
        ("logit_bias", input.logit_bias.len(), LOGIT_BIAS_MAX),
    ];
    for (name, len, max) in lengths {
        if len > max {
            let many = format!("{name} takes at most {max} ids, not {len}");
            return Err(RouterError::invalid(name, many));
        }
    }
    in_vocabulary("stop_token_ids", &input.stop_token_ids, vocab_size)?;
    let biased: Vec<u32> = input.logit_bias.keys().copied().collect();
    in_vocabulary("logit_bias", &biased, vocab_size)
}

/// Refuses ids that the model does not have.
pub(crate) fn in_vocabulary(name: &str, ids: &[u32], vocab_size: usize) -> Result<(), RouterError> {
    match ids.iter().find(|&&id| id as usize >= vocab_size) {
        Some(id) => {
            let message =
                format!("{name}: token id {id} is outside the vocabulary of {vocab_size}");
            Err(RouterError::invalid(name, message))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{HashMap, HashSet};

    fn with(change: impl FnOnce(&mut v1::Sampling)) -> Result<Sampling, RouterError> {
        let mut input = v1::Sampling::default();
        change(&mut input);
        resolve(input, &GenerationDefaults::default(), 100, |_| None)
    }

    #[test]
    fn every_parameter_is_checked_by_name() {
        type Change = fn(&mut v1::Sampling);
        let table: &[(&str, Change)] = &[
            ("temperature", |i| i.temperature = Some(f32::NAN)),
            ("temperature", |i| i.temperature = Some(-0.1)),
            ("temperature", |i| i.temperature = Some(f32::INFINITY)),
            ("top_p", |i| i.top_p = Some(-0.1)),
            ("top_p", |i| i.top_p = Some(1.1)),
            ("top_p", |i| i.top_p = Some(f32::NAN)),
            ("min_p", |i| i.min_p = Some(-0.1)),
            ("min_p", |i| i.min_p = Some(1.5)),
            ("repetition_penalty", |i| i.repetition_penalty = Some(0.0)),
            ("repetition_penalty", |i| i.repetition_penalty = Some(f32::NAN)),
            ("presence_penalty", |i| i.presence_penalty = Some(2.5)),
            ("frequency_penalty", |i| i.frequency_penalty = Some(-3.0)),
            ("n", |i| i.n = Some(0)),
            ("n", |i| i.n = Some(129)),
            ("logprobs", |i| i.logprobs = Some(21)),
            ("max_tokens", |i| i.max_tokens = Some(0)),
            ("min_tokens", |i| (i.min_tokens, i.max_tokens) = (3, Some(2))),
            ("stop", |i| i.stop = vec![String::new()]),
            ("stop", |i| i.stop = vec!["x".into(); 65]),
            ("stop", |i| i.stop = vec!["x".repeat(1025)]),
            ("stop_token_ids", |i| i.stop_token_ids = vec![100]),
            ("stop_token_ids", |i| i.stop_token_ids = vec![1; 257]),
            ("logit_bias", |i| i.logit_bias = HashMap::from([(100, 0.0)])),
            ("logit_bias", |i| i.logit_bias = HashMap::from([(1, f32::NAN)])),
            ("logit_bias", |i| i.logit_bias = HashMap::from([(1, 100.5)])),
        ];
        for (at, (name, change)) in table.iter().enumerate() {
            match with(change) {
                Err(RouterError::Invalid { param: Some(param), message }) => {
                    assert_eq!(param, *name, "case {at}");
                    assert!(message.contains(name), "case {at}: {message}");
                }
                other => panic!("case {at} ({name}): {other:?}"),
            }
        }
    }

    #[test]
    fn bounds_themselves_are_accepted() {
        let sampling = with(|i| {
            i.temperature = Some(0.0);
            i.top_p = Some(1.0);
            i.min_p = Some(1.0);
            i.presence_penalty = Some(-2.0);
            i.logprobs = Some(20);
            i.n = Some(128);
            i.stop = vec!["x".into(); 64];
            (i.min_tokens, i.max_tokens) = (2, Some(2));
            i.stop_token_ids = vec![99, 99];
        })
        .unwrap();
        assert_eq!(sampling.stop_ids, [99]);
        assert_eq!(sampling.params.temperature, 0.0);
    }

    #[test]
    fn the_models_own_defaults_fill_what_is_absent() {
        let defaults = GenerationDefaults {
            eos_ids: vec![7, 5],
            temperature: Some(0.7),
            top_k: Some(20),
            ..GenerationDefaults::default()
        };
        let input = v1::Sampling { top_k: Some(3), ..v1::Sampling::default() };
        let sampling = resolve(input, &defaults, 100, |_| None).unwrap();
        assert_eq!(sampling.stop_ids, [5, 7]);
        assert_eq!((sampling.params.temperature, sampling.params.top_k), (0.7, 3));
        assert_eq!((sampling.params.top_p, sampling.params.repetition_penalty), (1.0, 1.0));
        let input = v1::Sampling { ignore_eos: true, ..v1::Sampling::default() };
        assert!(resolve(input, &defaults, 100, |_| None).unwrap().stop_ids.is_empty());
    }

    #[test]
    fn no_mass_leaves_the_likeliest_token() {
        let params = with(|i| (i.top_p, i.top_k) = (Some(0.0), Some(40))).unwrap().params;
        assert_eq!((params.top_p, params.top_k), (1.0, 1));
    }

    #[test]
    fn a_stop_string_that_names_a_special_token_is_its_id_as_well() {
        let input = v1::Sampling {
            stop: vec!["a".into(), "<|end|>".into(), "<|far|>".into()],
            stop_token_ids: vec![9],
            ..v1::Sampling::default()
        };
        let special = |name: &str| match name {
            "<|end|>" => Some(7),
            "<|far|>" => Some(100),
            _ => None,
        };
        let sampling = resolve(input, &GenerationDefaults::default(), 100, special).unwrap();
        assert_eq!(sampling.stop_ids, [7, 9]);
        assert_eq!(sampling.stops.named, [(7, "<|end|>".to_owned())]);
        assert_eq!(sampling.stops.strings.len(), 3, "it may also come spelt out");
    }

    #[test]
    fn seeds_and_choices_that_are_neighbours_share_no_draws() {
        let seeds = (0..100u64).flat_map(|seed| (0..100).map(move |at| choice_seed(seed, at)));
        assert_eq!(seeds.collect::<HashSet<_>>().len(), 10_000);
        assert_eq!(choice_seed(7, 0), 7);
        assert_eq!(choice_seed(u64::MAX, 3), choice_seed(u64::MAX, 3));
    }

    #[test]
    fn no_new_token_is_asked_for_only_with_echo() {
        assert!(with(|i| (i.max_tokens, i.echo) = (Some(0), true)).is_ok());
    }
}
