//! Configurations of every family read, and lying ones refused.

use serde_json::{Value, json};

use super::*;
use crate::weights::parameters;

fn read(config: &Value) -> Result<DecoderConfig, ModelError> {
    DecoderConfig::from_json(config.to_string().as_bytes())
}

fn refusal(config: &Value) -> String {
    read(config).unwrap_err().to_string()
}

fn with(mut config: Value, key: &str, value: Value) -> Value {
    config[key] = value;
    config
}

fn qwen_72b() -> Value {
    json!({
        "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "hidden_size": 8192,
        "intermediate_size": 49152, "kv_channels": 128, "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": 32768, "no_bias": true, "num_attention_heads": 64,
        "num_hidden_layers": 80, "rotary_emb_base": 1_000_000, "rotary_pct": 1.0,
        "scale_attn_weights": true, "seq_length": 32768, "tie_word_embeddings": false,
        "use_dynamic_ntk": false, "use_logn_attn": false, "vocab_size": 152_064
    })
}

fn qwen25_72b() -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"], "eos_token_id": 151_645, "hidden_act": "silu",
        "hidden_size": 8192, "intermediate_size": 29568, "max_position_embeddings": 32768,
        "max_window_layers": 70, "num_attention_heads": 64, "num_hidden_layers": 80,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0,
        "sliding_window": 131_072, "tie_word_embeddings": false, "use_sliding_window": false,
        "vocab_size": 152_064
    })
}

#[test]
fn the_original_72b_has_its_published_size() {
    let config = read(&qwen_72b()).unwrap();
    assert_eq!((config.intermediate, config.kv_heads, config.head_dim), (24576, 64, 128));
    assert_eq!((config.logn, config.rope.dynamic_ntk, config.context_max), (None, None, 32768));
    assert_eq!((config.rope.base, config.sampled_vocab), (1e6, 151_851));
    assert_eq!(parameters(&config).unwrap(), 72_287_920_128);
}

#[test]
fn the_original_7b_in_the_names_of_its_first_release() {
    let config = read(&json!({
        "architectures": ["QWenLMHeadModel"], "n_embd": 4096, "ffn_hidden_size": 22016,
        "n_head": 32, "n_layer": 32, "n_positions": 32768, "seq_length": 8192,
        "rotary_emb_base": 10000, "use_dynamic_ntk": true, "use_logn_attn": true,
        "padded_vocab_size": 151_936
    }))
    .unwrap();
    assert_eq!((config.hidden, config.layers, config.intermediate), (4096, 32, 11008));
    assert_eq!((config.logn, config.rope.dynamic_ntk), (Some(8192), Some(8192)));
    assert_eq!((config.context_max, config.head_dim), (32768, 128));
    assert_eq!(parameters(&config).unwrap(), 7_721_324_544);
}

/// Long prompts need one of the two means; without both the trained length is the end.
#[test]
fn either_means_carries_the_original_models_past_their_trained_length() {
    let mut config = qwen_72b();
    config["seq_length"] = json!(8192);
    for (ntk, logn, context) in
        [(true, true, 32768), (true, false, 32768), (false, true, 32768), (false, false, 8192)]
    {
        config["use_dynamic_ntk"] = json!(ntk);
        config["use_logn_attn"] = json!(logn);
        let read = read(&config).unwrap();
        assert_eq!(read.context_max, context, "ntk {ntk}, logn {logn}");
        assert_eq!(read.rope.dynamic_ntk, ntk.then_some(8192));
        assert_eq!(read.logn, logn.then_some(8192));
    }
}

#[test]
fn whole_numbers_may_be_written_as_floats() {
    let mut config = qwen25_72b();
    for (key, value) in [("hidden_size", 8192.0), ("eos_token_id", 151_645.0)] {
        config[key] = json!(value);
    }
    assert_eq!(read(&config).unwrap(), read(&qwen25_72b()).unwrap());
    assert!(refusal(&with(config, "hidden_size", json!(8192.5))).contains("hidden_size is 8192.5"));
}

#[test]
fn what_editors_and_python_write_is_refused_by_name() {
    let text = qwen25_72b().to_string();
    let marked = format!("\u{feff}{text}");
    let nan = text.replacen("1000000.0", "NaN", 1);
    for (text, says) in [(marked, "byte order mark"), (nan, "NaN")] {
        let error = DecoderConfig::from_json(text.as_bytes()).unwrap_err().to_string();
        assert!(error.contains("config.json") && error.contains(says), "{error}");
    }
}

