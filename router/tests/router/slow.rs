//! Slow is not broken: work that progresses goes on, silence does not, and who waits is told so.

use crate::{
    Cluster, MODEL, PATH, TEXT, body, config, soon,
    worker::{Fault, Worker},
};
use cluster::State;
use proto::v1::{GenerateRequest, generate_request::Prompt};
use serde_json::{Value, json};
use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::{Code, Request, Status};

const POST: &str = "POST /v1/completions HTTP/1.1\r\n";

fn streamed(options: Value) -> Value {
    let mut body = body();
    body["stream"] = json!(true);
    body["stream_options"] = options;
    body
}

fn unavailable() -> Status {
    Status::unavailable("the group failed: rank 1 is gone")
}

/// A prefill that lasts longer than any deadline but tells its progress.
fn slow(worker: &Worker) {
    worker.prefill.store(12, Ordering::SeqCst);
    *worker.prefill_pace.lock().unwrap() = Duration::from_millis(200);
}

fn text(chunks: &[Value]) -> String {
    let texts = chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str());
    texts.collect()
}

fn grpc(include_progress: bool) -> GenerateRequest {
    let prompt = Some(Prompt::Text("Once upon a time".into()));
    GenerateRequest { model: MODEL.into(), prompt, include_progress, ..Default::default() }
}

#[tokio::test]
async fn work_that_progresses_is_never_ended_or_moved() {
    let cluster = Cluster::start(config(), 2).await;
    cluster.members.iter().for_each(|member| slow(&member.worker));
    let http = cluster.http();
    let (request, stream) = (body(), streamed(json!(null)));
    let (reply, streamed) = tokio::join!(http.post(PATH, &request), http.post(PATH, &stream));
    assert_eq!(reply.json()["choices"][0]["text"], TEXT);
    assert_eq!(text(&streamed.chunks()), TEXT);
    let calls: usize = cluster.members.iter().map(|member| member.worker.calls()).sum();
    assert_eq!(calls, 2, "nothing was started again");
    assert!(http.get("/metrics").await.body.contains("lockstep_router_resumes_total 0"));
}

