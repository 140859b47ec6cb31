//! Keeps the roster: lists, watches from there, and lists again at any doubt.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use proto::etcd::{RangeResponse, WatchResponse};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{sleep, sleep_until},
};
use tonic::Streaming;

use super::{
    EtcdOptions,
    session::{Fault, Session},
    view::View,
};
use crate::Roster;

/// With nothing to hear for this long a key is read: it proves that the member still speaks for a
/// majority. One that is stopped, whose connections stay open, is noticed by nothing else.
const PROBE: Duration = Duration::from_secs(1);
/// With nothing to hear for this long the list is read again: it mends whatever a watch may have
/// missed.
const SILENCE: Duration = Duration::from_secs(5);
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// Follows the roster until it is dropped, beginning with member `at`.
pub(super) fn spawn(
    options: Arc<EtcdOptions>,
    view: View,
    at: usize,
    roster: watch::Sender<Roster>,
) -> JoinHandle<()> {
    let heard = Instant::now();
    tokio::spawn(Watcher { options, view, roster, away: false, heard }.run(at))
}

struct Watcher {
    options: Arc<EtcdOptions>,
    view: View,
    roster: watch::Sender<Roster>,
    /// Whether the last attempt failed: told once when it begins and once when it ends.
    away: bool,
    /// When the roster was last read or changed.
    heard: Instant,
}

impl Watcher {
    async fn run(mut self, mut at: usize) {
        let mut pause = PAUSE_MIN;
        loop {
            let Err(fault) = self.follow(at).await;
            if !self.away {
                let endpoint = &self.options.endpoints[at % self.options.endpoints.len()];
                tracing::warn!(endpoint, %fault, "roster: trying the next etcd member");
                pause = PAUSE_MIN;
            }
            self.away = true;
            self.view.doubt(Instant::now());
            at += 1;
            sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
            self.publish();
        }
    }

    /// Returns only with what went wrong.
    async fn follow(&mut self, at: usize) -> Result<std::convert::Infallible, Fault> {
        let mut session = Session::open(&self.options, at).await?;
        loop {
            let list = session.list().await?;
            if std::mem::take(&mut self.away) {
                tracing::info!(instances = list.kvs.len(), "roster: etcd answers again");
            }
            self.replace(list);
            self.publish();
            let mut changes = session.watch(self.view.next_revision()).await?;
            while self.listen(&mut session, &mut changes).await? {}
        }
    }

    /// One step of listening. False: the watch has to begin anew from a list.
    async fn listen(
        &mut self,
        session: &mut Session,
        changes: &mut Streaming<WatchResponse>,
    ) -> Result<bool, Fault> {
        let now = Instant::now();
        let wake = self.view.settle(now).map_or(now + PROBE, |at| at.min(now + PROBE));
        tokio::select! {
            change = changes.message() => {
                let Some(change) = change? else {
                    return Err(Fault::Broken("the watch ended".into()));
                };
                if change.canceled {
                    let (compacted, reason) = (change.compact_revision, change.cancel_reason);
                    tracing::info!(compacted, reason, "roster: listing anew");
                    // A refusal that is no compaction would come again at once.
                    return if compacted > 0 {
                        Ok(false)
                    } else {
                        Err(Fault::Broken(reason))
                    };
                }
                self.heard = Instant::now();
                change.events.iter().for_each(|event| self.view.apply(event, self.heard));
            }
            () = sleep_until(wake.into()) => match self.heard.elapsed() < SILENCE {
                true => session.probe().await?,
                false => {
                    let list = session.list().await?;
                    self.replace(list);
                }
            }
        }
        self.publish();
        Ok(true)
    }

    fn replace(&mut self, list: RangeResponse) {
        self.heard = Instant::now();
        self.view.replace(list, self.heard);
    }

    fn publish(&mut self) {
        self.view.settle(Instant::now());
        let next = self.view.roster();
        self.roster.send_if_modified(|current| {
            let changed = **current != *next;
            if changed {
                *current = next;
            }
            changed
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::etcd::tests::members::{Cluster, ids, instance};

    #[tokio::test(flavor = "multi_thread")]
    async fn a_watch_whose_revision_was_compacted_begins_anew_from_a_list() {
        let Some(cluster) = Cluster::start(1).await else { return };
        let options = Arc::new(cluster.options());
        let view = View::new(options.prefix(), options.grace);
        let (roster, seen) = watch::channel(view.roster());
        let heard = Instant::now();
        let mut watcher = Watcher { options: options.clone(), view, roster, away: false, heard };
        for id in ["a", "b"] {
            let value = serde_json::to_string(&instance(id)).unwrap();
            cluster.etcdctl(&["put", &format!("{}{id}", options.prefix()), &value]);
        }
        let mut session = Session::open(&options, 0).await.unwrap();
        let revision = session.list().await.unwrap().header.unwrap().revision;
        cluster.etcdctl(&["compact", &revision.to_string()]);
        // The view is as old as revision 0: the first change it misses is compacted.
        let mut changes = session.watch(watcher.view.next_revision()).await.unwrap();
        while watcher.listen(&mut session, &mut changes).await.unwrap() {}
        let following = tokio::spawn(async move { watcher.follow(0).await });
        let mut seen = seen;
        let waiting = seen.wait_for(|roster| ids(roster) == ["a", "b"]);
        tokio::time::timeout(Duration::from_secs(10), waiting).await.unwrap().unwrap();
        following.abort();
    }
}
