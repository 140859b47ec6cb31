//! Who is at a worker's address, whether it is still there, and what it serves.

use crate::{
    Cluster, PATH, TEXT, body, config, soon,
    worker::{Fault, Worker},
};
use cluster::State;
use futures_util::future::join_all;
use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};
use tokio::net::TcpListener;
use tonic::Status;

/// What may be found at an address instead of a worker.
async fn strangers() -> Vec<(&'static str, String)> {
    let bind = async || TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = |listener: &TcpListener| format!("http://{}", listener.local_addr().unwrap());
    let mut strangers = Vec::new();

    let listener = bind().await;
    strangers.push(("another gRPC server", address(&listener)));
    let (_, health) = tonic_health::server::health_reporter();
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    let server = tonic::transport::Server::builder().add_service(health);
    tokio::spawn(server.serve_with_incoming(incoming));

    let listener = bind().await;
    strangers.push(("a web server", address(&listener)));
    tokio::spawn(async move { axum::serve(listener, axum::Router::new()).await });

    let listener = bind().await;
    strangers.push(("one that says nothing", address(&listener)));
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((connection, _)) = listener.accept().await {
            held.push(connection);
        }
    });

    let (other, of_other) = Worker::start().await;
    let named = Cluster::one().await.members[0].instance.borrow().clone();
    *other.instance.lock().unwrap() =
        Some(cluster::Instance { id: "somebody-else".into(), ..named });
    strangers.push(("another worker", of_other));

    let gone = bind().await;
    strangers.push(("nobody", address(&gone)));
    strangers
}

#[tokio::test]
async fn what_is_not_the_worker_gets_no_request_and_holds_up_none() {
    for (what, address) in strangers().await {
        let mut cluster = Cluster::one().await;
        cluster.join_as(State::Ready, |instance| instance.address = address).await;
        let http = cluster.http();
        let started = Instant::now();
        let request = body();
        let replies = join_all((0..8).map(|_| http.post(PATH, &request))).await;
        assert!(replies.iter().all(|reply| reply.status == 200), "{what}");
        assert!(started.elapsed() < Duration::from_millis(450), "{what}: {:?}", started.elapsed());
        assert_eq!(cluster.members[0].worker.calls(), 8, "{what}");
        let metrics = http.get("/metrics").await.body;
        assert!(metrics.contains("lockstep_router_retries_total 0"), "{what}: {metrics}");
    }
}

#[tokio::test]
async fn the_reason_why_a_worker_is_left_alone_is_told() {
    for (what, address) in strangers().await {
        let mut cluster = Cluster::start(config(), 0).await;
        cluster.join_as(State::Ready, |instance| instance.address = address).await;
        let words = cluster.http().post(PATH, &body()).await.refusal(503, None);
        let reason = match what {
            "another gRPC server" | "a web server" => "something other than a worker",
            "one that says nothing" => "no answer within",
            "another worker" => "another worker answers at its address: somebody-else",
            _ => "refused",
        };
        assert!(words.contains(reason) && words.contains("worker-0"), "{what}: {words}");
    }
    let mut cluster = Cluster::start(config(), 0).await;
    cluster.join_as(State::Ready, |instance| instance.protocol += 1).await;
    let words = cluster.http().post(PATH, &body()).await.refusal(503, None);
    assert!(words.contains("run the same version"), "{words}");
}

#[tokio::test]
async fn models_of_one_name_are_never_mixed() {
    let version = |print: &'static str, started| {
        move |instance: &mut cluster::Instance| {
            instance.fingerprint = print.into();
            instance.started = started;
        }
    };
    let mut cluster = Cluster::start(config(), 0).await;
    cluster.join_as(State::Ready, version("old", 1)).await;
    cluster.settle(1).await;
    assert_eq!(cluster.http().post(PATH, &body()).await.status, 200);
    cluster.join_as(State::Ready, version("new", 2)).await;
    cluster.members[1].worker.say("New words.");
    let http = cluster.http();
    soon("the newer is met", || cluster.members[1].worker.watchers.load(Ordering::SeqCst) == 1)
        .await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    // As many of each: the newer.
    for _ in 0..4 {
        assert_eq!(http.post(PATH, &body()).await.json()["choices"][0]["text"], "New words.");
    }
    // One that has begun with the newer stays with it, though the other could take it at once.
    cluster.members[1].worker.fault(Fault::Status(2, Status::unavailable("the group failed")));
    assert_eq!(http.post(PATH, &body()).await.json()["choices"][0]["text"], "New words.");
    assert_eq!(cluster.members[1].worker.calls(), 6);
    assert_eq!(cluster.members[0].worker.calls(), 1);
    // More of the older: back to those.
    cluster.join_as(State::Ready, version("old", 3)).await;
    cluster.settle(2).await;
    assert_eq!(http.post(PATH, &body()).await.json()["choices"][0]["text"], TEXT);
    // Nobody else is left.
    cluster.members[0].instance.send_modify(|instance| instance.state = State::Draining);
    cluster.members[2].instance.send_modify(|instance| instance.state = State::Draining);
    cluster.settle(1).await;
    assert_eq!(http.post(PATH, &body()).await.json()["choices"][0]["text"], "New words.");
}