#[test]
fn published_parameter_counts_of_the_qwen2_line() {
    let size = |hidden: u64, layers: u64, heads: u64, kv: u64, ffn: u64, vocab: u64, tied: bool| {
        let mut config = qwen25_72b();
        for (key, value) in [
            ("hidden_size", hidden),
            ("num_hidden_layers", layers),
            ("num_attention_heads", heads),
            ("num_key_value_heads", kv),
            ("intermediate_size", ffn),
            ("vocab_size", vocab),
        ] {
            config[key] = json!(value);
        }
        config["tie_word_embeddings"] = json!(tied);
        parameters(&read(&config).unwrap()).unwrap()
    };
    assert_eq!(size(896, 24, 14, 2, 4864, 151_936, true), 494_032_768);
    assert_eq!(size(3584, 28, 28, 4, 18944, 152_064, false), 7_615_616_512);
    assert_eq!(size(8192, 80, 64, 8, 29568, 152_064, false), 72_706_203_648);
}

fn qwen15_moe() -> Value {
    let mut config = qwen25_72b();
    for (key, value) in [
        ("architectures", json!(["Qwen2MoeForCausalLM"])),
        ("hidden_size", json!(2048)),
        ("num_hidden_layers", json!(24)),
        ("num_attention_heads", json!(16)),
        ("num_key_value_heads", json!(16)),
        ("intermediate_size", json!(5632)),
        ("vocab_size", json!(151_936)),
        ("moe_intermediate_size", json!(1408)),
        ("shared_expert_intermediate_size", json!(5632)),
        ("num_experts", json!(60)),
        ("num_experts_per_tok", json!(4)),
        ("norm_topk_prob", json!(false)),
        ("decoder_sparse_step", json!(1)),
    ] {
        config[key] = value;
    }
    config
}

fn qwen3_moe() -> Value {
    let mut config = qwen15_moe();
    for (key, value) in [
        ("architectures", json!(["Qwen3MoeForCausalLM"])),
        ("num_hidden_layers", json!(48)),
        ("num_attention_heads", json!(32)),
        ("num_key_value_heads", json!(4)),
        ("head_dim", json!(128)),
        ("moe_intermediate_size", json!(768)),
        ("num_experts", json!(128)),
        ("num_experts_per_tok", json!(8)),
        ("norm_topk_prob", json!(true)),
    ] {
        config[key] = value;
    }
    config
}

#[test]
fn published_parameter_counts_of_mixtures_of_experts() {
    let qwen15 = read(&qwen15_moe()).unwrap();
    assert_eq!(parameters(&qwen15).unwrap(), 14_315_784_192);
    let experts = qwen15.experts.unwrap();
    assert_eq!((experts.normalise, experts.shared), (false, Some(5632)));
    let qwen3 = read(&qwen3_moe()).unwrap();
    assert_eq!(parameters(&qwen3).unwrap(), 30_532_122_624);
    let experts = qwen3.experts.unwrap();
    assert_eq!((experts.normalise, experts.shared, qwen3.qk_norm), (true, None, true));
}

#[test]
fn some_layers_may_have_no_experts() {
    let sparse = |step: u64, dense: &[u64]| {
        let config = with(qwen3_moe(), "decoder_sparse_step", json!(step));
        let config = with(config, "num_hidden_layers", json!(6));
        let config = read(&with(config, "mlp_only_layers", json!(dense))).unwrap();
        let sparse: Vec<usize> = (0..6).filter(|l| config.experts_of(*l).is_some()).collect();
        assert_eq!(config.has_dense_layers(), sparse.len() < 6);
        sparse
    };
    assert_eq!(sparse(1, &[]), [0, 1, 2, 3, 4, 5]);
    assert_eq!(sparse(2, &[]), [1, 3, 5]);
    assert_eq!(sparse(1, &[0, 5]), [1, 2, 3, 4]);
    assert_eq!(sparse(2, &[3]), [1, 5]);
}

