//! OpenAI's API: answers, streams, refusals.

use crate::{Cluster, MODEL, TEXT, worker::language};
use serde_json::{Value, json};

fn chat(extra: Value) -> Value {
    let mut body = json!({"model": MODEL, "messages": [{"role": "user", "content": "Say hello"}]});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

fn completion(extra: Value) -> Value {
    let mut body = json!({"model": MODEL, "prompt": "Once upon", "max_tokens": 100});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn a_chat_is_answered_whole() {
    let cluster = Cluster::one().await;
    let reply = cluster.http().post("/v1/chat/completions", &chat(json!({}))).await;
    let body = reply.json();
    assert_eq!(reply.status, 200, "{body}");
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["choices"][0]["message"]["content"], TEXT);
    assert_eq!(body["choices"][0]["message"]["role"], "assistant");
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    let run = cluster.worker().run(0);
    let sampled = cluster.worker().answer.lock().unwrap().len() + 1;
    assert_eq!(body["usage"]["prompt_tokens"], run.prompt.len());
    assert_eq!(body["usage"]["completion_tokens"], sampled);
    assert_eq!(body["usage"]["total_tokens"], run.prompt.len() + sampled);
    assert_eq!(body["usage"]["prompt_tokens_details"]["cached_tokens"], 1);
    // generation_config.json: the defaults that the client did not override.
    let params = run.params.unwrap();
    assert_eq!((params.temperature, params.top_p, params.top_k), (0.7, 0.8, 20));
    assert_eq!(run.stop_ids, [480, 482]);
    assert_eq!(run.max_tokens as usize, 4096 - run.prompt.len());
    assert_eq!(run.prompt[0], 481, "the template puts <|im_start|>");
}

#[tokio::test]
async fn a_chat_streams_with_usage_and_done() {
    let cluster = Cluster::one().await;
    let body = chat(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let reply = cluster.http().post("/v1/chat/completions", &body).await;
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("content-type"), Some("text/event-stream"));
    let chunks = reply.chunks();
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let text: String = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(text, TEXT);
    let last = &chunks[chunks.len() - 1];
    assert_eq!(last["choices"], json!([]));
    assert!(last["usage"]["completion_tokens"].as_u64().unwrap() > 3);
    assert!(chunks[..chunks.len() - 1].iter().all(|chunk| chunk["usage"].is_null()));
    assert_eq!(chunks[chunks.len() - 2]["choices"][0]["finish_reason"], "stop");
    assert!(chunks.iter().all(|chunk| chunk["id"] == chunks[0]["id"]));
}

#[tokio::test]
async fn completions_take_text_ids_and_arrays_of_either() {
    let cluster = Cluster::one().await;
    for (prompt, choices) in [
        (json!("Once"), 1),
        (json!([1, 2, 3]), 1),
        (json!(["Once", "Twice"]), 2),
        (json!([[1, 2], [3]]), 2),
    ] {
        let body = completion(json!({"prompt": prompt}));
        let reply = cluster.http().post("/v1/completions", &body).await.json();
        let got = reply["choices"].as_array().unwrap();
        assert_eq!(got.len(), choices, "{reply}");
        for (at, choice) in got.iter().enumerate() {
            assert_eq!((&choice["index"], &choice["text"]), (&json!(at), &json!(TEXT)));
        }
    }
    assert_eq!(cluster.worker().run(1).prompt, [1, 2, 3]);
}

#[tokio::test]
async fn choices_have_seeds_of_their_own_and_stops_cut_tokens() {
    let cluster = Cluster::one().await;
    let body = completion(json!({"n": 3, "seed": 7, "stop": ["d! ", "nope"], "logprobs": 1}));
    let reply = cluster.http().post("/v1/completions", &body).await.json();
    for choice in reply["choices"].as_array().unwrap() {
        assert_eq!(choice["text"], "Hello, wörl");
        assert_eq!(choice["finish_reason"], "stop");
        let tokens = choice["logprobs"]["tokens"].as_array().unwrap();
        let offsets = choice["logprobs"]["text_offset"].as_array().unwrap();
        assert_eq!(tokens.len(), offsets.len());
        assert!(offsets.iter().all(|offset| offset.as_u64().unwrap() < 11), "{offsets:?}");
    }
    assert_eq!(reply["choices"].as_array().unwrap().len(), 3);
    let runs = cluster.worker().runs.lock().unwrap();
    let mut seeds: Vec<u64> = runs.iter().map(|r| r.0.params.as_ref().unwrap().seed).collect();
    seeds.sort_unstable();
    seeds.dedup();
    assert!(seeds.len() == 3 && seeds.contains(&7), "{seeds:?}");
}

#[tokio::test]
async fn a_stop_string_ends_the_workers_stream() {
    let cluster = Cluster::one().await;
    *cluster.worker().pace.lock().unwrap() = std::time::Duration::from_millis(20);
    let body = completion(json!({"stop": "lo", "stream": true}));
    let reply = cluster.http().post("/v1/completions", &body).await;
    let text: String =
        reply.chunks().iter().map(|c| c["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(text, "Hel");
    crate::soon("the stream is dropped", || cluster.worker().live() == 0).await;
}

#[tokio::test]
async fn logprobs_of_a_chat_carry_bytes() {
    let cluster = Cluster::one().await;
    let body = chat(json!({"logprobs": true, "top_logprobs": 2}));
    let reply = cluster.http().post("/v1/chat/completions", &body).await.json();
    let content = reply["choices"][0]["logprobs"]["content"].as_array().unwrap();
    let bytes: Vec<u8> = content
        .iter()
        .flat_map(|entry| entry["bytes"].as_array().unwrap())
        .map(|byte| byte.as_u64().unwrap() as u8)
        .collect();
    assert_eq!(String::from_utf8(bytes).unwrap(), TEXT);
    assert_eq!(content[1]["logprob"], -1.5);
    assert_eq!(content[1]["top_logprobs"].as_array().unwrap().len(), 2);
    assert!(reply["choices"][0]["message"]["content"].is_string());
}

#[tokio::test]
async fn echo_gives_the_prompt_back_scored_or_not() {
    let cluster = Cluster::one().await;
    let http = cluster.http();
    let plain = completion(json!({"echo": true, "max_tokens": 2}));
    let reply = http.post("/v1/completions", &plain).await.json();
    let text = reply["choices"][0]["text"].as_str().unwrap().to_owned();
    assert!(text.starts_with("Once uponHe"), "{text}");
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
    assert!(!cluster.worker().run(0).score_prompt);

    let ids = language().encode("Once upon").unwrap();
    let scored = completion(json!({"echo": true, "max_tokens": 0, "logprobs": 1}));
    let reply = http.post("/v1/completions", &scored).await.json();
    let choice = &reply["choices"][0];
    assert_eq!(choice["text"], "Once upon");
    let logprobs = choice["logprobs"]["token_logprobs"].as_array().unwrap();
    assert_eq!(logprobs.len(), ids.len());
    assert!(logprobs[0].is_null() && choice["logprobs"]["top_logprobs"][0].is_null());
    assert_eq!(logprobs[1], -1.5);
    assert_eq!(choice["logprobs"]["text_offset"][0], 0);

    let calls = cluster.worker().calls();
    let alone = completion(json!({"echo": true, "max_tokens": 0, "prompt": ids}));
    let reply = http.post("/v1/completions", &alone).await.json();
    assert_eq!(reply["choices"][0]["text"], "Once upon");
    assert_eq!(cluster.worker().calls(), calls, "nothing to ask a worker for");
}

#[tokio::test]
async fn tools_reach_the_template_and_special_text_stays_text() {
    let cluster = Cluster::one().await;
    let tool = json!({"type": "function", "function": {"name": "weather", "parameters": {}}});
    let call = json!({"id": "1", "type": "function",
        "function": {"name": "weather", "arguments": "{\"city\": \"Bern\"}"}});
    let body = chat(json!({"tools": [tool], "messages": [
        {"role": "developer", "content": [{"type": "text", "text": "Be "},
            {"type": "text", "text": "brief"}]},
        {"role": "user", "content": "<|im_end|>?", "name": "ann"},
        {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
    ]}));
    let reply = cluster.http().post("/v1/chat/completions", &body).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    let run = cluster.worker().run(0);
    let bytes: Vec<u8> = run.prompt.iter().flat_map(|&id| language().piece(id)).collect();
    let prompt = String::from_utf8(bytes).unwrap();
    for part in ["weather", "Bern", "sunny", "Be brief", "<|im_end|>?"] {
        assert!(prompt.contains(part), "{part} in {prompt}");
    }
    let ends = run.prompt.iter().filter(|&&id| id == 482).count();
    assert_eq!(ends, prompt.matches("<|im_end|>").count() - 1, "the user's stays text");
    let none = chat(json!({"tools": [tool], "tool_choice": "none"}));
    cluster.http().post("/v1/chat/completions", &none).await;
    assert!(cluster.worker().run(1).prompt.len() < 60, "tools are left out");
}

#[tokio::test]
async fn refusals_name_the_parameter() {
    let cluster = Cluster::one().await;
    let http = cluster.http();
    let message = |message: Value| json!({"messages": [message]});
    let chats = [
        (json!({"temperature": -1}), "temperature"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"top_p": -0.1}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"n": 0}), "n"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": 1.5}), "max_tokens"),
        (json!({"max_tokens": 1, "max_completion_tokens": 2}), "max_completion_tokens"),
        (json!({"max_tokens": 4096}), "max_tokens"),
        (json!({"stop": [1]}), "stop"),
        (json!({"seed": 0.5}), "seed"),
        (json!({"stream": "yes"}), "stream"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"stream": true, "stream_options": {"x": 1}}), "stream_options.x"),
        (json!({"logit_bias": {"a": 1}}), "logit_bias"),
        (json!({"logit_bias": {"512": 1}}), "logit_bias"),
        (json!({"stop_token_ids": [512]}), "stop_token_ids"),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"temprature": 1}), "temprature"),
        (json!({"echo": true}), "echo"),
        (json!({"audio": {"voice": "x"}}), "audio"),
        (json!({"functions": [{}]}), "functions"),
        (json!({"response_format": {"type": "json_object"}}), "response_format"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (
            json!({"parallel_tool_calls": false,
                "tools": [{"type": "function", "function": {"name": "f"}}]}),
            "parallel_tool_calls",
        ),
        (json!({"tools": [{"type": "magic"}]}), "tools[0]"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": "hi"}), "messages"),
        (message(json!({"role": "robot", "content": "x"})), "messages[0].role"),
        (message(json!({"content": "x"})), "messages[0].role"),
        (message(json!({"role": "user"})), "messages[0].content"),
        (
            message(json!({"role": "user", "content": [{"type": "image_url"}]})),
            "messages[0].content[0].type",
        ),
    ];
    for (extra, param) in chats {
        let reply = http.post("/v1/chat/completions", &chat(extra)).await;
        let words = reply.refusal(400, Some(param));
        assert!(words.contains(param.split('.').next().unwrap()), "{words}");
    }
    for (extra, param) in [
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": [512]}), "prompt"),
        (json!({"prompt": [-1]}), "prompt"),
        (json!({"prompt": [[1], "x", 3]}), "prompt"),
        (json!({"logprobs": 21}), "logprobs"),
        (json!({"best_of": 2}), "best_of"),
        (json!({"suffix": "x"}), "suffix"),
        (json!({"messages": []}), "messages"),
    ] {
        let reply = http.post("/v1/completions", &completion(extra)).await;
        reply.refusal(400, Some(param));
    }
    assert_eq!(cluster.worker().calls(), 0, "no worker was bothered");
}

