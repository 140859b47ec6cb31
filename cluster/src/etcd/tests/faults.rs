//! etcd at its worst: lost leases, compaction, rubbish, dead, stopped and amnesiac members.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{sync::watch, time::sleep};

use super::members::{Cluster, ids, instance, wait};
use crate::{Etcd, EtcdOptions, Instance, Membership, MembershipError, State};

const PREFIX: &str = "/lockstep/test/instances/";

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_whose_lease_was_lost_registers_again() {
    let Some(cluster) = Cluster::start(1).await else { return };
    let etcd = Etcd::connect(cluster.options()).await.unwrap();
    let mut roster = etcd.roster();
    let (_sender, seen) = watch::channel(instance("a"));
    let _registration = etcd.announce(seen).await.unwrap();
    wait(&mut roster, "registered", |all| ids(all) == ["a"]).await;
    let listed = cluster.etcdctl(&["lease", "list"]);
    let lease = listed.lines().last().unwrap();
    cluster.etcdctl(&["lease", "revoke", lease]);
    wait(&mut roster, "gone with its lease", |all| all.is_empty()).await;
    wait(&mut roster, "back under a new one", |all| ids(all) == ["a"]).await;
    assert!(!cluster.etcdctl(&["lease", "list"]).contains(lease));
}

#[tokio::test(flavor = "multi_thread")]
async fn rubbish_in_the_registry_is_skipped() {
    let Some(cluster) = Cluster::start(1).await else { return };
    let etcd = Etcd::connect(cluster.options()).await.unwrap();
    let mut roster = etcd.roster();
    let good = serde_json::to_string(&instance("good")).unwrap();
    let long = format!("{{\"id\":\"{}\"}}", "x".repeat(20_000));
    for (id, value) in [("text", "hello"), ("liar", &good), ("long", &long), ("good", &good)] {
        cluster.etcdctl(&["put", &format!("{PREFIX}{id}"), value]);
    }
    cluster.etcdctl(&["put", "/lockstep/another/instances/good", &good]);
    wait(&mut roster, "only what can be read", |all| ids(all) == ["good"]).await;
    let late = Etcd::connect(cluster.options()).await.unwrap();
    assert_eq!(ids(&late.roster().borrow()), ["good"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_known_roster_outlives_etcd_and_its_memory() {
    let Some(mut cluster) = Cluster::start(1).await else { return };
    let etcd = Etcd::connect(cluster.options()).await.unwrap();
    let mut roster = etcd.roster();
    let (sender, seen) = watch::channel(instance("a"));
    let _registration = etcd.announce(seen).await.unwrap();
    wait(&mut roster, "registered", |all| ids(all) == ["a"]).await;
    // From here on the roster may never be seen empty.
    let mut watched = etcd.roster();
    let never_empty = tokio::spawn(async move {
        while watched.changed().await.is_ok() {
            assert!(!watched.borrow_and_update().is_empty(), "the roster was empty");
        }
    });
    cluster.members[0].kill();
    sleep(Duration::from_secs(4)).await;
    assert_eq!(ids(&roster.borrow()), ["a"]);
    cluster.restart_empty(0);
    sender.send_modify(|instance| instance.state = State::Ready);
    wait(&mut roster, "registered anew", |all| {
        all.first().is_some_and(|instance| instance.state == State::Ready)
    })
    .await;
    drop(etcd);
    tokio::time::timeout(Duration::from_secs(5), never_empty).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_really_gone_after_trouble_goes_after_the_grace() {
    let Some(mut cluster) = Cluster::start(1).await else { return };
    let etcd = Etcd::connect(cluster.options()).await.unwrap();
    let mut roster = etcd.roster();
    let value = serde_json::to_string(&instance("a")).unwrap();
    cluster.etcdctl(&["put", &format!("{PREFIX}a"), &value]);
    wait(&mut roster, "a is there", |all| ids(all) == ["a"]).await;
    let began = Instant::now();
    cluster.restart_empty(0);
    wait(&mut roster, "a is given up", |all| all.is_empty()).await;
    assert!(began.elapsed() >= cluster.options().grace, "given up after {:?}", began.elapsed());
}

/// Three members, one of which fails; registrations and rosters go on through the other two.
async fn one_of_three(fail: impl FnOnce(&mut Cluster)) {
    let Some(mut cluster) = Cluster::start(3).await else { return };
    let etcd = Etcd::connect(cluster.options()).await.unwrap();
    let mut roster = etcd.roster();
    let mut kept = Vec::new();
    for id in ["a", "b", "c"] {
        let (sender, seen) = watch::channel(instance(id));
        kept.push((sender, etcd.announce(seen).await.unwrap()));
    }
    let all_there = |all: &[Arc<Instance>]| ids(all) == ["a", "b", "c"];
    wait(&mut roster, "three instances", all_there).await;
    fail(&mut cluster);
    for (sender, _) in &kept {
        sender.send_modify(|instance| instance.state = State::Ready);
    }
    wait(&mut roster, "changes get through", |all| {
        all_there(all) && all.iter().all(|instance| instance.state == State::Ready)
    })
    .await;
    // Longer than any lease: only renewed ones are left.
    sleep(cluster.options().lease * 2).await;
    let late = Etcd::connect(cluster.options()).await.unwrap();
    assert!(all_there(&late.roster().borrow()), "{:?}", late.roster().borrow());
    kept.pop().unwrap().1.leave().await;
    let mut late = late.roster();
    wait(&mut late, "leaving", |all| ids(all) == ["a", "b"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_of_three_is_killed() {
    one_of_three(|cluster| cluster.members[0].kill()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_of_three_is_stopped_and_keeps_its_connections() {
    one_of_three(|cluster| cluster.members[0].signal("-STOP")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_absent_etcd_is_an_error_in_bounded_time() {
    // The listener never answers; nothing listens on the other port once it is dropped.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let address = silent.local_addr().unwrap();
    let mut options =
        EtcdOptions::new(vec![format!("http://{address}"), format!("http://{closed}")], "test");
    options.call_deadline = Duration::from_millis(300);
    let began = Instant::now();
    let Err(MembershipError::Unreachable { endpoints, reason }) = Etcd::connect(options).await
    else {
        panic!("nobody is there")
    };
    assert!(began.elapsed() < Duration::from_secs(5));
    assert!(endpoints.contains(&address.to_string()) && !reason.is_empty());
}
