//! The one place where sampling parameters are checked, whichever API they came by.
//!
//! Absent values come from the model's own `generation_config`, then from the defaults that
//! `inference.proto` names. A value outside its range is refused with its name and the range.

use crate::RouterError;
use proto::v1::SamplingParams;
use std::collections::{BTreeMap, HashMap};
use text::GenerationDefaults;

/// Choices of one prompt.
const N_MAX: u32 = 128;
const LOGPROBS_MAX: u32 = 20;
const STOPS_MAX: usize = 16;
const STOP_BYTES_MAX: usize = 1024;
const STOP_IDS_MAX: usize = 256;
const LOGIT_BIAS_MAX: usize = 1024;

/// What a client said; `None` where it said nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct SamplingInput {
    pub max_tokens: Option<u32>,
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    pub seed: Option<u64>,
    pub stop: Vec<String>,
    pub stop_token_ids: Vec<u32>,
    pub n: Option<u32>,
    pub logprobs: Option<u32>,
    pub echo: bool,
    pub ignore_eos: bool,
    pub logit_bias: BTreeMap<u32, f32>,
}

/// What is valid and complete, but for the seed of a client that gave none.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Sampling {
    /// `seed` is 0 where the client gave none.
    pub params: SamplingParams,
    pub seed_given: bool,
    /// `None`: up to the context.
    pub max_tokens: Option<u32>,
    pub n: u32,
    pub stop: Vec<String>,
    /// End-of-sequence ids included, unless ignored.
    pub stop_ids: Vec<u32>,
    pub echo: bool,
}

/// Checks everything and fills in the defaults. Errors: `Invalid`, with the parameter's name.
pub(crate) fn resolve(
    input: SamplingInput,
    defaults: &GenerationDefaults,
    vocab_size: usize,
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
    check_stops(&input.stop)?;
    check_ids(&input, vocab_size)?;
    let mut stop_ids = input.stop_token_ids.clone();
    if !input.ignore_eos {
        stop_ids.extend(&defaults.eos_ids);
    }
    stop_ids.sort_unstable();
    stop_ids.dedup();
    let params = params(&input, defaults)?;
    Ok(Sampling {
        params,
        seed_given: input.seed.is_some(),
        max_tokens: input.max_tokens,
        n,
        stop: input.stop,
        stop_ids,
        echo: input.echo,
    })
}

fn params(
    input: &SamplingInput,
    defaults: &GenerationDefaults,
) -> Result<SamplingParams, RouterError> {
    let unit = |name, value: Option<f32>| ranged(name, value, 0.0..=1.0, "[0, 1]");
    let penalty = |name, value: Option<f32>| ranged(name, value, -2.0..=2.0, "[-2, 2]");
    let temperature = ranged("temperature", input.temperature, 0.0..=2.0, "[0, 2]")?;
    let top_p = unit("top_p", input.top_p)?;
    if top_p == Some(0.0) {
        return Err(outside("top_p", 0, "(0, 1]"));
    }
    let repetition = ranged(
        "repetition_penalty",
        input.repetition_penalty,
        f32::MIN_POSITIVE..=100.0,
        "(0, 100]",
    )?;
    Ok(SamplingParams {
        temperature: temperature.unwrap_or(defaults.temperature.unwrap_or(1.0)),
        top_p: top_p.or(defaults.top_p).unwrap_or(1.0),
        top_k: input.top_k.or(defaults.top_k).unwrap_or(0),
        min_p: unit("min_p", input.min_p)?.or(defaults.min_p).unwrap_or(0.0),
        repetition_penalty: repetition.or(defaults.repetition_penalty).unwrap_or(1.0),
        presence_penalty: penalty("presence_penalty", input.presence_penalty)?.unwrap_or(0.0),
        frequency_penalty: penalty("frequency_penalty", input.frequency_penalty)?.unwrap_or(0.0),
        seed: input.seed.unwrap_or(0),
        logit_bias: bias(&input.logit_bias)?,
        logprobs: input.logprobs,
    })
}

fn bias(input: &BTreeMap<u32, f32>) -> Result<HashMap<u32, f32>, RouterError> {
    for value in input.values() {
        ranged("logit_bias", Some(*value), -100.0..=100.0, "[-100, 100]")?;
    }
    Ok(input.iter().map(|(&id, &value)| (id, value)).collect())
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

fn check_ids(input: &SamplingInput, vocab_size: usize) -> Result<(), RouterError> {
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

    fn with(change: impl FnOnce(&mut SamplingInput)) -> Result<Sampling, RouterError> {
        let mut input = SamplingInput::default();
        change(&mut input);
        resolve(input, &GenerationDefaults::default(), 100)
    }

    #[test]
    fn every_parameter_is_checked_by_name() {
        type Change = fn(&mut SamplingInput);
        let table: &[(&str, Change)] = &[
            ("temperature", |i| i.temperature = Some(f32::NAN)),
            ("temperature", |i| i.temperature = Some(-0.1)),
            ("temperature", |i| i.temperature = Some(f32::INFINITY)),
            ("top_p", |i| i.top_p = Some(0.0)),
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
            ("stop", |i| i.stop = vec![String::new()]),
            ("stop", |i| i.stop = vec!["x".into(); 17]),
            ("stop", |i| i.stop = vec!["x".repeat(1025)]),
            ("stop_token_ids", |i| i.stop_token_ids = vec![100]),
            ("stop_token_ids", |i| i.stop_token_ids = vec![1; 257]),
            ("logit_bias", |i| i.logit_bias = BTreeMap::from([(100, 0.0)])),
            ("logit_bias", |i| i.logit_bias = BTreeMap::from([(1, f32::NAN)])),
            ("logit_bias", |i| i.logit_bias = BTreeMap::from([(1, 100.5)])),
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
        let input = SamplingInput { top_k: Some(3), ..SamplingInput::default() };
        let sampling = resolve(input, &defaults, 100).unwrap();
        assert_eq!(sampling.stop_ids, [5, 7]);
        assert_eq!((sampling.params.temperature, sampling.params.top_k), (0.7, 3));
        assert_eq!((sampling.params.top_p, sampling.params.repetition_penalty), (1.0, 1.0));
        let input = SamplingInput { ignore_eos: true, ..SamplingInput::default() };
        assert!(resolve(input, &defaults, 100).unwrap().stop_ids.is_empty());
    }

    #[test]
    fn no_new_token_is_asked_for_only_with_echo() {
        assert!(with(|i| (i.max_tokens, i.echo) = (Some(0), true)).is_ok());
    }
}
