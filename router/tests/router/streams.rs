//! Clients that leave, and many at once.

use crate::{Cluster, MODEL, soon};
use futures_util::future::join_all;
use serde_json::json;
use std::time::Duration;
use tokio::io::AsyncReadExt;

const POST: &str = "POST /v1/completions HTTP/1.1\r\n";

/// One worker that talks slowly and long.
async fn talkative() -> Cluster {
    let cluster = Cluster::one().await;
    cluster.worker().say(&"endless ".repeat(300));
    *cluster.worker().pace.lock().unwrap() = Duration::from_millis(10);
    cluster
}

#[tokio::test]
async fn a_client_that_leaves_cancels_upstream() {
    let cluster = talkative().await;
    for stream in [true, false] {
        let body = json!({"model": MODEL, "prompt": "x", "max_tokens": 1000, "n": 2,
            "stream": stream});
        let mut connection = cluster.http().open(POST, body.to_string().as_bytes()).await;
        soon("both choices run", || cluster.worker().live() == 2).await;
        if stream {
            let mut some = [0; 64];
            assert!(connection.read(&mut some).await.unwrap() > 0);
        }
        drop(connection);
        soon("both are dropped", || cluster.worker().live() == 0).await;
    }
    let mut client = cluster.grpc().await;
    let prompt = proto::v1::generate_request::Prompt::Text("x".into());
    let request = proto::v1::GenerateRequest {
        prompt: Some(prompt),
        model: MODEL.into(),
        ..Default::default()
    };
    let mut stream = client.generate(request).await.unwrap().into_inner();
    stream.message().await.unwrap();
    drop(stream);
    soon("the gRPC stream is dropped", || cluster.worker().live() == 0).await;
    let http = cluster.http();
    for _ in 0..100 {
        let metrics = http.get("/metrics").await.body;
        let left = |code: &str, count: usize| {
            metrics.contains(&format!("code=\"{code}\",model=\"{MODEL}\"}} {count}\n"))
        };
        if left("499", 2) && left("CANCELLED", 1) {
            assert!(metrics.contains("lockstep_router_in_flight 0"), "{metrics}");
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("cancelled requests were not counted");
}

#[tokio::test]
async fn a_client_that_leaves_the_line_frees_its_place() {
    let cluster = Cluster::one().await;
    cluster.worker().places.store(0, std::sync::atomic::Ordering::SeqCst);
    let body = json!({"model": MODEL, "prompt": "x"}).to_string();
    let connection = cluster.http().open(POST, body.as_bytes()).await;
    soon("it waits", || cluster.worker().calls() >= 2).await;
    drop(connection);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let metrics = cluster.http().get("/metrics").await.body;
    assert!(metrics.contains("lockstep_router_queued 0"), "{metrics}");
    assert!(metrics.contains("lockstep_router_in_flight 0"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_streams_at_once_are_all_answered() {
    let cluster = Cluster::start(crate::config(), 3).await;
    for member in &cluster.members {
        *member.worker.pace.lock().unwrap() = Duration::from_millis(1);
    }
    let http = cluster.http();
    let replies = join_all((0..200).map(|at| {
        let body = json!({"model": MODEL, "prompt": format!("number {at}"), "max_tokens": 100,
            "stream": at % 2 == 0});
        let http = &http;
        async move { http.post("/v1/completions", &body).await }
    }))
    .await;
    for (at, reply) in replies.iter().enumerate() {
        let text: String = match at % 2 {
            0 => reply
                .chunks()
                .iter()
                .map(|chunk| chunk["choices"][0]["text"].as_str().unwrap().to_owned())
                .collect(),
            _ => reply.json()["choices"][0]["text"].as_str().unwrap().to_owned(),
        };
        assert_eq!(text, "Hello, wörld! 漢字 done.", "request {at}");
    }
    let calls: Vec<usize> = cluster.members.iter().map(|m| m.worker.calls()).collect();
    assert!(calls.iter().all(|&calls| calls >= 40), "spread evenly: {calls:?}");
    soon("every stream ended", || cluster.members.iter().all(|m| m.worker.live() == 0)).await;
}
