//! What a request may call a model: its name, an alias, or nothing where there is only one.

use crate::{Cluster, MODEL, config};
use cluster::State;
use proto::v1::{GenerateRequest, ListModelsRequest, TokenizeRequest, generate_request::Prompt};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

fn chat(model: Value) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": "Say hello"}]})
}

/// A router with aliases, and two workers of two models where `both`.
async fn cluster(aliases: &[(&str, &str)], both: bool) -> Cluster {
    let mut config = config();
    let named = |(alias, own): &(&str, &str)| (alias.to_string(), own.to_string());
    config.aliases = aliases.iter().map(named).collect();
    let mut cluster = Cluster::start(config, 1).await;
    if both {
        cluster.join_as(State::Ready, |instance| instance.model = "org/other".into()).await;
        for _ in 0..200 {
            let listed = cluster.http().get("/v1/models").await.json();
            if listed["data"].as_array().unwrap().iter().any(|model| model["id"] == "org/other") {
                return cluster;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        panic!("the router did not see the second model");
    }
    cluster
}

#[tokio::test]
async fn an_alias_is_listed_and_the_answer_carries_it() {
    let cluster = cluster(&[("gpt-4", MODEL), ("unserved", "org/gone")], false).await;
    let listed = cluster.http().get("/v1/models").await.json();
    let names: Vec<_> =
        listed["data"].as_array().unwrap().iter().map(|m| (&m["id"], &m["root"])).collect();
    assert_eq!(names, [(&json!(MODEL), &json!(MODEL)), (&json!("gpt-4"), &json!(MODEL))]);
    assert_eq!(cluster.http().get("/v1/models/gpt-4").await.json()["root"], MODEL);

    for name in [MODEL, "gpt-4"] {
        let reply = cluster.http().post(CHAT, &chat(json!(name))).await;
        assert_eq!((reply.status, &reply.json()["model"]), (200, &json!(name)));
    }
    let body = json!({"model": "gpt-4", "prompt": "x", "stream": true});
    for chunk in cluster.http().post("/v1/completions", &body).await.chunks() {
        assert_eq!(chunk["model"], "gpt-4");
    }
    let reply = cluster.http().post(CHAT, &chat(json!("unserved"))).await;
    let message = reply.json()["error"]["message"].as_str().unwrap().to_owned();
    assert_eq!(reply.status, 404, "{message}");
    assert!(message.contains("gpt-4") && message.contains(MODEL), "{message}");

    let mut grpc = cluster.grpc().await;
    let listed = grpc.list_models(ListModelsRequest {}).await.unwrap().into_inner().models;
    let names: Vec<_> = listed.iter().map(|m| (m.id.as_str(), m.root.as_str())).collect();
    assert_eq!(names, [(MODEL, ""), ("gpt-4", MODEL)]);
    let request = TokenizeRequest { model: "gpt-4".into(), text: "x".into(), ..Default::default() };
    assert!(!grpc.tokenize(request).await.unwrap().into_inner().ids.is_empty());
}

#[tokio::test]
async fn the_only_model_answers_where_none_is_named() {
    let cluster = cluster(&[("gpt-4", MODEL)], false).await;
    let unnamed = json!({"messages": [{"role": "user", "content": "Say hello"}]});
    for body in [unnamed, chat(json!("")), chat(Value::Null)] {
        let reply = cluster.http().post(CHAT, &body).await;
        assert_eq!((reply.status, &reply.json()["model"]), (200, &json!(MODEL)), "{body}");
    }
    let prompt = Some(Prompt::Text("Once".into()));
    let request = GenerateRequest { prompt, ..Default::default() };
    let mut stream = cluster.grpc().await.generate(request).await.unwrap().into_inner();
    assert!(stream.message().await.unwrap().is_some());
}

#[tokio::test]
async fn with_several_models_the_refusal_lists_them() {
    let cluster = cluster(&[], true).await;
    let reply = cluster.http().post(CHAT, &chat(json!(""))).await;
    let error = reply.json()["error"].clone();
    let message = error["message"].as_str().unwrap();
    assert_eq!((reply.status, &error["param"]), (400, &json!("model")), "{message}");
    assert!(message.contains(MODEL) && message.contains("org/other"), "{message}");
    let request = TokenizeRequest { text: "x".into(), ..Default::default() };
    let status = cluster.grpc().await.tokenize(request).await.unwrap_err();
    assert!(status.message().contains("org/other"), "{status}");
    let reply = cluster.http().post(CHAT, &chat(json!("org/other"))).await;
    assert_eq!((reply.status, &reply.json()["model"]), (200, &json!("org/other")));
}
