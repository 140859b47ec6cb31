//! Plans of models of which there is a `config.json` alone.

use std::fs;

use cuda::{KvFormat, WeightFormat};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

fn folder(config: &Value) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("config.json"), config.to_string()).expect("written");
    folder
}

fn qwen2_5_72b() -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 152_064,
        "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    })
}

fn qwen_72b() -> Value {
    json!({
        "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "hidden_size": 8192,
        "intermediate_size": 49152, "num_hidden_layers": 80, "num_attention_heads": 64,
        "kv_channels": 128, "vocab_size": 152_064, "seq_length": 32_768,
        "max_position_embeddings": 32_768, "layer_norm_epsilon": 1e-6,
        "rotary_emb_base": 1_000_000, "rotary_pct": 1.0, "no_bias": true, "use_logn_attn": false,
        "use_dynamic_ntk": false, "tie_word_embeddings": false, "scale_attn_weights": true,
    })
}

fn asked(config: &Value, gpu: &str, weights: WeightFormat) -> (TempDir, PlanConfig) {
    let folder = folder(config);
    let plan = PlanConfig {
        model: folder.path().into(),
        hardware: Hardware::named(gpu).expect(gpu),
        ranks: 1,
        cuda: CudaConfig { weights, ..CudaConfig::default() },
        numbers: None,
        context_max: None,
        step_tokens_max: Some(512),
        sequences_max: 64,
    };
    (folder, plan)
}

fn planned(config: &Value, gpu: &str, weights: WeightFormat) -> Plan {
    let (_folder, asked) = asked(config, gpu, weights);
    plan(&asked).expect("a plan")
}

#[test]
fn sizes_are_those_of_the_published_models() {
    let original = planned(&qwen_72b(), "h200", WeightFormat::Fp8);
    assert_eq!(original.parameters, 72_287_920_128);
    assert_eq!(original.kv_bytes_per_token, 2_621_440);
    let grouped = planned(&qwen2_5_72b(), "h200", WeightFormat::Fp8);
    assert_eq!(grouped.kv_bytes_per_token, 327_680);
    assert!(original.fits && grouped.fits);
    // A step reads what the rank holds but the embedding, and a token's keys and values.
    let bytes = |plan: &Plan| plan.decode[0].bytes as f64 / 1e9;
    let kv = |plan: &Plan| (1024 * plan.kv_bytes_per_token) as f64 / 1e9;
    assert!((bytes(&original) - kv(&original) - 72.3).abs() < 0.06, "{}", bytes(&original));
    assert!((original.decode[0].floor_ms - 15.6).abs() < 0.06, "{:?}", original.decode[0]);
    assert!((grouped.decode[0].predicted_ms - 18.8).abs() < 0.1, "{:?}", grouped.decode[0]);
    // 142.1 GB and the embedding leave an H200 nothing; they are told all the same.
    let bf16 = planned(&qwen_72b(), "h200", WeightFormat::Bf16);
    let weights = bf16.ranks[0].weights_bytes as f64 / 1e9;
    assert!((weights - 142.1 - 2.5).abs() < 0.06, "{weights}");
}

/// 75.2 GB of weights on a card with 79.1 GiB.
#[test]
fn a_72b_in_fp8_fits_an_h100_with_little_room_for_keys_and_values() {
    let plan = planned(&qwen2_5_72b(), "h100", WeightFormat::Fp8);
    assert!(plan.fits, "{:?}", plan.memory);
    assert!((16_000..26_000).contains(&plan.kv_tokens), "{} tokens", plan.kv_tokens);
    assert_eq!(plan.context_max.next_multiple_of(16), plan.context_max);
    assert!(plan.context_max <= plan.kv_tokens && plan.context_max < 32_768);
    let card = card::usable_when_idle(Hardware::named("h100").expect("h100").memory_bytes);
    let RankBytes { weights_bytes, scratch_bytes, kv_bytes } = plan.ranks[0];
    let left = card - weights_bytes - scratch_bytes - kv_bytes;
    assert!(left < 16 * plan.kv_bytes_per_token, "{left} bytes left");
    // What does not fit is not timed.
    assert!(plan.decode.iter().all(|step| step.batch * step.context <= plan.kv_tokens));
    assert!(plan.decode.iter().any(|step| step.batch == 8));
}

