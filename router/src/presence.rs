//! Watches one worker: asks who it is before its first use, and hears from then on that it lives
//! and how busy it is.
//!
//! An address says nothing about who is there: ports and addresses are used again. What answers
//! otherwise than the roster says, or not at all, is left alone, and asked again now and then.

use crate::{
    config::Deadlines,
    link::{Link, Presence},
    losses::Losses,
};
use cluster::Instance;
use proto::v1::{CachedPrefixes, WatchRequest, WorkerReport};
use std::{
    error::Error,
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tonic::{Code, Status, Streaming};

/// Between two questions to one that is away.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// Who hears of what happens to workers.
#[derive(Clone, Default)]
pub(crate) struct News {
    /// Told whenever a worker's presence changes.
    pub changed: watch::Sender<()>,
    pub losses: Arc<Losses>,
}

/// Keeps the link's presence and load true for as long as the link lives.
pub(crate) async fn follow(
    link: Weak<Link>,
    expected: Arc<Instance>,
    news: News,
    deadlines: Deadlines,
) {
    let watcher = Watcher { link, expected, news, deadlines };
    let mut pause = PAUSE_MIN;
    loop {
        let Err(end) = watcher.visit().await else { return };
        if end.was_here {
            pause = PAUSE_MIN;
        }
        if watcher.set(Presence::Away(end.reason.into())).is_none() {
            return;
        }
        sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// The link is gone.
struct Gone;

/// Why a worker is not watched any more.
struct End {
    reason: String,
    was_here: bool,
}

struct Watcher {
    link: Weak<Link>,
    expected: Arc<Instance>,
    news: News,
    deadlines: Deadlines,
}

impl Watcher {
    /// Until the worker, or whatever is there, ends it; `Ok` when the link is gone.
    async fn visit(&self) -> Result<Gone, End> {
        let away = |reason| End { reason, was_here: false };
        let mut reports = match timeout(self.deadlines.hello, self.meet()).await {
            Ok(met) => match met.map_err(away)? {
                Some(reports) => reports,
                None => return Ok(Gone),
            },
            Err(_) => return Err(away(format!("no answer within {:?}", self.deadlines.hello))),
        };
        let ended = |reason| End { reason, was_here: true };
        loop {
            let report = match timeout(self.deadlines.heartbeat, reports.message()).await {
                Ok(report) => report,
                Err(_) => {
                    self.lost();
                    if self.set(Presence::Silent).is_none() {
                        return Ok(Gone);
                    }
                    // The connection's own keepalive ends this.
                    reports.message().await
                }
            };
            match report {
                Ok(Some(report)) => {
                    if self.here(report).is_none() {
                        return Ok(Gone);
                    }
                }
                Ok(None) => return Err(ended("it ended the connection".to_owned())),
                Err(status) => {
                    self.lost();
                    return Err(ended(reason(&status)));
                }
            }
        }
    }

    /// It went without having ended by itself.
    fn lost(&self) {
        if let Some(link) = self.link.upgrade() {
            self.news.losses.note(link.key());
        }
    }

    /// Asks who is there; `None` when the link is gone.
    async fn meet(&self) -> Result<Option<Streaming<WorkerReport>>, String> {
        let (theirs, ours) = (self.expected.protocol, proto::WORKER_PROTOCOL);
        if theirs != ours {
            return Err(format!(
                "it speaks protocol {theirs}, this router {ours}: run the same version of both"
            ));
        }
        let Some(mut client) = self.link.upgrade().map(|link| link.client()) else {
            return Ok(None);
        };
        let called = client.watch(WatchRequest {}).await.map_err(|status| reason(&status))?;
        let mut reports = called.into_inner();
        let first = reports.message().await.map_err(|status| reason(&status))?;
        let first = first.ok_or_else(|| "it ended the connection at once".to_owned())?;
        self.verify(&first)?;
        // What it said before may be long ago.
        let prefixes = first.prefixes.unwrap_or_default();
        let first =
            WorkerReport { prefixes: Some(CachedPrefixes { anew: true, ..prefixes }), ..first };
        Ok(self.here(first).map(|()| reports))
    }

    /// Whether it is who the roster says.
    fn verify(&self, report: &WorkerReport) -> Result<(), String> {
        let found = Instance::decode(&report.instance)
            .map_err(|error| format!("what answers is no worker of this version: {error}"))?;
        let expected = &self.expected;
        if found.id != expected.id {
            return Err(format!("another worker answers at its address: {}", found.id));
        }
        let serves = |instance: &Instance| (instance.model.clone(), instance.fingerprint.clone());
        let ((model, print), (wanted, wanted_print)) = (serves(&found), serves(expected));
        if (&model, &print) != (&wanted, &wanted_print) {
            return Err(format!(
                "it serves '{model}' ({print}), the roster says '{wanted}' ({wanted_print})"
            ));
        }
        Ok(())
    }

    fn here(&self, report: WorkerReport) -> Option<()> {
        let link = self.link.upgrade()?;
        if let Some(prefixes) = report.prefixes {
            link.told_prefixes(prefixes);
        }
        if let Some(load) = report.load {
            link.told(load);
        }
        drop(link);
        self.set(Presence::Here)
    }

    /// Tells of each change once; `None` when the link is gone.
    fn set(&self, presence: Presence) -> Option<()> {
        let link = self.link.upgrade()?;
        let Some(before) = link.set_presence(presence.clone()) else { return Some(()) };
        let (worker, address) = (link.id(), link.address());
        let model = &*self.expected.model;
        match presence {
            Presence::Here if before == Presence::Unmet => {
                let fingerprint = &*self.expected.fingerprint;
                tracing::info!(worker, address, model, fingerprint, "worker met");
            }
            Presence::Here => tracing::info!(worker, address, model, "worker is there again"),
            Presence::Silent => {
                let seconds = self.deadlines.heartbeat.as_secs_f64();
                tracing::warn!(worker, address, model, seconds, "worker has stopped speaking");
            }
            Presence::Away(reason) => {
                let reason = &*reason;
                tracing::warn!(worker, address, model, reason, "worker is left alone");
            }
            Presence::Unmet => {}
        }
        self.news.changed.send_replace(());
        Some(())
    }
}

/// What a failed call says about who is there.
fn reason(status: &Status) -> String {
    match status.code() {
        Code::Unimplemented | Code::NotFound | Code::PermissionDenied | Code::Unauthenticated => {
            let (code, message) = (status.code(), status.message());
            format!("something other than a worker of this version answers ({code:?}) {message}")
                .trim_end()
                .to_owned()
        }
        _ => {
            let mut source = status.source();
            while let Some(deeper) = source.and_then(Error::source) {
                source = Some(deeper);
            }
            source.map_or_else(|| status.message().to_owned(), ToString::to_string)
        }
    }
}