#[tokio::test]
async fn harmless_parameters_are_accepted() {
    let cluster = Cluster::one().await;
    let body = chat(json!({
        "user": "ann", "metadata": {"a": "b"}, "store": false, "service_tier": "auto",
        "tool_choice": "auto", "parallel_tool_calls": true, "tools": [], "n": null,
        "response_format": {"type": "text"}, "logprobs": false, "top_logprobs": 0,
        "modalities": ["text"], "seed": -5, "top_k": -1, "frequency_penalty": 0,
        "max_completion_tokens": 3, "chat_template_kwargs": {"enable_thinking": false},
    }));
    let reply = cluster.http().post("/v1/chat/completions", &body).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert_eq!(reply.json()["choices"][0]["finish_reason"], "length");
    let params = cluster.worker().run(0).params.unwrap();
    assert_eq!((params.seed, params.top_k), ((-5i64).cast_unsigned(), 0));
}

#[tokio::test]
async fn broken_bodies_routes_and_models_are_refused() {
    let cluster = Cluster::one().await;
    let http = cluster.http();
    let post = "POST /v1/completions HTTP/1.1\r\n";
    let words = http.send(post, b"{\"model\": ").await.refusal(400, None);
    assert!(words.contains("JSON"), "{words}");
    http.send(post, b"[]").await.refusal(400, None);
    http.send(post, b"{\"temperature\": NaN}").await.refusal(400, None);
    http.send(post, b"\xff\xfe").await.refusal(400, None);
    let nested = [vec![b'['; 100_000], b"1".to_vec()].concat();
    assert!([400, 413].contains(&http.send(post, &nested).await.status));
    let words = http.send(post, &vec![b' '; 100_000]).await.refusal(413, None);
    assert!(words.contains("65536"), "{words}");
    let unknown = completion(json!({"model": "nobody"}));
    let reply = http.post("/v1/completions", &unknown).await;
    assert!(reply.refusal(404, Some("model")).contains(MODEL));
    assert_eq!(reply.json()["error"]["code"], "model_not_found");
    http.get("/v1/nothing").await.refusal(404, None);
    http.get("/v1/completions").await.refusal(405, None);
}

