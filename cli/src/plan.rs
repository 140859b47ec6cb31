//! `lockstep plan`: what a model takes of cards, and how fast it will be on them.

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use cuda::{CudaConfig, KvFormat, WeightFormat};
use model::Numbers;
use worker::plan::{Hardware, Plan, PlanConfig, StepTime, plan};

use crate::{args::FloatName, source};

/// How layers' weights are kept.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum WeightsName {
    Bf16,
    /// e4m3
    Fp8,
    /// Of a GPTQ or AWQ checkpoint with groups of 128
    Int4,
}

/// Flags of `plan`.
#[derive(Args)]
pub struct PlanArgs {
    /// A model that is here, or a folder with nothing but its config.json
    #[arg(long, env = "LOCKSTEP_MODEL")]
    model: String,
    /// Kind of the cards, one for each rank: h100, h200, h20, a100-40, a100-80, l40s, l4, a10 or
    /// rtx-4090
    #[arg(long, value_parser = Hardware::named, env = "LOCKSTEP_GPU")]
    gpu: &'static Hardware,
    /// Tensor-parallel ranks
    #[arg(long, default_value_t = 1, env = "LOCKSTEP_TP")]
    tp: usize,
    /// Tokens of prompt and answer together [default: the model's, as far as memory allows]
    #[arg(long, env = "LOCKSTEP_CONTEXT")]
    context: Option<usize>,
    /// How the cards keep the layers' weights; int4 plans for such a checkpoint of the model
    /// [default: bf16, or what the file stores in 4 bits]
    #[arg(long, value_enum, env = "LOCKSTEP_WEIGHTS")]
    weights: Option<WeightsName>,
    /// How CUDA cards keep keys and values; fp8, with a scale for each token and head, takes about
    /// half the memory [default: bf16]
    #[arg(long, value_enum, env = "LOCKSTEP_KV_CACHE")]
    kv_cache: Option<FloatName>,
    /// Tokens in one step, at most [default: 4096 or what memory allows]
    #[arg(long, env = "LOCKSTEP_STEP_TOKENS")]
    step_tokens: Option<usize>,
    /// Sequences that run at once, at most
    #[arg(long, default_value_t = 256, env = "LOCKSTEP_SEQUENCES")]
    sequences: usize,
    /// Prints one JSON object
    #[arg(long, env = "LOCKSTEP_JSON")]
    json: bool,
}

impl PlanArgs {
    fn resolve(&self) -> Result<PlanConfig> {
        for (flag, value) in [
            ("--tp", self.tp),
            ("--context", self.context.unwrap_or(1)),
            ("--step-tokens", self.step_tokens.unwrap_or(1)),
            ("--sequences", self.sequences),
        ] {
            if value == 0 {
                bail!("{flag} must be at least 1");
            }
        }
        let mut cuda = CudaConfig::default();
        if let Some(WeightsName::Fp8) = self.weights {
            cuda.weights = WeightFormat::Fp8;
        }
        if let Some(FloatName::Fp8) = self.kv_cache {
            cuda.kv_format = KvFormat::Fp8;
        }
        Ok(PlanConfig {
            model: source::present(&self.model)?,
            hardware: self.gpu,
            ranks: self.tp,
            cuda,
            numbers: match self.weights {
                Some(WeightsName::Int4) => Some(Numbers::INT4),
                _ => None,
            },
            context_max: self.context,
            step_tokens_max: self.step_tokens,
            sequences_max: self.sequences,
        })
    }
}

pub fn main(args: PlanArgs) -> Result<()> {
    let plan = plan(&args.resolve()?)?;
    if args.json {
        return crate::print(serde_json::to_string(&plan)?);
    }
    crate::print(shown(&plan))
}

