//! Workers that break, stall, fill up or never come.

use crate::{
    Cluster, MODEL, PATH, TEXT, body, config, soon,
    worker::{Fault, language},
};
use cluster::State;
use serde_json::{Value, json};
use std::{sync::atomic::Ordering, time::Duration};
use tonic::{Code, Status};

fn unavailable() -> Status {
    Status::unavailable("the group failed: rank 1 is gone")
}

#[tokio::test]
async fn a_broken_stream_goes_on_elsewhere_with_the_same_text() {
    for fault in [
        Fault::Status(3, unavailable()),
        Fault::Status(0, unavailable()),
        Fault::End(5),
        Fault::Silence(2),
        Fault::Silence(0),
        Fault::Refuse(unavailable()),
        Fault::Status(4, Status::resource_exhausted("preempted for good")),
        Fault::Status(6, Status::unknown("transport error")),
    ] {
        let cluster = Cluster::start(config(), 2).await;
        // Either may be asked first; a second break without a token between would be the end.
        let barren = !matches!(fault, Fault::Status(3.., _) | Fault::End(_) | Fault::Silence(2));
        for member in &cluster.members[..if barren { 1 } else { 2 }] {
            member.worker.fault(fault.clone());
        }
        let other = &cluster.members[1];
        if barren {
            other.worker.running.store(50, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let mut request = body();
        request["stream"] = json!(true);
        request["stop"] = json!("none such");
        let reply = cluster.http().post(PATH, &request).await;
        let chunks = reply.chunks();
        let text: String =
            chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
        assert_eq!(text, TEXT, "{fault:?}");
        let runs: Vec<_> = cluster
            .members
            .iter()
            .flat_map(|member| member.worker.runs.lock().unwrap().clone())
            .map(|(run, _)| run)
            .collect();
        assert!(runs.len() >= 2, "{fault:?}");
        assert!(
            runs.iter().all(|run| run.params == runs[0].params && run.prompt == runs[0].prompt)
        );
    }
}

#[tokio::test]
async fn a_lone_worker_that_comes_back_goes_on() {
    let cluster = Cluster::one().await;
    cluster.worker().fault(Fault::Status(4, unavailable()));
    let reply = cluster.http().post(PATH, &body()).await.json();
    assert_eq!(reply["choices"][0]["text"], TEXT);
    let sent: Vec<u32> = cluster.worker().answer.lock().unwrap()[..4].to_vec();
    assert_eq!(cluster.worker().run(1).generated, sent);
    assert_eq!(cluster.worker().run(1).max_tokens, 100);
    let metrics = cluster.http().get("/metrics").await.body;
    assert!(metrics.contains("lockstep_router_resumes_total 1"), "{metrics}");
}

#[tokio::test]
async fn a_lost_finish_is_known_from_the_tokens() {
    let cluster = Cluster::one().await;
    let all = cluster.worker().answer.lock().unwrap().len();
    // Every token came, the stop id or the last allowed one included; then the stream broke.
    let mut short = body();
    short["max_tokens"] = json!(4);
    for (request, finish) in [(body(), "stop"), (short, "length")] {
        let count = if finish == "stop" { all + 1 } else { 4 };
        *cluster.worker().pace.lock().unwrap() = Duration::from_millis(1);
        cluster.worker().fault(Fault::Unfinished(count));
        let calls = cluster.worker().calls();
        let reply = cluster.http().post(PATH, &request).await.json();
        assert_eq!(reply["choices"][0]["finish_reason"], finish, "{reply}");
        assert_eq!(cluster.worker().calls(), calls + 1, "nothing was left to ask for");
        if finish == "stop" {
            assert_eq!(reply["choices"][0]["text"], TEXT);
        }
    }
}

#[tokio::test]
async fn scores_of_the_prompt_come_once_whatever_breaks() {
    let cluster = Cluster::one().await;
    for count in [1, 2, 5] {
        cluster.worker().fault(Fault::Status(count, unavailable()));
    }
    let mut request = body();
    request["echo"] = json!(true);
    request["logprobs"] = json!(0);
    let reply = cluster.http().post(PATH, &request).await.json();
    assert_eq!(reply["choices"][0]["text"], format!("Once upon a time{TEXT}"), "{reply}");
    let tokens = reply["choices"][0]["logprobs"]["tokens"].as_array().unwrap().len();
    let prompt = language().encode("Once upon a time").unwrap().len();
    assert_eq!(tokens, prompt + cluster.worker().answer.lock().unwrap().len());
}

#[tokio::test]
async fn breaking_without_end_is_given_up() {
    let mut config = config();
    config.limits.resumes_max = 3;
    let cluster = Cluster::start(config, 1).await;
    for _ in 0..10 {
        cluster.worker().fault(Fault::Status(1, unavailable()));
    }
    let words = cluster.http().post(PATH, &body()).await.refusal(503, None);
    assert!(words.contains("rank 1 is gone") && words.contains("4 times"), "{words}");
    assert_eq!(cluster.worker().calls(), 4);
}

#[tokio::test]
async fn an_error_in_mid_stream_is_an_event_and_the_end() {
    let cluster = Cluster::one().await;
    cluster.worker().fault(Fault::Status(3, Status::internal("NaN logits")));
    let mut request = body();
    request["stream"] = json!(true);
    let reply = cluster.http().post(PATH, &request).await;
    assert_eq!(reply.status, 200);
    let last: Value = serde_json::from_str(reply.events().last().unwrap()).unwrap();
    assert!(last["error"]["message"].as_str().unwrap().contains("NaN logits"), "{last}");
    cluster.worker().fault(Fault::Status(0, Status::internal("NaN logits")));
    cluster.http().post(PATH, &body()).await.refusal(500, None);
    cluster.worker().fault(Fault::Flood);
    cluster.http().post(PATH, &body()).await.refusal(500, None);
}

#[tokio::test]
async fn what_the_client_got_wrong_is_not_held_against_a_worker() {
    let cluster = Cluster::one().await;
    for _ in 0..3 {
        cluster.worker().fault(Fault::Refuse(Status::invalid_argument("it can never run here")));
        let words = cluster.http().post(PATH, &body()).await.refusal(400, None);
        assert!(words.contains("never run"), "{words}");
    }
    let started = std::time::Instant::now();
    assert_eq!(cluster.http().post(PATH, &body()).await.status, 200);
    assert!(started.elapsed() < Duration::from_millis(200), "no rest was imposed");
}

#[tokio::test]
async fn a_full_worker_leads_to_another_one() {
    let cluster = Cluster::start(config(), 2).await;
    cluster.members[0].worker.places.store(0, Ordering::SeqCst);
    for _ in 0..4 {
        assert_eq!(cluster.http().post(PATH, &body()).await.status, 200);
    }
    assert!(cluster.members[1].worker.calls() >= 4);
}

#[tokio::test]
async fn full_workers_are_waited_for_and_then_refused() {
    let cluster = Cluster::one().await;
    cluster.worker().places.store(1, Ordering::SeqCst);
    *cluster.worker().pace.lock().unwrap() = Duration::from_millis(5);
    let one = body();
    let http = cluster.http();
    let replies = futures_util::future::join_all((0..4).map(|_| http.post(PATH, &one))).await;
    assert!(replies.iter().all(|reply| reply.status == 200), "all got their turn");
    cluster.worker().places.store(0, Ordering::SeqCst);
    let reply = http.post(PATH, &one).await;
    reply.refusal(429, None);
    assert!(reply.header("retry-after").unwrap().parse::<u64>().unwrap() >= 1);
    assert!(http.get("/metrics").await.body.contains("lockstep_router_queued 0"));
}

#[tokio::test]
async fn the_line_and_the_house_are_bounded() {
    let mut config = config();
    config.limits.queue_max = 1;
    config.limits.in_flight_max = 3;
    let cluster = Cluster::start(config, 1).await;
    cluster.worker().places.store(0, Ordering::SeqCst);
    let http = cluster.http();
    let one = body();
    let replies = futures_util::future::join_all((0..6).map(|_| http.post(PATH, &one))).await;
    assert!(replies.iter().all(|reply| reply.status == 429));
    let words: Vec<String> = replies.iter().map(|reply| reply.refusal(429, None)).collect();
    assert!(words.iter().any(|words| words.contains("3 choices at most")), "{words:?}");
    assert!(words.iter().any(|words| words.contains("1 choices wait")), "{words:?}");
    let mut many = body();
    many["n"] = json!(4);
    http.post(PATH, &many).await.refusal(400, Some("n"));
    cluster.worker().places.store(9, Ordering::SeqCst);
    assert_eq!(http.post(PATH, &one).await.status, 200, "every permit came back");
}

#[tokio::test]
async fn no_worker_is_waited_for_and_then_told() {
    let mut cluster = Cluster::start(config(), 0).await;
    let words = cluster.http().post(PATH, &body()).await.refusal(503, None);
    assert!(words.contains("no worker"), "{words}");
    let http = cluster.http();
    let request = body();
    let (reply, ()) = tokio::join!(http.post(PATH, &request), async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        cluster.join(State::Ready).await;
    });
    assert_eq!(reply.status, 200, "one came in time");
    let members = std::mem::take(&mut cluster.members);
    members[0].instance.send_modify(|instance| instance.state = State::Draining);
    cluster.settle(0).await;
    let reply = http.post(PATH, &body()).await;
    assert!(reply.refusal(503, None).contains("1 draining"));
    assert!(reply.header("retry-after").is_some());
    assert_eq!(http.get("/health").await.status, 503);
    drop(members);
    tokio::time::sleep(Duration::from_millis(20)).await;
    http.post(PATH, &body()).await.refusal(503, None);
}

#[tokio::test]
async fn an_unreachable_worker_is_passed_over() {
    let mut cluster = Cluster::start(config(), 2).await;
    let gone = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", gone.local_addr().unwrap());
    drop(gone);
    cluster.members[0].instance.send_modify(|instance| instance.address = address);
    tokio::time::sleep(Duration::from_millis(20)).await;
    for _ in 0..3 {
        assert_eq!(cluster.http().post(PATH, &body()).await.status, 200);
    }
    cluster.members.remove(1);
    tokio::time::sleep(Duration::from_millis(20)).await;
    let words = cluster.http().post(PATH, &body()).await.refusal(503, None);
    assert!(words.contains("failing"), "{words}");
}

#[tokio::test]
async fn taken_ports_are_an_error() {
    let cluster = Cluster::start(config(), 0).await;
    let mut config = config();
    config.http = cluster.router.http();
    let receiver = cluster.shutdown.subscribe();
    let started =
        router::Router::start(config, std::sync::Arc::new(cluster.membership.clone()), receiver);
    let error = started.await.err().expect("an error").to_string();
    assert!(error.contains("cannot listen on 127.0.0.1"), "{error}");
}

#[tokio::test]
async fn a_drain_lets_streams_finish_and_then_ends_them() {
    let cluster = Cluster::one().await;
    *cluster.worker().pace.lock().unwrap() = Duration::from_millis(15);
    let http = cluster.http();
    let request = body();
    let (reply, ()) = tokio::join!(http.post(PATH, &request), async {
        soon("it runs", || cluster.worker().live() == 1).await;
        cluster.shutdown.send_replace(true);
    });
    assert_eq!(reply.json()["choices"][0]["text"], TEXT);
    let limit = Duration::from_secs(3);
    tokio::time::timeout(limit, cluster.router.join()).await.expect("the end");
    assert!(tokio::net::TcpStream::connect(http.0).await.is_err(), "nothing listens");

    let cluster = Cluster::one().await;
    cluster.worker().say(&"endless ".repeat(400));
    *cluster.worker().pace.lock().unwrap() = Duration::from_millis(20);
    let http = cluster.http();
    let mut client = cluster.grpc().await;
    let prompt = proto::v1::generate_request::Prompt::Text("x".into());
    let request = proto::v1::GenerateRequest {
        model: MODEL.into(),
        prompt: Some(prompt),
        ..Default::default()
    };
    let mut stream = client.generate(request).await.unwrap().into_inner();
    let long = json!({"model": MODEL, "prompt": "x", "max_tokens": 1000});
    let (reply, status, ()) = tokio::join!(
        http.post(PATH, &long),
        async {
            loop {
                match stream.message().await {
                    Ok(chunk) => assert!(chunk.is_some(), "no silent end"),
                    Err(status) => return status,
                }
            }
        },
        async {
            soon("both run", || cluster.worker().live() == 2).await;
            cluster.shutdown.send_replace(true);
        }
    );
    assert!(reply.refusal(503, None).contains("the router stops"));
    assert_eq!(status.code(), Code::Unavailable);
    tokio::time::timeout(limit, cluster.router.join()).await.expect("the end");
}