#[tokio::test]
async fn models_health_and_metrics_are_told() {
    let cluster = Cluster::one().await;
    let http = cluster.http();
    let models = http.get("/v1/models").await.json();
    assert_eq!(models["object"], "list");
    assert_eq!(models["data"][0]["id"], MODEL);
    assert_eq!(http.get("/v1/models/org/tiny").await.json()["id"], MODEL);
    assert_eq!(http.get("/v1/models/org%2Ftiny").await.json()["object"], "model");
    http.get("/v1/models/other").await.refusal(404, Some("model"));
    assert_eq!(http.get("/health").await.status, 200);
    http.post("/v1/completions", &completion(json!({}))).await;
    http.post("/v1/completions", &completion(json!({"n": 0}))).await;
    let metrics = http.get("/metrics").await;
    assert_eq!(metrics.header("content-type").unwrap(), "text/plain; version=0.0.4; charset=utf-8");
    for line in [
        "lockstep_router_requests_total\
         {route=\"/v1/completions\",code=\"200\",model=\"org/tiny\"} 1",
        "lockstep_router_requests_total\
         {route=\"/v1/completions\",code=\"400\",model=\"org/tiny\"} 1",
        "lockstep_router_first_token_seconds_count{model=\"org/tiny\"} 1",
        "lockstep_router_in_flight 0",
        "lockstep_router_tokens_total{model=\"org/tiny\",kind=\"cached\"} 1",
    ] {
        assert!(metrics.body.contains(line), "{line} in {}", metrics.body);
    }
}

#[tokio::test]
async fn ids_and_trace_context_go_from_end_to_end() {
    let cluster = Cluster::one().await;
    let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nx-request-id: my-id\r\ntraceparent: {parent}\r\n"
    );
    let body = completion(json!({})).to_string();
    let reply = cluster.http().send(&head, body.as_bytes()).await;
    assert_eq!(reply.header("x-request-id"), Some("my-id"));
    assert_eq!(reply.json()["id"], "cmpl-my-id");
    let runs = cluster.worker().runs.lock().unwrap();
    let (request, metadata) = &runs[0];
    assert_eq!(request.request_id, "my-id");
    assert_eq!(metadata.get("x-request-id").unwrap(), "my-id");
    assert_eq!(metadata.get("traceparent").unwrap(), parent);
}
