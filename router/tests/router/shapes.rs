//! What OpenAI's and other servers' clients send, and the shapes that they read: each with the
//! value that the reference gives.

use crate::{Cluster, MODEL, worker::language};
use serde_json::{Value, json};
use std::{collections::BTreeSet, sync::atomic::Ordering};

pub const CHAT: &str = "/v1/chat/completions";
pub const COMPLETIONS: &str = "/v1/completions";
const TEXT: &str = "Hello, wörld! 漢字 done.";
const START: u32 = 481;
const END: u32 = 482;

pub fn with(mut body: Value, extra: &Value) -> Value {
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

pub fn chat(extra: Value) -> Value {
    let messages = json!([{"role": "user", "content": "Say hello"}]);
    with(json!({"model": MODEL, "messages": messages}), &extra)
}

pub fn completion(extra: Value) -> Value {
    with(json!({"model": MODEL, "prompt": "Once upon", "max_tokens": 100}), &extra)
}

pub async fn answered(cluster: &Cluster, path: &str, body: &Value) -> Value {
    let reply = cluster.http().post(path, body).await;
    assert_eq!(reply.status, 200, "{body} got {}", reply.body);
    reply.json()
}

/// The seeds of all calls so far, which are then forgotten.
fn seeds(cluster: &Cluster) -> BTreeSet<u64> {
    let runs = std::mem::take(&mut *cluster.worker().runs.lock().unwrap());
    let seeds: Vec<u64> = runs.iter().map(|run| run.0.params.as_ref().unwrap().seed).collect();
    let distinct: BTreeSet<u64> = seeds.iter().copied().collect();
    assert_eq!(distinct.len(), seeds.len(), "choices that draw alike: {seeds:?}");
    distinct
}

#[tokio::test]
async fn every_choice_draws_its_own() {
    let cluster = Cluster::one().await;
    for extra in [
        json!({"prompt": ["p", "p", "p", "p"]}),
        json!({"prompt": ["p", "p"], "n": 2}),
        json!({"prompt": [[5], [5]], "n": 2}),
        json!({"n": 4}),
    ] {
        let body = completion(extra.clone());
        answered(&cluster, COMPLETIONS, &body).await;
        let first = seeds(&cluster);
        answered(&cluster, COMPLETIONS, &body).await;
        assert!(first.is_disjoint(&seeds(&cluster)), "{extra}: drawn anew each time");
        let seeded = with(body, &json!({"seed": 7}));
        answered(&cluster, COMPLETIONS, &seeded).await;
        let first = seeds(&cluster);
        assert!(first.len() == 4 && first.contains(&7), "{first:?}");
        answered(&cluster, COMPLETIONS, &seeded).await;
        assert_eq!(first, seeds(&cluster), "{extra}");
        let next = with(seeded, &json!({"seed": 8}));
        answered(&cluster, COMPLETIONS, &next).await;
        assert!(first.is_disjoint(&seeds(&cluster)), "neighbouring seeds share nothing");
    }
}

#[tokio::test]
async fn a_stop_that_names_a_special_token_stops_at_its_id() {
    let cluster = Cluster::one().await;
    let hi = language().encode_ordinary("Hi there").unwrap();
    *cluster.worker().answer.lock().unwrap() = [&hi[..], &[START], &hi[..]].concat();
    for (keep, text) in [(false, "Hi there"), (true, "Hi there<|im_start|>")] {
        let stop = json!({"stop": ["none", "<|im_start|>"], "include_stop_str_in_output": keep});
        for stream in [false, true] {
            let body = with(completion(stop.clone()), &json!({"stream": stream}));
            let reply = cluster.http().post(COMPLETIONS, &body).await;
            let chunks = if stream { reply.chunks() } else { vec![reply.json()] };
            let said: String =
                chunks.iter().map(|c| c["choices"][0]["text"].as_str().unwrap()).collect();
            assert_eq!(said, text);
            let last = chunks.last().unwrap();
            assert_eq!(last["choices"][0]["finish_reason"], "stop");
            assert!(stream || last["usage"]["completion_tokens"] == hi.len() + 1, "{last}");
        }
    }
    assert_eq!(cluster.worker().run(0).stop_ids, [480, START, END]);
}

/// Tokens that `text` takes to be complete, and those of them that begin before `cut`.
fn tokens_until(text: &str, cut: usize) -> (usize, usize) {
    let (mut said, mut shown) = (String::new(), 0);
    let mut decoder = language().decoder();
    let ids = language().encode_ordinary(TEXT).unwrap();
    for (at, &id) in ids.iter().enumerate() {
        shown += usize::from(said.chars().count() < cut);
        said += &decoder.push(id);
        if said.contains(text) {
            return (at + 1, shown);
        }
    }
    panic!("{text} is no part of the answer");
}

#[tokio::test]
async fn tokens_count_up_to_the_one_that_completes_the_stop() {
    let cluster = Cluster::one().await;
    // The worker is ahead: everything comes at once.
    cluster.worker().together.store(usize::MAX, Ordering::SeqCst);
    for (stop, text) in [("H", ""), ("lo", "Hel"), ("wör", "Hello, "), ("漢", "Hello, wörld! ")]
    {
        let (counted, shown) = tokens_until(stop, text.chars().count());
        let all = language().encode_ordinary(TEXT).unwrap().len();
        assert!(counted < all, "{stop}");
        let body = completion(json!({"stop": stop, "logprobs": 0}));
        let body = answered(&cluster, COMPLETIONS, &body).await;
        let choice = &body["choices"][0];
        assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!(text), &json!("stop")));
        assert_eq!(body["usage"]["completion_tokens"], counted, "{stop}");
        assert_eq!(choice["logprobs"]["tokens"].as_array().unwrap().len(), shown, "{stop}");

        let kept = json!({"stop": stop, "include_stop_str_in_output": true});
        let body = answered(&cluster, COMPLETIONS, &completion(kept)).await;
        assert_eq!(body["choices"][0]["text"], format!("{text}{stop}"));
        assert_eq!(body["usage"]["completion_tokens"], counted, "{stop}");
    }
    let sixty_four: Vec<String> = (0..64).map(|at| format!("stop {at}")).collect();
    answered(&cluster, COMPLETIONS, &completion(json!({"stop": sixty_four}))).await;
}