#[test]
fn rope_scaling_in_old_and_new_layout() {
    let yarn = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768});
    let config = read(&with(qwen25_72b(), "rope_scaling", yarn)).unwrap();
    assert_eq!(config.context_max, 131_072);
    let RopeScaling::Yarn { factor, original_context, attention_factor, beta_fast, .. } =
        config.rope.scaling
    else {
        panic!("{:?}", config.rope)
    };
    assert_eq!((factor, original_context, beta_fast), (4.0, 32768, 32.0));
    assert!((attention_factor - 1.138_629_436).abs() < 1e-9);

    let gathered = json!({"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
    let mut config = with(qwen25_72b(), "rope_parameters", gathered);
    config.as_object_mut().unwrap().remove("rope_theta");
    let rope = read(&config).unwrap().rope;
    assert_eq!(rope.base, 5e5);
    assert!(matches!(rope.scaling, RopeScaling::Llama3 { original_context: 8192, .. }));

    let other = json!({"type": "dynamic", "factor": 2.0});
    assert!(refusal(&with(qwen25_72b(), "rope_scaling", other)).contains("rope scaling dynamic"));
    let odd = json!({"type": "yarn"});
    assert!(refusal(&with(qwen25_72b(), "rope_scaling", odd)).contains("lacks factor"));
}

#[test]
fn windows_count_only_where_they_are_switched_on() {
    assert!(read(&qwen25_72b()).unwrap().window.iter().all(Option::is_none));
    let on = with(qwen25_72b(), "use_sliding_window", json!(true));
    let window = read(&on).unwrap().window;
    assert_eq!((window[69], window[70], window[79]), (None, Some(131_072), Some(131_072)));
    let mut kinds = vec!["full_attention"; 80];
    kinds[3] = "sliding_attention";
    let window = read(&with(on.clone(), "layer_types", json!(kinds))).unwrap().window;
    assert_eq!((window[3], window[70]), (Some(131_072), None));
    kinds[3] = "linear_attention";
    assert!(refusal(&with(on, "layer_types", json!(kinds))).contains("linear_attention"));
}

#[test]
fn end_tokens_are_one_several_or_none() {
    assert_eq!(read(&qwen25_72b()).unwrap().eos_ids, [151_645]);
    let several = with(qwen25_72b(), "eos_token_id", json!([151_645, 151_643]));
    assert_eq!(read(&several).unwrap().eos_ids, [151_645, 151_643]);
    assert!(read(&with(qwen25_72b(), "eos_token_id", Value::Null)).unwrap().eos_ids.is_empty());
    assert!(refusal(&with(qwen25_72b(), "eos_token_id", json!("x"))).contains("eos_token_id"));
}

#[test]
fn what_is_not_done_is_refused_by_name() {
    let llama = with(qwen25_72b(), "architectures", json!(["LlamaForCausalLM"]));
    let qwen3 = with(qwen25_72b(), "architectures", json!(["Qwen3ForCausalLM"]));
    let cases = [
        (with(qwen25_72b(), "architectures", json!(["GPT2LMHeadModel"])), "GPT2LMHeadModel"),
        (with(qwen25_72b(), "architectures", json!([])), "does not name one architecture"),
        (with(qwen25_72b(), "hidden_act", json!("gelu")), "hidden_act"),
        (with(llama.clone(), "attention_bias", json!(true)), "attention_bias"),
        (with(llama, "mlp_bias", json!(true)), "mlp_bias"),
        (with(qwen3, "attention_bias", json!(true)), "attention_bias"),
        (with(qwen_72b(), "rotary_pct", json!(0.5)), "rotary_pct"),
        (with(qwen_72b(), "no_bias", json!(false)), "no_bias"),
    ];
    for (config, expected) in cases {
        assert!(refusal(&config).contains(expected), "{}", refusal(&config));
    }
}

#[test]
fn senseless_numbers_are_refused() {
    let cases = [
        ("hidden_size", json!(0), "hidden size of 0"),
        ("hidden_size", json!(-1), "hidden_size is -1, not a whole number"),
        ("hidden_size", json!(u64::MAX), "hidden size"),
        ("num_hidden_layers", json!(u64::MAX), "layers"),
        ("num_attention_heads", json!(0), "query heads of 0"),
        ("num_key_value_heads", json!(0), "kv heads of 0"),
        ("num_key_value_heads", json!(7), "7 kv heads"),
        ("head_dim", json!(63), "63 dimensions"),
        ("vocab_size", Value::Null, "lacks vocab_size"),
        ("rms_norm_eps", json!(-1.0), "epsilon"),
        ("rope_theta", json!(0), "rope base of 0"),
        ("max_position_embeddings", json!("long"), "max_position_embeddings"),
    ];
    for (key, value, expected) in cases {
        let refusal = refusal(&with(qwen25_72b(), key, value));
        assert!(refusal.contains(expected), "{refusal}");
    }
    let cases = [
        ("num_experts", json!(0), "4 of 0 experts"),
        ("num_experts", json!(3), "4 of 3 experts"),
        ("num_experts", json!(1 << 20), "of 1048576 experts"),
        ("num_experts_per_tok", json!(0), "0 of 60 experts"),
        ("moe_intermediate_size", json!(0), "experts of width 0"),
        ("shared_expert_intermediate_size", Value::Null, "lacks shared_expert_intermediate_size"),
        ("mlp_only_layers", json!(["first"]), "mlp_only_layers"),
        ("qkv_bias", json!(false), "qkv_bias"),
    ];
    for (key, value, expected) in cases {
        let refusal = refusal(&with(qwen15_moe(), key, value));
        assert!(refusal.contains(expected), "{refusal}");
    }
    assert!(DecoderConfig::from_json(b"[]").is_err());
    assert!(DecoderConfig::from_json(b"{").is_err());
}
