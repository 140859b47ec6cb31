//! Keeps an epoch open: a lease, its renewal, and the key under it.

use std::time::Instant;

use proto::etcd::Compare;
use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval, sleep},
};

use super::{
    super::{
        keeper::{PAUSE, State, Trouble},
        session::{Fault, Session},
    },
    Epoch, GroupKey, absent, read, unchanged,
};

pub(super) struct Keeper {
    group: GroupKey,
    epoch: Epoch,
    /// And when etcd is known to have renewed it last.
    lease: Option<(i64, Instant)>,
    trouble: Trouble,
}

impl Keeper {
    /// For an epoch that was opened under `lease` just now.
    pub fn new(group: GroupKey, epoch: Epoch, lease: i64) -> Self {
        let lease = Some((lease, Instant::now()));
        Self { group, epoch, lease, trouble: Trouble::default() }
    }

    /// Until `stopped`, or until another epoch has begun.
    pub async fn run(mut self, mut at: usize, mut stopped: watch::Receiver<bool>) {
        loop {
            let fault = tokio::select! {
                fault = self.serve(at) => fault,
                () = crate::shutdown::requested(&mut stopped) => return self.leave(at).await,
            };
            let group = &self.group.id;
            match fault {
                Err(Fault::LeaseGone) => {
                    tracing::warn!(group, "lease of the group lost, entering it again");
                    self.lease = None;
                }
                // The ranks of other machines leave for the other leader, which this one notices.
                Err(Fault::Refused(reason)) => {
                    return tracing::error!(group, reason, "this epoch of the group has ended");
                }
                Err(fault) => {
                    if let Some(State { seconds, attempts }) = self.trouble.failed(Instant::now()) {
                        tracing::warn!(
                            group, %fault, seconds, attempts,
                            "group: etcd does not answer; serving on, trying each member"
                        );
                    }
                    at += 1;
                    sleep(PAUSE).await;
                }
                Ok(never) => match never {},
            }
        }
    }

    /// Returns only with what went wrong.
    async fn serve(&mut self, at: usize) -> Result<std::convert::Infallible, Fault> {
        let options = self.group.options.clone();
        let mut session = Session::open(&options, at).await?;
        let lease = match self.lease {
            Some((lease, renewed)) if renewed.elapsed() < options.lease => lease,
            _ => {
                let lease = session.grant().await?;
                self.lease = Some((lease, Instant::now()));
                lease
            }
        };
        let mut keepalive = session.keep(lease).await?;
        self.enter(&mut session, lease).await?;
        if let Some(State { seconds, .. }) = self.trouble.over(Instant::now()) {
            tracing::info!(group = self.group.id, seconds, "group: etcd answers again");
        }
        let mut renewal = interval(options.lease / 4);
        renewal.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            renewal.tick().await;
            keepalive.renew().await?;
            self.lease = Some((lease, Instant::now()));
        }
    }

    /// Sees that the key is there; enters it again where it is gone and no later epoch began.
    async fn enter(&self, session: &mut Session, lease: i64) -> Result<(), Fault> {
        let (key, number) = (self.group.key(), self.group.number());
        let found = session.get(&key).await?;
        match read(&found) {
            Some(known) if known == self.epoch => {
                // It may hang on a lease that is about to end.
                let revision = found.kvs.first().map_or(0, |kv| kv.mod_revision);
                return self.put(session, lease, vec![unchanged(key, revision)]).await;
            }
            Some(Epoch { epoch, leader, .. }) => {
                let reason = format!("{leader} leads it in epoch {epoch}");
                return Err(Fault::Refused(reason));
            }
            None => {}
        }
        let last = session.get(&number).await?;
        let (value, revision) =
            last.kvs.first().map_or((&[][..], 0), |kv| (&kv.value, kv.mod_revision));
        // An etcd that has lost its data knows no number at all.
        if !value.is_empty() && value != self.epoch.epoch.to_string().as_bytes() {
            let last = String::from_utf8_lossy(value);
            return Err(Fault::Refused(format!("epoch {last} has begun since")));
        }
        self.put(session, lease, vec![absent(key), unchanged(number, revision)]).await
    }

    async fn put(
        &self,
        session: &mut Session,
        lease: i64,
        compare: Vec<Compare>,
    ) -> Result<(), Fault> {
        match session.put_if(compare, self.group.entry(&self.epoch, lease)?).await? {
            true => Ok(()),
            false => Err(Fault::Broken("the group's key changed meanwhile".into())),
        }
    }

    /// Takes the key out at once, through whichever member answers.
    async fn leave(self, at: usize) {
        let Some((lease, _)) = self.lease else { return };
        let options = &self.group.options;
        for at in at..at + options.endpoints.len() {
            let left = async { Session::open(options, at).await?.revoke(lease).await };
            match left.await {
                Ok(()) | Err(Fault::LeaseGone) => return,
                Err(fault) => tracing::warn!(group = self.group.id, %fault, "no answer yet"),
            }
        }
    }
}