#[tokio::test]
async fn min_tokens_come_before_any_stop() {
    let cluster = Cluster::one().await;
    let body = completion(json!({"stop": "H", "min_tokens": 1}));
    let body = answered(&cluster, COMPLETIONS, &body).await;
    assert_eq!(body["choices"][0]["text"], TEXT, "the only H is in the first token");
    assert_eq!(cluster.worker().run(0).params.unwrap().min_tokens, 1);
    let many = completion(json!({"min_tokens": 11, "max_tokens": 10}));
    let reply = cluster.http().post(COMPLETIONS, &many).await;
    assert!(reply.refusal(400, Some("min_tokens")).contains("10"));
}

#[tokio::test]
async fn overflow_is_told_as_client_libraries_know_it() {
    let cluster = Cluster::one().await;
    let long = "x ".repeat(5000);
    let messages = json!([{"role": "user", "content": long}]);
    for (path, body, param) in [
        (CHAT, chat(json!({"messages": messages})), "messages"),
        (CHAT, chat(json!({"messages": messages, "max_tokens": 5})), "messages"),
        (CHAT, chat(json!({"max_tokens": 4096})), "max_tokens"),
        (CHAT, chat(json!({"max_completion_tokens": 4096})), "max_tokens"),
        (COMPLETIONS, completion(json!({"prompt": long})), "prompt"),
        (COMPLETIONS, completion(json!({"prompt": vec![1; 4096]})), "prompt"),
        (COMPLETIONS, completion(json!({"prompt": vec![1; 4000]})), "max_tokens"),
    ] {
        let reply = cluster.http().post(path, &body).await;
        let said = reply.refusal(400, Some(param));
        let known = "This model's maximum context length is 4096 tokens. However, you requested ";
        assert!(said.starts_with(known), "{said}");
        assert_eq!(reply.json()["error"]["code"], "context_length_exceeded");
    }
    assert_eq!(cluster.worker().calls(), 0);
}

