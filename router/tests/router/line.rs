//! The line in front of full workers: its order, its bounds, and what is refused at once.

use crate::{Cluster, MODEL, PATH, body, config, soon, worker::Fault};
use futures_util::future::join_all;
use serde_json::{Value, json};
use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

const POST: &str = "POST /v1/completions HTTP/1.1\r\n";

/// The choices in the router's line.
async fn queued(cluster: &Cluster) -> usize {
    let metrics = cluster.http().get("/metrics").await.body;
    let value = metrics.lines().find_map(|line| line.strip_prefix("lockstep_router_queued "));
    value.expect("a gauge").parse().expect("a number")
}

/// A crowd in front of one place, with so long a limit of the line, and a newcomer that comes once
/// enough places have come free to know how often they do: what it got. All others are answered.
async fn behind_a_crowd<T>(limit: Duration, newcomer: impl AsyncFnOnce(&Cluster) -> T) -> T {
    let mut config = config();
    config.deadlines.queue = limit;
    let cluster = Cluster::start(config, 1).await;
    cluster.worker().places.store(1, Ordering::SeqCst);
    *cluster.worker().pace.lock().unwrap() = Duration::from_millis(15);
    let http = cluster.http();
    let one = body();
    let crowd = join_all((0..20).map(|_| http.post(PATH, &one)));
    let newcomer = async {
        while queued(&cluster).await < 17 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        while queued(&cluster).await > 14 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        newcomer(&cluster).await
    };
    let (crowd, got) = tokio::join!(crowd, newcomer);
    assert!(crowd.iter().all(|reply| reply.status == 200), "the line moved to its end");
    got
}

#[tokio::test]
async fn an_overload_is_told_at_once_and_a_line_that_moves_is_served() {
    // One after the other they take longer than this.
    let limit = Duration::from_secs(2);
    let newcomer = async |cluster: &Cluster| {
        let reply = cluster.http().post(PATH, &body()).await;
        (reply, queued(cluster).await)
    };
    let (refused, waiting) = behind_a_crowd(limit, newcomer).await;
    let words = refused.refusal(429, None);
    assert!(words.contains("choices wait"), "{words}");
    assert!(waiting > 8, "told while {waiting} others waited on");
    assert!(refused.header("retry-after").unwrap().parse::<u64>().unwrap() >= 2);
}

#[tokio::test]
async fn a_worker_that_does_not_answer_holds_up_nobody_else_in_line() {
    let mut config = config();
    config.deadlines.connect = Duration::from_secs(4);
    config.deadlines.queue = Duration::from_secs(8);
    config.deadlines.open = Duration::from_secs(8);
    let cluster = Cluster::start(config, 2).await;
    let workers: Vec<_> = cluster.members.iter().map(|member| &member.worker).collect();
    for worker in &workers {
        worker.places.store(1, Ordering::SeqCst);
        worker.say(&"endless ".repeat(300));
        *worker.pace.lock().unwrap() = Duration::from_millis(20);
    }
    let http = cluster.http();
    let long = json!({"model": MODEL, "prompt": "x", "max_tokens": 1000}).to_string();
    let mut busy = Vec::new();
    for worker in &workers {
        busy.push(http.open(POST, long.as_bytes()).await);
        soon("it runs", || worker.live() == 1).await;
    }
    for worker in &workers {
        worker.say("short");
        *worker.pace.lock().unwrap() = Duration::ZERO;
    }
    let one = body();
    let asked = async || {
        let reply = http.post(PATH, &one).await;
        (reply.status, Instant::now())
    };
    let script = async {
        while queued(&cluster).await < 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // Whoever tries first asks a worker that does not answer.
        workers[0].fault(Fault::Mute);
        drop(busy.remove(0));
        soon("it is asked", || workers[0].faults.lock().unwrap().is_empty()).await;
        drop(busy.remove(0));
        Instant::now()
    };
    let (first, second, freed) = tokio::join!(asked(), asked(), script);
    assert_eq!((first.0, second.0), (200, 200));
    let quick = first.1.min(second.1).duration_since(freed);
    assert!(quick < Duration::from_secs(3), "it waited for the other one's call: {quick:?}");
    assert!(first.1.max(second.1).duration_since(freed) > Duration::from_secs(3));
}

#[tokio::test]
async fn the_lowest_priority_number_goes_first_and_the_highest_makes_room() {
    let mut config = config();
    config.limits.queue_max = 3;
    config.deadlines.queue = Duration::from_secs(10);
    let cluster = Cluster::start(config, 1).await;
    cluster.worker().places.store(1, Ordering::SeqCst);
    cluster.worker().say(&"endless ".repeat(300));
    *cluster.worker().pace.lock().unwrap() = Duration::from_millis(20);
    let http = cluster.http();
    let long = json!({"model": MODEL, "prompt": "x", "max_tokens": 1000}).to_string();
    let busy = http.open(POST, long.as_bytes()).await;
    soon("it runs", || cluster.worker().live() == 1).await;
    let ask = async |priority: Value, behind: usize| {
        while queued(&cluster).await < behind {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let mut body = body();
        (body["priority"], body["max_tokens"]) = (priority, json!(5));
        (http.post(PATH, &body).await, Instant::now())
    };
    let release = async {
        // The urgent one takes the place of the last of the least urgent.
        while !http.get("/metrics").await.body.contains("code=\"429\"") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        drop(busy);
    };
    let (plain, bulk, later, urgent, ()) = tokio::join!(
        ask(Value::Null, 0),
        ask(json!(7), 1),
        ask(json!(7), 2),
        ask(json!(-1), 3),
        release
    );
    assert!(later.0.refusal(429, None).contains("others go first"), "{later:?}");
    assert!([&plain, &bulk, &urgent].iter().all(|(reply, _)| reply.status == 200));
    assert!(urgent.1 < plain.1 && plain.1 < bulk.1, "the urgent one, then in order");
    let (wrong, _) = ask(json!("high"), 0).await;
    wrong.refusal(400, Some("priority"));
}

#[tokio::test]
async fn what_cannot_begin_within_its_own_limit_is_refused_at_once() {
    let newcomer = async |cluster: &Cluster| {
        let head = format!("{POST}x-request-timeout: 0.4\r\n");
        let began = Instant::now();
        let reply = cluster.http().send(&head, body().to_string().as_bytes()).await;
        (reply, began.elapsed())
    };
    let (refused, after) = behind_a_crowd(Duration::from_secs(30), newcomer).await;
    let words = refused.refusal(429, None);
    assert!(words.contains("own limit leaves 0."), "{words}");
    assert!(after < Duration::from_millis(400), "{after:?}");
}