#[test]
fn what_does_not_fit_is_told_with_what_would() {
    let plan = planned(&qwen2_5_72b(), "h100", WeightFormat::Bf16);
    assert!(!plan.fits && plan.decode.is_empty() && plan.prefill.is_empty());
    let advice = plan.advice.expect("advice");
    for remedy in ["--weights fp8 (", "int4 checkpoint (", "--tp 2 on 2 such cards ("] {
        assert!(advice.contains(remedy), "{advice}");
    }
    assert!(plan.memory[0].starts_with("rank 0 on h100: weights 145.4 GB"), "{}", plan.memory[0]);
    // The whole context beside fp8 weights is too long; a shorter one is not.
    let (_folder, mut whole) = asked(&qwen2_5_72b(), "h100", WeightFormat::Fp8);
    whole.context_max = Some(32_768);
    let plan = super::plan(&whole).expect("a plan");
    let advice = plan.advice.expect("advice");
    assert!(advice.contains("--context ") && advice.contains("--kv-cache fp8"), "{advice}");
    let (_folder, mut hopeless) = asked(&qwen_72b(), "l4", WeightFormat::Bf16);
    hopeless.context_max = Some(10_000_000);
    let hopeless = super::plan(&hopeless).expect("a plan").advice.expect("advice");
    assert!(hopeless.contains("smaller model"), "{hopeless}");
}

/// The KV pool of an H200 beside fp8 weights hardly notices what long steps take; beside them an
/// H100 has little left.
#[test]
fn steps_are_as_long_as_memory_allows() {
    let of = |gpu: &str, step_tokens_max: Option<usize>| {
        let (_folder, one) = asked(&qwen2_5_72b(), gpu, WeightFormat::Fp8);
        plan(&PlanConfig { step_tokens_max, ..one }).expect("a plan")
    };
    let (long, short) = (of("h200", None), of("h200", Some(512)));
    assert_eq!((long.step_tokens_max, long.context_max), (4096, short.context_max));
    assert!(long.kv_tokens < short.kv_tokens && long.kv_tokens > short.kv_tokens / 8 * 7);
    // And of a prompt's time they take less.
    let prompt = |plan: &Plan| plan.prefill.iter().map(|step| step.predicted_ms).sum::<f64>();
    assert!(prompt(&long) < prompt(&short), "{:?}, {:?}", long.prefill, short.prefill);
    let (tight, least) = (of("h100", None), of("h100", Some(512)));
    assert_eq!((tight.fits, tight.context_max), (true, least.context_max));
    assert!(tight.step_tokens_max < 4096, "{}", tight.step_tokens_max);
}

#[test]
fn ranks_and_formats_share_the_bytes() {
    let (_folder, one) = asked(&qwen2_5_72b(), "h200", WeightFormat::Bf16);
    let four = plan(&PlanConfig { ranks: 4, ..one.clone() }).expect("four ranks");
    let weights: u64 = four.ranks.iter().map(|rank| rank.weights_bytes).sum();
    let whole = plan(&one).expect("one rank").ranks[0].weights_bytes;
    // A quarter of down's columns ends inside a record of 64, which is held whole.
    assert!((whole..whole + whole / 500).contains(&weights), "{weights}, {whole} on one rank");
    assert!(four.fits && four.decode[0].floor_ms < 29.8 / 4.0 + 0.1);
    let int4 = PlanConfig { numbers: Some(Numbers::INT4), ..one.clone() };
    let int4 = plan(&int4).expect("int4").ranks[0].weights_bytes as f64 / 1e9;
    // 39.8 GB that a step reads, and the embedding.
    assert!((int4 - 39.8 - 2.5).abs() < 0.1, "{int4}");
    let cuda = CudaConfig { kv_format: KvFormat::Fp8, ..one.cuda };
    let halved = plan(&PlanConfig { cuda, ..one }).expect("fp8 keys and values");
    // And a scale for each of 8 heads of keys and of values in 80 layers.
    assert_eq!(halved.kv_bytes_per_token, 327_680 / 2 + 80 * 2 * 8 * 4);
}

