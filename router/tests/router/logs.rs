//! One line for each request, its id on every answer.

use crate::{Cluster, MODEL, PATH, soon, worker::Fault};
use proto::v1::{
    ChatRequest, GenerateRequest, ListModelsRequest, TokenizeRequest, generate_request::Prompt,
};
use serde_json::{Map, Value, json};
use std::{
    io::{self, Write},
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::io::AsyncReadExt;
use tonic::{Code, Request, Status};
use tracing::subscriber::DefaultGuard;

/// The lines of one test: its runtime has a single thread, and so has its subscriber.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Lines {
    fn collect() -> (Self, DefaultGuard) {
        let lines = Self::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .json()
            .flatten_event(true)
            .with_writer(move || writer.clone())
            .finish();
        (lines, tracing::subscriber::set_default(subscriber))
    }

    /// The lines of requests by this id.
    fn of(&self, id: &str) -> Vec<Map<String, Value>> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<Map<_, _>>(line).unwrap());
        lines.filter(|line| line.contains_key("route") && line["request_id"] == id).collect()
    }

    /// The one line of a request that is at its end.
    async fn only(&self, id: &str) -> Map<String, Value> {
        soon("the line is written", || !self.of(id).is_empty()).await;
        let mut lines = self.of(id);
        assert_eq!(lines.len(), 1, "{lines:?}");
        lines.remove(0)
    }
}

fn request<T>(id: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("x-request-id", id.parse().unwrap());
    request
}

fn generate(prompt: &str) -> GenerateRequest {
    let prompt = Some(Prompt::Text(prompt.into()));
    GenerateRequest { model: MODEL.into(), prompt, ..GenerateRequest::default() }
}

#[tokio::test]
async fn http_requests_tell_what_became_of_them() {
    let (lines, _guard) = Lines::collect();
    let cluster = Cluster::one().await;
    let http = cluster.http();
    let post = |id: &str| format!("POST {PATH} HTTP/1.1\r\nx-request-id: {id}\r\n");
    let body = |extra: Value| {
        let mut body = json!({"model": MODEL, "prompt": "Once", "max_tokens": 100});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        body.to_string()
    };
    let address = cluster.members[0].instance.borrow().address.clone();
    for stream in [false, true] {
        let id = format!("good-{stream}");
        http.send(&post(&id), body(json!({"stream": stream})).as_bytes()).await;
        let line = lines.only(&id).await;
        assert_eq!((&line["message"], &line["status"]), (&json!("request ended"), &json!("200")));
        assert_eq!((&line["route"], &line["model"]), (&json!(PATH), &json!(MODEL)));
        assert_eq!((&line["finish"], &line["workers"]), (&json!("stop"), &json!(address)));
        assert!(line["completion_tokens"].as_u64().unwrap() > 5, "{line:?}");
        assert_eq!(line["cached_tokens"], 1, "{line:?}");
        let time = |name: &str| line[name].as_u64().unwrap_or_else(|| panic!("{name}: {line:?}"));
        assert!(time("queue_milliseconds") <= time("first_token_milliseconds"));
        assert!(time("first_token_milliseconds") <= time("milliseconds"));
        assert!(line["client"].as_str().unwrap().starts_with("127.0.0.1:"), "{line:?}");
        assert!(!line.contains_key("error"), "{line:?}");
    }
    http.send(&post("bad"), body(json!({"temperature": -1})).as_bytes()).await;
    let line = lines.only("bad").await;
    assert_eq!((&line["message"], &line["status"]), (&json!("request refused"), &json!("400")));
    assert!(line["error"].as_str().unwrap().contains("temperature"), "{line:?}");

    // An answer that breaks off in the middle counts as what its error is.
    cluster.worker().fault(Fault::Status(2, Status::unavailable("gone")));
    for _ in 0..10 {
        cluster.worker().fault(Fault::Status(0, Status::unavailable("gone")));
    }
    http.send(&post("broken"), body(json!({"stream": true})).as_bytes()).await;
    let line = lines.only("broken").await;
    assert_eq!((&line["message"], &line["status"]), (&json!("request failed"), &json!("503")));
    assert!(line["completion_tokens"].as_u64().unwrap() > 0, "{line:?}");
}

