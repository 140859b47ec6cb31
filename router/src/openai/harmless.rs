//! Parameters of other servers and of client libraries that this router has no use for. One is
//! refused by name only where honouring it would change the answer.
//!
//! Known are those of OpenAI and Azure, vLLM, SGLang, llama.cpp and Ollama, and what LiteLLM,
//! LangChain, guidellm and OpenRouter's clients send along.

use super::fields::Fields;
use crate::RouterError;
use serde_json::Value;

/// Hints, labels and bookkeeping: no value changes an answer.
const IGNORED: &[&str] = &[
    // OpenAI and Azure.
    "metadata",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning_effort",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "user_security_context",
    "verbosity",
    // vLLM. Lengths are weighed in beam search alone.
    "cache_control",
    "cache_salt",
    "early_stopping",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
    "length_penalty",
    "mm_processor_kwargs",
    "request_id",
    "spaces_between_special_tokens",
    // SGLang.
    "custom_labels",
    "data_parallel_rank",
    "extra_key",
    "no_logs",
    "return_cached_tokens_details",
    "rid",
    "routed_dp_rank",
    "separate_reasoning",
    "stream_reasoning",
    // llama.cpp. A cached prefix changes no bit of an answer; the details of samplers that are off
    // change nothing either.
    "backend_sampling",
    "cache_prompt",
    "dry_allowed_length",
    "dry_base",
    "dry_penalty_last_n",
    "dry_sequence_breakers",
    "dynatemp_exponent",
    "id_slot",
    "mirostat_eta",
    "mirostat_tau",
    "n_discard",
    "n_keep",
    "parse_tool_calls",
    "reasoning_in_content",
    "repeat_last_n",
    "return_progress",
    "slot_id",
    "speculative.n_max",
    "speculative.n_min",
    "speculative.p_min",
    "timings_per_token",
    "xtc_threshold",
    // Ollama, LiteLLM, OpenRouter.
    "keep_alive",
    "litellm_call_id",
    "litellm_metadata",
    "litellm_session_id",
    "litellm_trace_id",
    "provider",
    "session_id",
    "tags",
    "usage",
];

/// What changes nothing at these values alone, as JSON.
const ONLY: &[(&str, &str)] = &[
    ("function_call", r#"["auto", "none"]"#),
    ("modalities", r#"[["text"]]"#),
    ("response_format", r#"[{"type": "text"}]"#),
    // vLLM and SGLang.
    ("include_reasoning", "[true]"),
    ("no_stop_trim", "[false]"),
    ("skip_special_tokens", "[true]"),
    // llama.cpp: each sampler's way to say that it is off.
    ("dry_multiplier", "[0]"),
    ("dynatemp_range", "[0]"),
    ("min_keep", "[0]"),
    ("mirostat", "[0]"),
    ("n_probs", "[0]"),
    ("reasoning_format", r#"["none", "auto"]"#),
    ("repeat_penalty", "[1]"),
    ("t_max_predict_ms", "[0, -1]"),
    ("tfs_z", "[1]"),
    ("top_n_sigma", "[-1, 0]"),
    ("typical_p", "[1]"),
    ("xtc_probability", "[0]"),
];

/// What would change the answer, and is not here.
const UNSUPPORTED: &[&str] = &[
    // OpenAI and Azure.
    "audio",
    "dataSources",
    "data_sources",
    "enhancements",
    "functions",
    "web_search_options",
    // vLLM.
    "allowed_token_ids",
    "bad_words",
    "chat_template",
    "documents",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "kv_transfer_params",
    "logits_processors",
    "prompt_embeds",
    "prompt_logprobs",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "structural_tag",
    "structured_outputs",
    "thinking_token_budget",
    "truncate_prompt_tokens",
    "use_beam_search",
    "vllm_xargs",
    // SGLang.
    "custom_logit_processor",
    "custom_params",
    "ebnf",
    "input_ids",
    "lora_path",
    "regex",
    "return_hidden_states",
    "return_routed_experts",
    "session_params",
    "stop_regex",
    // llama.cpp.
    "grammar",
    "image_data",
    "json_schema",
    "lora",
    "penalize_nl",
    "post_sampling_probs",
    "response_fields",
    "return_tokens",
    "samplers",
    "thinking_forced_open",
    // Ollama and OpenRouter.
    "models",
    "options",
    "plugins",
    "transforms",
];

/// Takes what is left of a body and has no use here.
pub(crate) fn harmless(fields: &mut Fields) -> Result<(), RouterError> {
    for name in IGNORED {
        fields.ignore(name);
    }
    for (name, values) in ONLY {
        // Parsed only where it is looked at: these are rare.
        if fields.has(name) {
            let values: Vec<Value> = serde_json::from_str(values)
                .map_err(|error| RouterError::Internal(format!("{name}: {error}")))?;
            fields.only(name, &values)?;
        }
    }
    for name in UNSUPPORTED {
        fields.unsupported(name)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_list_is_well_formed_and_no_name_is_in_two() {
        let only = ONLY.iter().map(|(name, _)| name);
        let all: Vec<&&str> = IGNORED.iter().chain(only).chain(UNSUPPORTED).collect();
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len());
        for (name, values) in ONLY {
            let values: Vec<Value> = serde_json::from_str(values).unwrap();
            for value in values {
                let body = serde_json::json!({*name: value}).to_string();
                let mut fields = Fields::parse(body.as_bytes()).unwrap();
                harmless(&mut fields).unwrap();
                assert!(fields.finish().unwrap().is_empty());
            }
        }
    }

    #[test]
    fn what_asks_for_something_is_refused_by_name() {
        let refused = |body: &str| harmless(&mut Fields::parse(body.as_bytes()).unwrap());
        for name in UNSUPPORTED {
            for value in ["null", "false", "[]", "{}", "\"\""] {
                refused(&format!("{{\"{name}\": {value}}}")).unwrap();
            }
            let error = refused(&format!("{{\"{name}\": 1}}")).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
        for body in [r#"{"skip_special_tokens": false}"#, r#"{"repeat_penalty": 1.1}"#] {
            refused(body).unwrap_err();
        }
        refused(r#"{"repeat_penalty": 1.0}"#).unwrap();
    }
}
