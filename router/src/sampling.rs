//! What a client asks for, whichever API it came by, over what the model's own settings say.
//!
//! How tokens are chosen is checked by the engine's one check; what ends an answer and how often it
//! is given, here. A value outside its range is refused with its name and the range.

use crate::RouterError;
use engine::{EngineError, plan::SamplingParams};
use proto::v1;
use text::{GenerationDefaults, Stops};

/// Choices of one prompt.
const N_MAX: u32 = 128;

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
    if input.max_tokens == Some(0) && !input.echo {
        return Err(outside("max_tokens", 0, "at least 1 (0 only with echo)"));
    }
    if let Some(max) = input.max_tokens.filter(|&max| max < input.min_tokens) {
        return Err(outside("min_tokens", input.min_tokens, &format!("0 to max_tokens, {max}")));
    }
    Stops::check(&input.stop, &input.stop_token_ids, vocab_size)?;
    let params = sampling_params(&input, &defaults.params, vocab_size)?;
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

/// The model's own parameters, with the client's in place of those that it gave; with the client's
/// seed, or 0.
///
/// # Errors
/// `Parameter` and `Token`, for the first that is out of its range.
pub fn sampling_params(
    input: &v1::Sampling,
    model: &SamplingParams,
    vocab_size: usize,
) -> Result<SamplingParams, EngineError> {
    let mut logit_bias: Vec<(u32, f32)> = input.logit_bias.clone().into_iter().collect();
    logit_bias.sort_unstable_by_key(|&(id, _)| id);
    let mut params = SamplingParams {
        temperature: input.temperature.unwrap_or(model.temperature),
        top_p: input.top_p.unwrap_or(model.top_p),
        top_k: input.top_k.unwrap_or(model.top_k),
        min_p: input.min_p.unwrap_or(model.min_p),
        repetition_penalty: input.repetition_penalty.unwrap_or(model.repetition_penalty),
        presence_penalty: input.presence_penalty.unwrap_or(model.presence_penalty),
        frequency_penalty: input.frequency_penalty.unwrap_or(model.frequency_penalty),
        seed: input.seed.unwrap_or(0),
        logit_bias,
        ban: None,
        logprobs: input.logprobs,
    };
    params.settle_top_p();
    params.check(vocab_size)?;
    Ok(params)
}

/// Parameters as a worker takes them. It makes the ban of `min_tokens` out of the stop ids itself.
pub(crate) fn wire(params: SamplingParams, min_tokens: u32) -> v1::SamplingParams {
    v1::SamplingParams {
        temperature: params.temperature,
        top_p: params.top_p,
        top_k: params.top_k,
        min_p: params.min_p,
        repetition_penalty: params.repetition_penalty,
        presence_penalty: params.presence_penalty,
        frequency_penalty: params.frequency_penalty,
        seed: params.seed,
        logit_bias: params.logit_bias.into_iter().collect(),
        logprobs: params.logprobs,
        min_tokens,
    }
}

fn outside(name: &str, value: impl std::fmt::Display, range: &str) -> RouterError {
    RouterError::invalid(name, format!("{name} must be in {range}, not {value}"))
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
        let params = SamplingParams { temperature: 0.7, top_k: 20, ..SamplingParams::NEUTRAL };
        let defaults = GenerationDefaults { eos_ids: vec![7, 5], params };
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