#[tokio::test]
async fn a_worker_that_stops_speaking_loses_its_streams_to_another() {
    let mut config = config();
    config.deadlines.silence = Duration::from_secs(60);
    let cluster = Cluster::start(config, 2).await;
    let [one, two] = [0, 1].map(|at| &cluster.members[at].worker);
    two.running.store(50, Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(50)).await;
    // It answers three tokens and then nothing, as a process that was stopped.
    one.fault(Fault::Silence(3));
    let http = cluster.http();
    let request = body();
    let started = Instant::now();
    let (reply, ()) = tokio::join!(http.post(PATH, &request), async {
        soon("it runs", || one.live() == 1).await;
        one.stopped.store(true, Ordering::SeqCst);
    });
    assert_eq!(reply.json()["choices"][0]["text"], TEXT);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert_eq!(two.run(0).generated.len(), 3);
    for _ in 0..4 {
        assert_eq!(http.post(PATH, &request).await.status, 200);
    }
    assert_eq!(one.calls(), 1, "nothing new went there");
    one.stopped.store(false, Ordering::SeqCst);
    let back = || cluster.members[0].worker.calls() > 1;
    for _ in 0..200 {
        if back() {
            return;
        }
        http.post(PATH, &request).await;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it is back and gets nothing");
}

#[tokio::test]
async fn a_stream_waits_for_the_only_worker_that_it_has() {
    let cluster = Cluster::one().await;
    *cluster.worker().pace.lock().unwrap() = Duration::from_millis(150);
    let http = cluster.http();
    let request = body();
    let (reply, ()) = tokio::join!(http.post(PATH, &request), async {
        soon("it runs", || cluster.worker().live() == 1).await;
        cluster.worker().stopped.store(true, Ordering::SeqCst);
    });
    assert_eq!(reply.json()["choices"][0]["text"], TEXT);
    assert_eq!(cluster.worker().calls(), 1, "it was held up, not moved");
}

#[tokio::test]
async fn a_burst_beyond_all_places_is_refused_at_once() {
    let cluster = Cluster::one().await;
    cluster.worker().told_places.store(4, Ordering::SeqCst);
    cluster.worker().places.store(4, Ordering::SeqCst);
    *cluster.worker().pace.lock().unwrap() = Duration::from_millis(10);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let http = cluster.http();
    let request = body();
    let ask = async || {
        let started = Instant::now();
        let reply = http.post(PATH, &request).await;
        (reply, started.elapsed())
    };
    let replies = join_all((0..60).map(|_| ask())).await;
    let (served, refused): (Vec<_>, Vec<_>) =
        replies.iter().partition(|(reply, _)| reply.status == 200);
    // Four run, eight wait, and a few are there while others are asked.
    assert!((12..=20).contains(&served.len()), "{} served", served.len());
    let first = served.iter().map(|(_, took)| *took).min().unwrap();
    for (reply, took) in &refused {
        let words = reply.refusal(429, None);
        assert!(words.contains("4 places"), "{words}");
        assert!(reply.header("retry-after").is_some());
        assert!(*took < first, "told after {took:?}, the first was served after {first:?}");
    }
}

#[tokio::test]
async fn a_router_that_ends_is_there_until_balancers_have_noticed() {
    let mut config = config();
    config.deadlines.grace = Duration::from_millis(700);
    let cluster = Cluster::start(config, 1).await;
    let http = cluster.http();
    assert_eq!(http.get("/health").await.status, 200);
    cluster.shutdown.send_replace(true);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(http.get("/health").await.status, 503);
    assert_eq!(http.get("/status").await.json()["draining"], true);
    assert_eq!(http.post(PATH, &body()).await.status, 200, "still taken");
    tokio::time::timeout(Duration::from_secs(3), cluster.router.join()).await.expect("the end");
    assert!(tokio::net::TcpStream::connect(http.0).await.is_err(), "nothing listens");
}