#[tokio::test]
async fn a_client_that_leaves_is_no_end() {
    let (lines, _guard) = Lines::collect();
    let cluster = Cluster::one().await;
    cluster.worker().say(&"endless ".repeat(300));
    *cluster.worker().pace.lock().unwrap() = Duration::from_millis(10);
    let body = json!({"model": MODEL, "prompt": "x", "max_tokens": 1000, "stream": true});
    let head = format!("POST {PATH} HTTP/1.1\r\nx-request-id: left\r\n");
    let mut connection = cluster.http().open(&head, body.to_string().as_bytes()).await;
    connection.read_exact(&mut [0; 64]).await.unwrap();
    drop(connection);
    let line = lines.only("left").await;
    assert_eq!((&line["message"], &line["status"]), (&json!("client went away"), &json!("499")));

    let mut client = cluster.grpc().await;
    let mut stream = client.generate(request("too", generate("x"))).await.unwrap().into_inner();
    stream.message().await.unwrap();
    drop(stream);
    let line = lines.only("too").await;
    assert_eq!(
        (&line["message"], &line["status"]),
        (&json!("client went away"), &json!("CANCELLED"))
    );
}

#[tokio::test]
async fn grpc_requests_tell_the_same_and_carry_their_ids() {
    let (lines, _guard) = Lines::collect();
    let cluster = Cluster::one().await;
    let mut client = cluster.grpc().await;
    let answer = client.generate(request("good", generate("Once"))).await.unwrap();
    assert_eq!(answer.metadata().get("x-request-id").unwrap(), "good");
    let mut stream = answer.into_inner();
    while stream.message().await.unwrap().is_some() {}
    let line = lines.only("good").await;
    assert_eq!((&line["message"], &line["status"]), (&json!("request ended"), &json!("OK")));
    assert_eq!((&line["route"], &line["finish"]), (&json!("Generate"), &json!("stop")));
    assert!(line["client"].as_str().unwrap().starts_with("127.0.0.1:"), "{line:?}");

    let unknown = GenerateRequest { model: "nobody".into(), ..generate("x") };
    let status = client.generate(request("unknown", unknown)).await.unwrap_err();
    assert_eq!(status.metadata().get("x-request-id").unwrap(), "unknown");
    let line = lines.only("unknown").await;
    assert_eq!(
        (&line["message"], &line["status"]),
        (&json!("request refused"), &json!("NOT_FOUND"))
    );
    assert!(line["error"].as_str().unwrap().contains("nobody"), "{line:?}");

    let status = client.chat(request("empty", ChatRequest::default())).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert_eq!(lines.only("empty").await["route"], "Chat");

    let wire = TokenizeRequest { model: MODEL.into(), text: "Once".into(), ..Default::default() };
    let answer = client.tokenize(request("tokens", wire)).await.unwrap();
    assert_eq!(answer.metadata().get("x-request-id").unwrap(), "tokens");
    assert_eq!(lines.only("tokens").await["status"], "OK");
    let answer = client.list_models(request("list", ListModelsRequest {})).await.unwrap();
    assert_eq!(answer.metadata().get("x-request-id").unwrap(), "list");
    assert_eq!(lines.only("list").await["route"], "ListModels");
}

#[tokio::test]
async fn every_http_answer_has_an_id() {
    let cluster = Cluster::one().await;
    let http = cluster.http();
    for path in ["/health", "/metrics", "/v1/models", "/v1/models/none", "/nothing", PATH] {
        let reply = http.get(path).await;
        assert_eq!(reply.header("x-request-id").unwrap().len(), 32, "{path}: {}", reply.status);
        let mine = http.send(&format!("GET {path} HTTP/1.1\r\nx-request-id: mine\r\n"), b"").await;
        assert_eq!(mine.header("x-request-id"), Some("mine"), "{path}");
    }
    let metrics = http.get("/metrics").await.body;
    let unknown = "lockstep_router_requests_total{route=\"unknown\",code=\"404\",model=\"\"} 2";
    assert!(metrics.contains(unknown), "{metrics}");
    assert!(metrics.contains("route=\"/v1/models/{id}\",code=\"404\""), "{metrics}");
    assert!(metrics.contains("route=\"/v1/completions\",code=\"405\""), "{metrics}");
}