#[tokio::test]
async fn progress_shows_in_metrics_and_where_it_is_asked_for() {
    let cluster = Cluster::one().await;
    slow(cluster.worker());
    let http = cluster.http();
    let with_progress = streamed(json!({"include_progress": true}));
    let (reply, ()) = tokio::join!(http.post(PATH, &with_progress), async {
        loop {
            let metrics = http.get("/metrics").await.body;
            if metrics.contains("lockstep_router_prefilling 1") {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let chunks = reply.chunks();
    assert_eq!(text(&chunks), TEXT);
    let told: Vec<&Value> = chunks.iter().filter(|chunk| chunk["progress"].is_object()).collect();
    assert!(told.iter().all(|chunk| chunk["choices"] == json!([])), "{told:?}");
    let wanted = json!({"index": 0, "running": false, "waiting_ahead": 0, "prefilled_tokens": 0,
        "prompt_tokens": 1000});
    assert_eq!(told[0]["progress"], wanted);
    let counts = told.iter().map(|chunk| chunk["progress"]["prefilled_tokens"].as_u64().unwrap());
    assert_eq!(counts.collect::<Vec<_>>(), (0..=12).collect::<Vec<_>>());
    let metrics = http.get("/metrics").await.body;
    assert!(metrics.contains("lockstep_router_prefilling 0"), "{metrics}");
    assert!(metrics.contains("lockstep_router_waiting 0"), "{metrics}");

    for asked in [true, false] {
        let mut client = cluster.grpc().await;
        let mut stream = client.generate(grpc(asked)).await.unwrap().into_inner();
        let (mut told, mut text) = (0, String::new());
        while let Some(message) = stream.message().await.unwrap() {
            told += usize::from(message.progress.is_some());
            text += &message.text;
        }
        assert_eq!((told, text.as_str()), (if asked { 13 } else { 0 }, TEXT));
    }
}

#[tokio::test]
async fn a_stream_opens_before_a_worker_is_ready_and_is_kept_alive() {
    let mut cluster = Cluster::start(config(), 0).await;
    cluster.join(State::Loading).await;
    let request = streamed(json!(null)).to_string();
    let mut connection = cluster.http().open(POST, request.as_bytes()).await;
    let mut head = Vec::new();
    while !String::from_utf8_lossy(&head).contains(": waiting\n\n") {
        let mut some = [0; 1024];
        let read = tokio::time::timeout(Duration::from_secs(10), connection.read(&mut some));
        let count = read.await.expect("a comment").unwrap();
        assert!(count > 0, "{}", String::from_utf8_lossy(&head));
        head.extend_from_slice(&some[..count]);
    }
    assert!(head.starts_with(b"HTTP/1.1 200 OK"), "{}", String::from_utf8_lossy(&head));
    assert_eq!(cluster.worker().calls(), 0);
    cluster.members[0].instance.send_modify(|instance| instance.state = State::Ready);
    connection.flush().await.unwrap();
    connection.read_to_end(&mut head).await.unwrap();
    let all = String::from_utf8_lossy(&head);
    assert!(all.contains("[DONE]") && !all.contains("error"), "{all}");
}

#[tokio::test]
async fn whoever_waits_for_a_loading_worker_waits_up_to_its_own_deadline() {
    let mut config = config();
    config.deadlines.loading = Duration::from_millis(2500);
    let mut cluster = Cluster::start(config, 0).await;
    cluster.join(State::Loading).await;
    let http = cluster.http();
    let started = Instant::now();
    let words = http.post(PATH, &body()).await.refusal(503, None);
    assert!(words.contains("1 loading"), "{words}");
    assert!(started.elapsed() >= Duration::from_millis(2500));
    // A client that will not wait so long says so.
    let request = body().to_string();
    let head = format!("{POST}x-request-timeout: 0.3\r\n");
    let words = http.send(&head, request.as_bytes()).await.refusal(504, None);
    assert!(words.contains("0.3 s"), "{words}");
    // In a stream that has begun the same is an event.
    let request = streamed(json!(null)).to_string();
    let reply = http.send(POST, request.as_bytes()).await;
    assert_eq!(reply.status, 200);
    let last: Value = serde_json::from_str(reply.events().last().unwrap()).unwrap();
    assert!(last["error"]["message"].as_str().unwrap().contains("1 loading"), "{last}");
}

#[tokio::test]
async fn a_stream_under_way_goes_on_with_a_successor_that_loads() {
    let mut cluster = Cluster::one().await;
    cluster.worker().fault(Fault::Status(3, unavailable()));
    *cluster.worker().pace.lock().unwrap() = Duration::from_millis(50);
    cluster.join(State::Loading).await;
    let http = cluster.http();
    let request = streamed(json!(null));
    let (reply, ()) = tokio::join!(http.post(PATH, &request), async {
        soon("it runs", || cluster.members[0].worker.live() == 1).await;
        cluster.members[0].instance.send_modify(|instance| instance.state = State::Draining);
        // Longer than a request waits where none loads.
        tokio::time::sleep(Duration::from_millis(2000)).await;
        cluster.members[1].instance.send_modify(|instance| instance.state = State::Ready);
    });
    assert_eq!(text(&reply.chunks()), TEXT);
    assert_eq!(cluster.members[1].worker.run(0).generated.len(), 3);
}

#[tokio::test]
async fn a_request_that_breaks_its_workers_breaks_two_at_most() {
    for (fault, tries) in [
        (Fault::Prefill(1, unavailable()), 2),
        (Fault::Prefill(7, unavailable()), 2),
        // Those that were not seen to run.
        (Fault::Status(0, unavailable()), 4),
        (Fault::Silence(0), 4),
    ] {
        let cluster = Cluster::start(config(), 6).await;
        for member in cluster.members.iter().chain(&cluster.members) {
            member.worker.fault(fault.clone());
        }
        let words = cluster.http().post(PATH, &body()).await.refusal(503, None);
        assert!(words.contains("without progress") && words.contains("worker-"), "{words}");
        let calls: usize = cluster.members.iter().map(|member| member.worker.calls()).sum();
        assert_eq!(calls, tries, "{fault:?}");
    }
    // One that stood in line cannot have broken them.
    let cluster = Cluster::start(config(), 4).await;
    for member in &cluster.members {
        member.worker.fault(Fault::InLine(unavailable()));
    }
    assert_eq!(cluster.http().post(PATH, &body()).await.json()["choices"][0]["text"], TEXT);
    // One that comes further each time goes on.
    let cluster = Cluster::one().await;
    for tokens in [2, 4, 6] {
        cluster.worker().fault(Fault::Prefill(tokens, unavailable()));
    }
    assert_eq!(cluster.http().post(PATH, &body()).await.json()["choices"][0]["text"], TEXT);
}

#[tokio::test]
async fn only_the_clients_own_limit_ends_work_that_progresses() {
    let cluster = Cluster::one().await;
    cluster.worker().prefill.store(1000, Ordering::SeqCst);
    *cluster.worker().prefill_pace.lock().unwrap() = Duration::from_millis(100);
    let http = cluster.http();
    let head = format!("{POST}x-request-timeout: 1.5\r\n");
    let reply = http.send(&head, body().to_string().as_bytes()).await;
    reply.refusal(504, None);
    assert_eq!(reply.json()["error"]["type"], "timeout");
    let request = streamed(json!(null)).to_string();
    let reply = http.send(&head, request.as_bytes()).await;
    assert_eq!(reply.status, 200);
    let last: Value = serde_json::from_str(reply.events().last().unwrap()).unwrap();
    assert_eq!(last["error"]["type"], "timeout", "{last}");
    for (limit, early) in [(2500, false), (600, true)] {
        let mut request = Request::new(grpc(false));
        request.set_timeout(Duration::from_millis(limit));
        let answer = cluster.grpc().await.generate(request).await;
        let status = match answer {
            Ok(stream) => stream.into_inner().message().await.expect_err("a limit"),
            Err(status) => status,
        };
        assert_eq!(status.code(), Code::DeadlineExceeded, "{early}: {status}");
    }
    soon("all are cancelled", || cluster.worker().live() == 0).await;
    let words = http.send(&head, body().to_string().as_bytes()).await.refusal(504, None);
    assert!(words.contains("of 1000 prompt tokens computed"), "{words}");
    for wrong in ["soon", "0", "-1", "NaN"] {
        let head = format!("{POST}x-request-timeout: {wrong}\r\n");
        let reply = http.send(&head, body().to_string().as_bytes()).await;
        reply.refusal(400, Some("x-request-timeout"));
    }
}

#[tokio::test]
async fn a_stranger_at_a_workers_address_is_passed_over() {
    for code in [
        Code::Unimplemented,
        Code::NotFound,
        Code::PermissionDenied,
        Code::Unauthenticated,
        Code::FailedPrecondition,
        Code::DeadlineExceeded,
        Code::Internal,
        Code::DataLoss,
    ] {
        let cluster = Cluster::start(config(), 2).await;
        cluster.members[1].worker.running.store(50, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(20)).await;
        let stranger = &cluster.members[0].worker;
        (0..3).for_each(|_| stranger.fault(Fault::Refuse(Status::new(code, "who are you"))));
        for _ in 0..3 {
            assert_eq!(cluster.http().post(PATH, &body()).await.status, 200, "{code:?}");
        }
        assert!(stranger.calls() >= 1, "{code:?}: it was asked");
    }
}

#[tokio::test]
async fn the_routers_own_limits_end_what_would_never_end() {
    let mut config = config();
    config.deadlines.first_token = Duration::from_millis(600);
    config.deadlines.total = Duration::from_millis(1500);
    let cluster = Cluster::start(config, 1).await;
    let http = cluster.http();
    cluster.worker().prefill.store(1000, Ordering::SeqCst);
    *cluster.worker().prefill_pace.lock().unwrap() = Duration::from_millis(100);
    let words = http.post(PATH, &body()).await.refusal(504, None);
    assert!(words.contains("0.6 s") && words.contains("prompt tokens computed"), "{words}");
    cluster.worker().prefill.store(0, Ordering::SeqCst);
    cluster.worker().say(&"endless ".repeat(300));
    *cluster.worker().pace.lock().unwrap() = Duration::from_millis(50);
    let long = json!({"model": MODEL, "prompt": "x", "max_tokens": 1000});
    let words = http.post(PATH, &long).await.refusal(504, None);
    assert!(words.contains("1.5 s") && words.contains("for more after"), "{words}");
}
