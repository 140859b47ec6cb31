//! Sampling flags of `run`.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail};
use clap::Args;
use engine::plan::SamplingParams;
use text::GenerationDefaults;

/// What is not given comes from the model's own generation settings.
#[derive(Args, Debug)]
pub struct SamplingArgs {
    /// 0 is greedy
    #[arg(long, allow_negative_numbers = true, env = "LOCKSTEP_TEMPERATURE")]
    temperature: Option<f32>,
    /// Nucleus mass, above 0 and at most 1
    #[arg(long, allow_negative_numbers = true, env = "LOCKSTEP_TOP_P")]
    top_p: Option<f32>,
    /// Likeliest tokens kept; 0 is off
    #[arg(long, env = "LOCKSTEP_TOP_K")]
    top_k: Option<u32>,
    /// Least probability, as a share of the likeliest token's; 0 is off
    #[arg(long, allow_negative_numbers = true, env = "LOCKSTEP_MIN_P")]
    min_p: Option<f32>,
    /// Above 1 makes seen tokens rarer; 1 is off
    #[arg(long, allow_negative_numbers = true, env = "LOCKSTEP_REPETITION_PENALTY")]
    repetition_penalty: Option<f32>,
    /// From -2 to 2; 0 is off
    #[arg(long, allow_negative_numbers = true, env = "LOCKSTEP_PRESENCE_PENALTY")]
    presence_penalty: Option<f32>,
    /// From -2 to 2; 0 is off
    #[arg(long, allow_negative_numbers = true, env = "LOCKSTEP_FREQUENCY_PENALTY")]
    frequency_penalty: Option<f32>,
    /// Same seed, same answer [default: drawn]
    #[arg(long, env = "LOCKSTEP_SEED")]
    seed: Option<u64>,
    /// Added to a token's logit, as ID=VALUE; may be given several times
    #[arg(long, value_parser = bias, allow_hyphen_values = true, env = "LOCKSTEP_LOGIT_BIAS",
        value_delimiter = ',')]
    logit_bias: Vec<(u32, f32)>,
    /// Report each token's logprob and this many of the likeliest
    #[arg(long, env = "LOCKSTEP_LOGPROBS")]
    pub logprobs: Option<u32>,
}

impl SamplingArgs {
    /// Checked parameters for a vocabulary of `vocab` ids.
    pub fn resolve(&self, model: &GenerationDefaults, vocab: usize) -> Result<SamplingParams> {
        let params = SamplingParams {
            temperature: self.temperature.or(model.temperature).unwrap_or(1.0),
            top_p: self.top_p.or(model.top_p).unwrap_or(1.0),
            top_k: self.top_k.or(model.top_k).unwrap_or(0),
            min_p: self.min_p.or(model.min_p).unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.or(model.repetition_penalty).unwrap_or(1.0),
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            seed: self.seed.unwrap_or_else(drawn_seed),
            logit_bias: self.logit_bias.clone(),
            ban: None,
            logprobs: self.logprobs,
        };
        // Each test is written so that a NaN fails it.
        for (flag, value, fine, range) in [
            ("--temperature", params.temperature, params.temperature >= 0.0, "0 or more"),
            (
                "--top-p",
                params.top_p,
                params.top_p > 0.0 && params.top_p <= 1.0,
                "above 0 and at most 1",
            ),
            ("--min-p", params.min_p, (0.0..=1.0).contains(&params.min_p), "from 0 to 1"),
            (
                "--repetition-penalty",
                params.repetition_penalty,
                params.repetition_penalty > 0.0,
                "above 0",
            ),
            (
                "--presence-penalty",
                params.presence_penalty,
                params.presence_penalty.abs() <= 2.0,
                "from -2 to 2",
            ),
            (
                "--frequency-penalty",
                params.frequency_penalty,
                params.frequency_penalty.abs() <= 2.0,
                "from -2 to 2",
            ),
        ] {
            if !fine || !value.is_finite() {
                bail!("{flag} {value} is out of range; it must be {range}");
            }
        }
        for &(id, value) in &params.logit_bias {
            if id as usize >= vocab || value.is_nan() || value.abs() > 100.0 {
                bail!("--logit-bias {id}={value}: ids are below {vocab}, values from -100 to 100");
            }
        }
        if params.logprobs.is_some_and(|count| count as usize > vocab) {
            bail!("--logprobs asks for more than the {vocab} tokens that there are");
        }
        Ok(params)
    }
}

fn bias(text: &str) -> Result<(u32, f32), String> {
    let wrong = || format!("{text:?} is no logit bias; write ID=VALUE, e.g. 42=-5");
    let (id, value) = text.split_once('=').ok_or_else(wrong)?;
    Ok((id.parse().map_err(|_| wrong())?, value.parse().map_err(|_| wrong())?))
}

fn drawn_seed() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_nanos() as u64 ^ u64::from(std::process::id()) << 40
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        sampling: SamplingArgs,
    }

    fn resolve(line: &str, model: &GenerationDefaults) -> Result<SamplingParams> {
        let words = ["run"].into_iter().chain(line.split_whitespace());
        Line::try_parse_from(words)?.sampling.resolve(model, 100)
    }

    #[test]
    fn flags_win_over_the_model_and_the_model_over_neutral_values() {
        let model = GenerationDefaults {
            temperature: Some(0.7),
            top_p: Some(0.8),
            ..GenerationDefaults::default()
        };
        let params = resolve("--top-p 0.5 --logit-bias 3=-5,4=2 --seed 9", &model).unwrap();
        assert_eq!((params.temperature, params.top_p, params.top_k), (0.7, 0.5, 0));
        assert_eq!((params.logit_bias, params.seed), (vec![(3, -5.0), (4, 2.0)], 9));
        assert_eq!(params.repetition_penalty, 1.0);
    }

    #[test]
    fn values_that_no_sampler_can_use_are_refused_by_name() {
        for line in [
            "--temperature=-1",
            "--temperature NaN",
            "--temperature inf",
            "--top-p 0",
            "--top-p 1.1",
            "--min-p=-0.1",
            "--repetition-penalty 0",
            "--presence-penalty 3",
            "--frequency-penalty=-2.5",
            "--logit-bias 100=1",
            "--logit-bias 1=NaN",
            "--logprobs 101",
        ] {
            let flag = line.split(['=', ' ']).next().unwrap();
            let error = resolve(line, &GenerationDefaults::default()).unwrap_err().to_string();
            assert!(error.contains(flag), "{line}: {error}");
        }
    }
}
