//! Sampling flags of `run`.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use clap::Args;
use engine::plan::SamplingParams;
use proto::v1;
use router::sampling_params;

/// What is not given comes from the model's own generation settings.
#[derive(Args, Debug)]
pub struct SamplingArgs {
    /// From 0 to 2; 0 is greedy
    #[arg(long, allow_negative_numbers = true, env = "LOCKSTEP_TEMPERATURE")]
    temperature: Option<f32>,
    /// Nucleus mass, at most 1; 0 leaves the likeliest token only
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
    /// Report each token's logprob and this many of the likeliest, at most 20
    #[arg(long, env = "LOCKSTEP_LOGPROBS")]
    pub logprobs: Option<u32>,
}

impl SamplingArgs {
    /// Checked parameters for a vocabulary of `vocab` ids, as a router would make them.
    pub fn resolve(&self, model: &SamplingParams, vocab: usize) -> Result<SamplingParams> {
        let asked = v1::Sampling {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            seed: Some(self.seed.unwrap_or_else(drawn_seed)),
            logit_bias: self.logit_bias.iter().copied().collect(),
            logprobs: self.logprobs,
            ..v1::Sampling::default()
        };
        sampling_params(&asked, model, vocab).map_err(|error| {
            let flag = error.parameter().map(|name| format!("--{}", name.replace('_', "-")));
            match flag {
                Some(flag) => anyhow::Error::new(error).context(flag),
                None => error.into(),
            }
        })
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

    fn resolve(line: &str, model: &SamplingParams) -> Result<SamplingParams> {
        let words = ["run"].into_iter().chain(line.split_whitespace());
        Line::try_parse_from(words)?.sampling.resolve(model, 100)
    }

    #[test]
    fn flags_win_over_the_model_and_the_model_over_neutral_values() {
        let model = SamplingParams { temperature: 0.7, top_p: 0.8, ..SamplingParams::NEUTRAL };
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
            "--temperature 2.1",
            "--top-p 1.1",
            "--min-p=-0.1",
            "--repetition-penalty 0",
            "--presence-penalty 3",
            "--frequency-penalty=-2.5",
            "--logit-bias 100=1",
            "--logit-bias 1=NaN",
            "--logprobs 21",
        ] {
            let flag = line.split(['=', ' ']).next().unwrap();
            let error = resolve(line, &SamplingParams::NEUTRAL).unwrap_err();
            assert_eq!(error.to_string(), flag, "{line}: {error:#}");
            let name = flag[2..].replace('-', "_");
            assert!(error.root_cause().to_string().starts_with(&name), "{line}: {error:#}");
        }
        let none = resolve("--top-p 0", &SamplingParams::NEUTRAL).unwrap();
        assert_eq!((none.top_p, none.top_k), (1.0, 1), "as everywhere: the likeliest token only");
    }
}