#[tokio::test]
async fn bounds_are_whole_numbers_or_as_many_as_fit() {
    let cluster = Cluster::one().await;
    let (prompt, ids) = ("Once upon", language().encode("Once upon").unwrap().len());
    for (extra, bound) in [
        (json!({"max_tokens": 16.0}), 16),
        (json!({"max_tokens": -1}), 4096 - ids),
        (json!({"max_tokens": null}), 16),
        (json!({"max_tokens": null, "max_completion_tokens": 5}), 5),
        (json!({"max_tokens": 5, "max_completion_tokens": 5.0, "n_predict": 5}), 5),
        (json!({"max_tokens": null, "n_predict": -1.0}), 4096 - ids),
    ] {
        answered(&cluster, COMPLETIONS, &completion(with(json!({"prompt": prompt}), &extra))).await;
        assert_eq!(
            cluster.worker().runs.lock().unwrap().pop().unwrap().0.max_tokens as usize,
            bound
        );
    }
    answered(&cluster, CHAT, &chat(json!({"max_tokens": -1, "seed": 7}))).await;
    let run = cluster.worker().run(0);
    assert_eq!(run.max_tokens as usize, 4096 - run.prompt.len());
    answered(&cluster, CHAT, &chat(json!({"top_p": 0}))).await;
    let params = cluster.worker().run(1).params.unwrap();
    assert_eq!((params.top_p, params.top_k), (1.0, 1), "only the likeliest token is left");
}

#[tokio::test]
async fn legacy_logprobs_hold_the_sampled_token() {
    let cluster = Cluster::one().await;
    // The scripted worker reports no likeliest tokens with 0, so the sampled one is not among them.
    for asked in [0, 1] {
        let body = completion(json!({"logprobs": asked, "temperature": 1.5}));
        let body = answered(&cluster, COMPLETIONS, &body).await;
        let logprobs = &body["choices"][0]["logprobs"];
        let tokens = logprobs["tokens"].as_array().unwrap();
        assert!(!tokens.is_empty());
        for (at, token) in tokens.iter().enumerate() {
            let top = &logprobs["top_logprobs"][at];
            assert!(top[token.as_str().unwrap()].is_number(), "{token} in {top}");
        }
    }
}

#[tokio::test]
async fn usage_comes_with_every_chunk_where_that_is_asked_for() {
    let cluster = Cluster::one().await;
    for (path, body) in [(CHAT, chat(json!({}))), (COMPLETIONS, completion(json!({})))] {
        let options = json!({"include_usage": true, "continuous_usage_stats": true});
        let body = with(body, &json!({"stream": true, "stream_options": options}));
        let chunks = cluster.http().post(path, &body).await.chunks();
        let counts: Vec<u64> = chunks
            .iter()
            .map(|chunk| chunk["usage"]["completion_tokens"].as_u64().expect("usage"))
            .collect();
        assert!(counts.is_sorted() && counts[1] < counts[counts.len() - 2], "{counts:?}");
        assert_eq!(chunks.last().unwrap()["choices"], json!([]));
    }
}