#[test]
fn quantised_configurations_are_planned_as_they_are_stored() {
    let mut gptq = qwen2_5_72b();
    gptq["quantization_config"] =
        json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": false});
    let weights = |config: &Value| {
        planned(config, "h100", WeightFormat::Bf16).ranks[0].weights_bytes as f64 / 1e9
    };
    assert!((weights(&gptq) - 42.3).abs() < 0.1, "{}", weights(&gptq));
    // e4m3 is widened unless it is asked for.
    let mut fp8 = qwen2_5_72b();
    fp8["quantization_config"] = json!({"quant_method": "fp8"});
    assert!((weights(&fp8) - 145.4).abs() < 0.1, "{}", weights(&fp8));
}

#[test]
fn a_mixture_reads_fewer_experts_for_fewer_tokens() {
    let mut config = json!({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "vocab_size": 151_936, "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": false,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "norm_topk_prob": true, "decoder_sparse_step": 1, "mlp_only_layers": [],
    });
    let plan = planned(&config, "h100", WeightFormat::Bf16);
    assert_eq!(plan.parameters, 30_532_122_624);
    let bytes = |batch: usize| {
        let step = plan.decode.iter().find(|step| (step.batch, step.context) == (batch, 1024));
        step.expect("a step").bytes as f64 / 1e9
    };
    // 3.3 of 30.5 thousand million parameters for one token, less the embedding.
    assert!((bytes(1) - 6.1).abs() < 0.4, "{}", bytes(1));
    assert!(bytes(8) > 3.0 * bytes(1) && bytes(8) < 50.0);
    let weights = |config: &Value, weights| {
        planned(config, "h100", weights).ranks[0].weights_bytes as f64 / 1e9
    };
    // Of 29.9 thousand million in layers, a byte each and 4 for each row; tables are bf16.
    let fp8 = weights(&config, WeightFormat::Fp8);
    assert!((fp8 - 31.2).abs() < 0.1, "{fp8}");
    config["quantization_config"] =
        json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": false});
    // 4 bits, and 4 bytes for each 128.
    let int4 = weights(&config, WeightFormat::Bf16);
    assert!((int4 - 17.2).abs() < 0.1, "{int4}");
}

#[test]
fn what_cannot_be_planned_is_refused() {
    let (_folder, good) = asked(&qwen2_5_72b(), "h200", WeightFormat::Bf16);
    let refused = |config: PlanConfig| plan(&config).expect_err("refused").to_string();
    let zero = refused(PlanConfig { context_max: Some(0), ..good.clone() });
    assert!(zero.contains("0 tokens of context"), "{zero}");
    let ranks = refused(PlanConfig { ranks: 65, ..good.clone() });
    assert!(ranks.contains("at most 64 ranks work"), "{ranks}");
    let empty = tempfile::tempdir().expect("a folder");
    let empty = refused(PlanConfig { model: empty.path().into(), ..good.clone() });
    assert!(empty.contains("config.json"), "{empty}");
    let mut strange = qwen2_5_72b();
    strange["architectures"] = json!(["GPT2LMHeadModel"]);
    let strange = folder(&strange);
    let strange = refused(PlanConfig { model: strange.path().into(), ..good.clone() });
    assert!(strange.contains("GPT2LMHeadModel"), "{strange}");
    let endless = PlanConfig { context_max: Some(usize::MAX), ..good };
    assert!(!plan(&endless).expect("a plan").fits);
}

#[test]
fn deadlines_of_steps_follow_the_longest() {
    let plan = planned(&qwen2_5_72b(), "h200", WeightFormat::Fp8);
    let slowest = plan.decode.iter().map(|step| step.predicted_ms).fold(0.0, f64::max) / 1e3;
    let deadline = plan.step_deadline.as_secs_f64();
    assert!(deadline >= 1.0 && deadline >= 5.0 * slowest && deadline < 30.0, "{deadline}");
}

#[test]
fn sizes_read_well() {
    assert_eq!(human(98_362_432), "98 MB");
    assert_eq!(human(1_540_000_000), "1.5 GB");
    assert_eq!(human(900), "1 kB");
}
