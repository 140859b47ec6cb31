//! A router over a fixed list of workers, without a registry.

use crate::{MODEL, client::Http, config, worker::Worker};
use cluster::{Instance, Membership, State, StaticList};
use router::Router;
use serde_json::json;
use std::{sync::Arc, time::Duration};
use tokio::{sync::watch, time::timeout};

const DEADLINE: Duration = Duration::from_secs(30);

fn instance() -> Instance {
    Instance {
        id: "worker-0".into(),
        model: MODEL.into(),
        // As the worker sees itself: nothing that can be reached from elsewhere.
        address: "http://192.0.2.1:1".into(),
        fingerprint: "f".into(),
        protocol: proto::WORKER_PROTOCOL,
        started: 0,
        state: State::Ready,
        context_max: 4096,
        vocab_size: 512,
        ranks: 1,
        blocks_total: 256,
        epoch: 0,
        reason: String::new(),
    }
}

#[tokio::test]
async fn listed_workers_join_with_their_facts_and_change_and_leave() {
    let (worker, address) = Worker::start().await;
    // A port where nobody listens: bound once, so that it was free, and let go.
    let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let list = [format!("http://{unused}"), address.clone(), address.clone()];
    let list = Arc::new(StaticList::follow(&list, None).unwrap());
    let mut roster = list.roster();
    assert!(roster.borrow().is_empty());
    let (_shutdown, receiver) = watch::channel(false);
    let router = Router::start(config(), list, receiver).await.unwrap();
    let http = Http(router.http().unwrap());

    worker.instance.lock().unwrap().replace(instance());
    let joined = timeout(DEADLINE, roster.wait_for(|roster| !roster.is_empty()));
    let all = joined.await.expect("in time").unwrap().clone();
    assert_eq!(
        *all,
        [Arc::new(Instance { address, ..instance() })],
        "once, by the address of the list"
    );
    let body = json!({"prompt": "Once", "max_tokens": 4});
    let answered = async {
        while http.post("/v1/completions", &body).await.status != 200 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(DEADLINE, answered).await.expect("an answer in time");

    let draining = Instance { state: State::Draining, ..instance() };
    worker.instance.lock().unwrap().replace(draining);
    let drains = |roster: &cluster::Roster| roster[0].state == State::Draining;
    timeout(DEADLINE, roster.wait_for(drains)).await.expect("in time").unwrap();

    // Silence is not death: the scripted worker says that it is not available for now.
    *worker.instance.lock().unwrap() = None;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(roster.borrow().len(), 1, "one second of silence");
    let gone = timeout(DEADLINE, roster.wait_for(|roster| roster.is_empty()));
    gone.await.expect("in time").unwrap();
}