/// What SDKs, agents and load generators send at their defaults.
#[tokio::test]
async fn defaults_and_hints_of_other_servers_are_accepted() {
    let cluster = Cluster::one().await;
    let messages = json!([
        {"role": "system", "content": [
            {"type": "text", "text": "Be brief", "cache_control": {"type": "ephemeral"}}]},
        {"role": "user", "content": "Hi", "id": "m1", "name": "ann", "cache_control": {}},
        {"role": "assistant", "content": "Hello", "refusal": null, "annotations": [],
            "audio": null, "function_call": null, "tool_calls": null, "id": 7},
        {"role": "user", "content": "Go on", "mood": 1},
    ]);
    let shared = json!({
        "user": "ann", "store": true, "metadata": {"a": "b"}, "reasoning_effort": "low",
        "verbosity": "low", "safety_identifier": "x", "prompt_cache_key": "k", "priority": 3,
        "service_tier": "flex", "prediction": {"type": "content", "content": "x"},
        "skip_special_tokens": true, "spaces_between_special_tokens": true, "echo": false,
        "use_beam_search": false, "length_penalty": 1.0, "bad_words": [], "ignore_eos": false,
        "min_tokens": 0, "include_stop_str_in_output": false, "stop": null, "functions": [],
        "repeat_penalty": 1, "mirostat": 0, "cache_prompt": true, "grammar": "",
        "separate_reasoning": true, "n": 1.0, "logit_bias": {}, "prompt_logprobs": null,
        "stream": true, "stream_options": {"include_usage": true, "continuous_usage_stats": true,
            "include_obfuscation": true},
    });
    let more = json!({"messages": messages, "parallel_tool_calls": true,
        "add_special_tokens": false, "max_tokens": 9, "max_completion_tokens": 9, "add_generation_prompt": true});
    let reply = cluster.http().post(CHAT, &with(chat(shared.clone()), &more)).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    let reply = cluster.http().post(COMPLETIONS, &completion(shared)).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    for (extra, param) in [
        (json!({"skip_special_tokens": false}), "skip_special_tokens"),
        (json!({"repeat_penalty": 1.1}), "repeat_penalty"),
        (json!({"guided_json": {"type": "object"}}), "guided_json"),
        (json!({"temprature": 1}), "temprature"),
    ] {
        for (path, body) in [(CHAT, chat(extra.clone())), (COMPLETIONS, completion(extra))] {
            cluster.http().post(path, &body).await.refusal(400, Some(param));
        }
    }
}

#[tokio::test]
async fn the_last_message_goes_on_where_that_is_asked_for() {
    let cluster = Cluster::one().await;
    let messages = json!([{"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "It is<|im_end|> in "}]);
    let body = chat(json!({"messages": messages, "continue_final_message": true}));
    answered(&cluster, CHAT, &body).await;
    let prompt = cluster.worker().run(0).prompt;
    let bytes: Vec<u8> = prompt.iter().flat_map(|&id| language().piece(id)).collect();
    let prompt_text = String::from_utf8(bytes).unwrap();
    assert!(prompt_text.ends_with("</think>\n\nIt is<|im_end|> in "), "{prompt_text}");
    assert_eq!(prompt.iter().filter(|&&id| id == END).count(), 1, "the user's turn alone ended");

    let with_prompt = json!({"messages": messages, "add_generation_prompt": true});
    let without = json!({"messages": messages, "add_generation_prompt": false});
    for (at, (extra, end)) in
        [(with_prompt.clone(), "assistant\n"), (without, "<|im_end|>\n")].into_iter().enumerate()
    {
        answered(&cluster, CHAT, &chat(extra)).await;
        let ids = cluster.worker().run(at + 1).prompt;
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| language().piece(id)).collect();
        assert!(String::from_utf8(bytes).unwrap().ends_with(end), "{end}");
    }
    let both = with(chat(with_prompt), &json!({"continue_final_message": true}));
    cluster.http().post(CHAT, &both).await.refusal(400, Some("continue_final_message"));
    let empty = json!([{"role": "assistant", "content": ""}]);
    let empty = chat(json!({"messages": empty, "continue_final_message": true}));
    cluster.http().post(CHAT, &empty).await.refusal(400, Some("messages"));
}