/// For people.
fn shown(plan: &Plan) -> String {
    let Plan { name, parameters, kv_bytes_per_token, .. } = plan;
    let mut lines = vec![format!(
        "{name}: {parameters} parameters, {kv_bytes_per_token} bytes of KV cache a token"
    )];
    lines.extend(plan.memory.iter().cloned());
    if let Some(advice) = &plan.advice {
        lines.push(format!("does not fit; {advice}"));
        return lines.join("\n");
    }
    lines.push(format!(
        "fits: {} tokens of KV cache, a context of {}, steps of up to {} tokens",
        plan.kv_tokens, plan.context_max, plan.step_tokens_max
    ));
    let head = ["", "sequences", "context", "GB a rank", "floor ms", "predicted ms"];
    let row = |cells: [&str; 6]| {
        let [what, rest @ ..] = cells;
        rest.iter().fold(format!("{what:8}"), |line, cell| format!("{line}{cell:>14}"))
    };
    lines.push(row(head));
    let steps = |what: &'static str, steps: &[StepTime]| -> Vec<String> {
        let line = |step: &StepTime| {
            row([
                what,
                &step.batch.to_string(),
                &step.context.to_string(),
                &format!("{:.1}", step.bytes as f64 / 1e9),
                &format!("{:.1}", step.floor_ms),
                &format!("{:.1}", step.predicted_ms),
            ])
        };
        steps.iter().map(line).collect()
    };
    lines.extend(steps("decode", &plan.decode));
    lines.extend(steps("prefill", &plan.prefill));
    lines.push(
        "floors are bytes over the data sheet's bandwidth, or operations over its peak; predicted \
         is an estimate of this version, within 8 points of the floor's share"
            .into(),
    );
    lines.push(format!(
        "a step that takes {:.1} s is taken for hung",
        plan.step_deadline.as_secs_f64()
    ));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use serde_json::{Value, json};

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        plan: PlanArgs,
    }

    fn parsed(flags: &str) -> Result<PlanArgs, clap::Error> {
        let words = format!("x {flags}");
        Line::try_parse_from(words.split_whitespace()).map(|line| line.plan)
    }

    fn folder() -> tempfile::TempDir {
        let config = json!({
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152_064,
            "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
            "tie_word_embeddings": false,
        });
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("config.json"), config.to_string()).expect("written");
        folder
    }

    #[test]
    fn the_object_has_what_it_is_documented_to_have() {
        let folder = folder();
        let flags = format!("--model {} --gpu l40s --weights fp8", folder.path().display());
        let args = parsed(&flags).expect("flags");
        let plan = plan(&args.resolve().expect("settings")).expect("a plan");
        let object: Value = serde_json::to_value(&plan).expect("an object");
        let keys: Vec<&str> = object.as_object().expect("one").keys().map(|key| &**key).collect();
        let wanted =
            ["parameters", "kv_bytes_per_token", "ranks", "kv_tokens", "fits", "decode", "prefill"];
        assert_eq!(keys, wanted);
        assert_eq!(object["parameters"], 7_615_616_512u64);
        for key in ["weights_bytes", "scratch_bytes", "kv_bytes"] {
            assert!(object["ranks"][0][key].as_u64().is_some_and(|bytes| bytes > 0), "{key}");
        }
        for list in ["decode", "prefill"] {
            for key in ["batch", "context", "bytes", "floor_ms", "predicted_ms"] {
                assert!(object[list][0][key].as_f64().is_some_and(|n| n > 0.0), "{list} {key}");
            }
        }
        let text = shown(&plan);
        assert!(text.contains("fits: ") && text.contains("decode "), "{text}");
        assert!(text.lines().any(|line| line.starts_with("rank 0 on l40s")), "{text}");
    }

    #[test]
    fn what_makes_no_plan_is_refused() {
        let Err(unknown) = parsed("--model . --gpu v100") else { panic!("no such card") };
        assert!(unknown.to_string().contains("h200, h20, a100-40"), "{unknown}");
        let refused = |flags: &str| match parsed(flags).expect("flags").resolve() {
            Ok(_) => panic!("{flags} was taken"),
            Err(error) => error.to_string(),
        };
        assert!(refused("--model . --gpu h100 --context 0").contains("--context"));
        assert!(refused("--model . --gpu h100 --tp 0").contains("--tp"));
        assert!(refused("--model ./absent --gpu h100").contains("does not exist"));
    }
}
