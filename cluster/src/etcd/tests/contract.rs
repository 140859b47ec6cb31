//! What every `Membership` promises, asked of both implementations.

use tokio::sync::watch;

use super::members::{Cluster, ids, instance, wait};
use crate::{Etcd, InMemory, Membership, State};

/// `one` and `other` are two doors to the same registry.
async fn keeps_its_promises(one: &dyn Membership, other: &dyn Membership) {
    let mut roster = other.roster();
    assert!(roster.borrow().is_empty());

    let (b, b_seen) = watch::channel(instance("b"));
    let b_registration = one.announce(b_seen).await.unwrap();
    wait(&mut roster, "b is there", |all| ids(all) == ["b"]).await;
    let (a, a_seen) = watch::channel(instance("a"));
    let a_registration = other.announce(a_seen).await.unwrap();
    wait(&mut roster, "in order of id", |all| ids(all) == ["a", "b"]).await;

    b.send_modify(|instance| {
        instance.state = State::Ready;
        instance.context_max = 3;
    });
    wait(&mut roster, "changes are followed", |all| {
        all[1].state == State::Ready && all[1].context_max == 3 && all[0].state == State::Loading
    })
    .await;
    for context in 4..=200 {
        b.send_modify(|instance| instance.context_max = context);
    }
    wait(&mut roster, "the last change wins", |all| all[1].context_max == 200).await;

    // The end of the changes is not the end of the instance.
    drop(b);
    let mut late = one.roster();
    wait(&mut late, "a late reader sees the whole set", |all| ids(all) == ["a", "b"]).await;

    a_registration.leave().await;
    wait(&mut roster, "leaving", |all| ids(all) == ["b"]).await;
    a.send_modify(|instance| instance.context_max = 9);
    drop(b_registration);
    wait(&mut roster, "dropping is leaving", |all| all.is_empty()).await;
    wait(&mut late, "for every reader", |all| all.is_empty()).await;
}

#[tokio::test]
async fn in_memory() {
    let one = InMemory::new();
    keeps_its_promises(&one, &one.clone()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd() {
    let Some(cluster) = Cluster::start(1).await else { return };
    let one = Etcd::connect(cluster.options()).await.unwrap();
    let other = Etcd::connect(cluster.options()).await.unwrap();
    keeps_its_promises(&one, &other).await;
}
