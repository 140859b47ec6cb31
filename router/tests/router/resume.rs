//! Streams whose router is gone go on at another one, by a key and the last event's id.

use crate::{Cluster, MODEL, body, client::Reply, config, worker::Worker};
use proto::v1::{
    GenerateRequest, GenerateResponse, Sampling, Usage, generate_request,
    inference_client::InferenceClient,
};
use router::Router;
use serde_json::{Value, json};
use std::sync::{Arc, atomic::Ordering};
use tonic::transport::Channel;

const CHAT: &str = "POST /v1/chat/completions HTTP/1.1\r\n";
const COMPLETIONS: &str = "POST /v1/completions HTTP/1.1\r\n";

/// The ids of events and what they say; what has no id comes with an empty one.
fn events(reply: &Reply) -> Vec<(String, Value)> {
    let (mut id, mut events) = (String::new(), Vec::new());
    for line in reply.body.lines() {
        if let Some(given) = line.strip_prefix("id: ") {
            id = given.to_owned();
        } else if let Some(data) = line.strip_prefix("data: ").filter(|data| *data != "[DONE]") {
            events.push((std::mem::take(&mut id), serde_json::from_str(data).expect("JSON")));
        }
    }
    events
}

/// Each choice's text, tokens and finish.
fn told<'a>(events: impl Iterator<Item = &'a (String, Value)>) -> [(String, Vec<Value>, Value); 2] {
    let mut told = [const { (String::new(), Vec::new(), Value::Null) }; 2];
    for (_, event) in events {
        for choice in event["choices"].as_array().into_iter().flatten() {
            let (text, tokens, finish) = &mut told[choice["index"].as_u64().unwrap() as usize];
            *text += choice["text"].as_str().or(choice["delta"]["content"].as_str()).unwrap_or("");
            tokens.extend(choice["logprobs"]["tokens"].as_array().into_iter().flatten().cloned());
            if !choice["finish_reason"].is_null() {
                assert!(finish.is_null(), "told once");
                *finish = choice["finish_reason"].clone();
            }
        }
    }
    told
}

async fn two_routers() -> (Cluster, router::RouterHandle) {
    let cluster = Cluster::one().await;
    let stopped = cluster.shutdown.subscribe();
    let other = Router::start(config(), Arc::new(cluster.membership.clone()), stopped);
    let other = other.await.expect("a router");
    other.served().await;
    (cluster, other)
}

fn together(worker: &Worker, count: usize) {
    worker.together.store(count, Ordering::SeqCst);
}

#[tokio::test]
async fn a_stream_goes_on_at_another_router_from_any_event() {
    let (cluster, other) = two_routers().await;
    let other = crate::client::Http(other.http().expect("an address"));
    let chat = json!({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "n": 2,
        "max_tokens": 100, "stream": true, "stream_options": {"include_usage": true}});
    let mut plain = body();
    (plain["stream"], plain["n"], plain["logprobs"]) = (json!(true), json!(2), json!(1));
    plain["stream_options"] = json!({"include_usage": true});
    for (head, body) in [(CHAT, chat), (COMPLETIONS, plain)] {
        let body = body.to_string();
        let head = format!("{head}idempotency-key: story 7\r\n");
        together(cluster.worker(), 1);
        let whole = events(&cluster.http().send(&head, body.as_bytes()).await);
        let wanted = told(whole.iter());
        assert!(wanted.iter().all(|(text, _, finish)| text == crate::TEXT && finish == "stop"));
        for (at, (id, _)) in whole.iter().enumerate().filter(|(_, (id, _))| !id.is_empty()) {
            // Another router may get other pieces.
            together(cluster.worker(), 1 + at % 3);
            let head = format!("{head}last-event-id: {id}\r\n");
            let rest = other.send(&head, body.as_bytes()).await;
            assert_eq!(rest.status, 200, "{rest:?}");
            let rest = events(&rest);
            assert_eq!(told(whole[..=at].iter().chain(&rest)), wanted, "after {id}");
            assert_eq!(rest.last().unwrap().1["usage"], whole.last().unwrap().1["usage"]);
        }
    }
    let seed = |at| cluster.worker().run(at).params.unwrap().seed;
    let mut seeds: Vec<u64> = (0..4).map(seed).collect();
    seeds.sort_unstable();
    assert!(seeds[0] == seeds[1] && seeds[1] != seeds[2], "a key stands for a seed a choice");
    assert_eq!(seeds[2], seeds[3]);
}

/// Each choice's text and finish, and the last message's usage.
fn heard(messages: &[GenerateResponse]) -> ([(String, String); 2], Option<Usage>) {
    let mut heard: [(String, String); 2] = Default::default();
    for message in messages {
        let (text, finish) = &mut heard[message.choice as usize];
        *text += &message.text;
        finish.clone_from(&message.finish_reason);
    }
    (heard, messages.last().and_then(|message| message.usage))
}

#[tokio::test]
async fn a_grpc_stream_goes_on_at_another_router_from_any_message() {
    let (cluster, other) = two_routers().await;
    let address = format!("http://{}", other.grpc().expect("an address"));
    let mut other = InferenceClient::connect(address).await.unwrap();
    let mut first = cluster.grpc().await;
    let ask = async |client: &mut InferenceClient<Channel>, last: &str| {
        let sampling = Sampling { n: Some(2), max_tokens: Some(100), ..Sampling::default() };
        let prompt = Some(generate_request::Prompt::Text("Once".into()));
        let model = MODEL.to_owned();
        let sampling = Some(sampling);
        let request = GenerateRequest { model, prompt, sampling, ..GenerateRequest::default() };
        let mut request = tonic::Request::new(request);
        request.metadata_mut().insert("idempotency-key", "story 7".parse().unwrap());
        if !last.is_empty() {
            request.metadata_mut().insert("last-event-id", last.parse().unwrap());
        }
        let mut stream = client.generate(request).await.unwrap().into_inner();
        let mut messages = Vec::new();
        while let Some(message) = stream.message().await.unwrap() {
            messages.push(message);
        }
        messages
    };
    together(cluster.worker(), 1);
    let whole = ask(&mut first, "").await;
    let (wanted, usage) = heard(&whole);
    assert!(wanted.iter().all(|(text, finish)| text == crate::TEXT && finish == "stop"));
    assert!(usage.is_some() && whole.iter().all(|message| !message.cursor.is_empty()));
    for (at, message) in whole.iter().enumerate() {
        together(cluster.worker(), 1 + at % 3);
        let rest = ask(&mut other, &message.cursor).await;
        let all = [&whole[..=at], &rest].concat();
        assert_eq!(heard(&all), (wanted.clone(), usage), "after {}", message.cursor);
    }
}

#[tokio::test]
async fn what_cannot_be_gone_on_with_is_refused_by_name() {
    let cluster = Cluster::one().await;
    let refused = async |headers: &str, change: Value, param: &str| {
        let mut body = body();
        body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let head = format!("{COMPLETIONS}{headers}");
        let reply = cluster.http().send(&head, body.to_string().as_bytes()).await;
        reply.refusal(400, Some(param));
    };
    let (key, id) = ("idempotency-key: k\r\n", "last-event-id: f-1\r\n");
    refused(id, json!({}), "last-event-id").await;
    refused(&format!("{key}last-event-id: 7\r\n"), json!({}), "last-event-id").await;
    refused(&format!("{key}last-event-id: g-1\r\n"), json!({}), "idempotency-key").await;
    refused(&format!("{key}{id}"), json!({"n": 2}), "idempotency-key").await;
    refused(key, json!({"echo": true}), "idempotency-key").await;
    refused("idempotency-key: \r\n", json!({}), "idempotency-key").await;
}
