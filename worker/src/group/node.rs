//! A machine that has ranks of a group and does not lead it: starts them for each epoch that a
//! leader opens, and ends them with it.
//!
//! Ranks find by themselves that their leader is gone; what is stopped, or waits for a leader that
//! never was, is ended here. A rank that ends while the epoch lasts is started again, later each
//! time: it may not have been part of the group yet.

use std::{ops::Range, path::PathBuf, time::Duration};

use cluster::{Epoch, GroupKey, shutdown};
use tokio::{
    sync::watch,
    task::spawn_blocking,
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use super::{
    failures::RankFailures,
    nodes::ranks_of,
    process::{RankConfig, TELL_AGAIN},
    rank_process::RankProcesses,
};
use crate::WorkerError;

/// Between two looks at the ranks.
const LOOK: Duration = Duration::from_millis(100);
/// How long ranks may take to notice that their epoch, or another rank, has ended. Longer than they
/// take a silent leader for alive, and than etcd takes to hear again of one that it had forgotten.
const END_LIMIT: Duration = Duration::from_secs(15);
/// Before ranks that ended are started again.
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// A machine of a group that another one leads.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    pub key: GroupKey,
    /// This machine's number, at least 1, of `nodes`.
    pub node: usize,
    pub nodes: usize,
    /// The checkpoint on this machine.
    pub model: PathBuf,
    /// Of this program: the leader must have the same.
    pub version: String,
    /// How long ranks may go on once shutdown is asked for: the leader may drain.
    pub drain_limit: Duration,
    /// As `GroupConfig::rank_program`.
    pub rank_program: Option<PathBuf>,
    /// As `Nodes::tls`: the leader has it where this machine has it, and nowhere else.
    pub tls: Option<tls::Cluster>,
}

/// Runs this machine's ranks, epoch after epoch, until `shutdown`.
///
/// Errors: none that a wait may mend; those are told in the log and tried again.
pub async fn run_node(
    config: NodeConfig,
    shutdown: watch::Receiver<bool>,
) -> Result<(), WorkerError> {
    let (mut epochs, mut stop) = (config.key.follow(), shutdown.clone());
    let mut pause = PAUSE_MIN;
    loop {
        let epoch = tokio::select! {
            epoch = next_epoch(&config, &mut epochs) => epoch?,
            () = shutdown::requested(&mut stop) => return Ok(()),
        };
        let (number, began) = (epoch.epoch, Instant::now());
        let started = config.ranks(&epoch).and_then(|ranks| {
            Served::start(&config, &epoch, ranks).map_err(|error| error.to_string())
        });
        let reason = match started {
            Ok(served) => served.run(&mut epochs, &shutdown).await?,
            Err(reason) => reason,
        };
        if *shutdown.borrow() {
            return Ok(());
        }
        if began.elapsed() > PAUSE_MAX {
            pause = PAUSE_MIN;
        }
        let group = config.key.id();
        tracing::warn!(group, epoch = number, reason, "the ranks of this node have ended");
        // The next leader's are started at once.
        let next = epochs.wait_for(|known| known.as_ref().is_none_or(|e| e.epoch != number));
        tokio::select! {
            ended = timeout(pause, next) => if let Ok(Err(_)) = ended { return Err(unfollowed()) },
            () = shutdown::requested(&mut stop) => return Ok(()),
        }
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

fn unfollowed() -> WorkerError {
    WorkerError::Group("nobody follows the group's key any more".into())
}

async fn next_epoch(
    config: &NodeConfig,
    epochs: &mut watch::Receiver<Option<Epoch>>,
) -> Result<Epoch, WorkerError> {
    loop {
        match timeout(TELL_AGAIN, epochs.wait_for(Option::is_some)).await {
            Ok(Ok(found)) => {
                if let Some(epoch) = &*found {
                    return Ok(epoch.clone());
                }
            }
            Ok(Err(_)) => return Err(unfollowed()),
            Err(_) => tracing::info!(group = config.key.id(), "waiting for the group's leader"),
        }
    }
}

impl NodeConfig {
    /// This machine's in `epoch`; or why it cannot take part.
    fn ranks(&self, epoch: &Epoch) -> Result<Range<usize>, String> {
        let Self { node, nodes, version, tls, .. } = self;
        if epoch.version != *version {
            return Err(format!(
                "the leader's program is {}, this one {version}: run the same on every node",
                epoch.version
            ));
        }
        if epoch.ranks.len() != *nodes || *node >= *nodes {
            let others = epoch.ranks.len();
            return Err(format!("this is node {node} of {nodes}, the leader has {others} nodes"));
        }
        match (epoch.tls, tls) {
            (true, None) => Err("the leader's ranks speak TLS: give this node --cluster-cert, \
                                 --cluster-key and --cluster-ca, too"
                .into()),
            (false, Some(_)) => Err("the leader's ranks do not speak TLS, and this node was told \
                                     to: give the leader --cluster-cert, --cluster-key and \
                                     --cluster-ca, too"
                .into()),
            _ => Ok(ranks_of(&epoch.ranks, *node)),
        }
    }
}

/// The ranks of one epoch.
struct Served {
    epoch: u64,
    ranks: RankProcesses,
    failures: RankFailures,
    drain_limit: Duration,
    /// When what is left will be ended, and why.
    ending: Option<(Instant, String)>,
}

impl Served {
    fn start(config: &NodeConfig, epoch: &Epoch, ranks: Range<usize>) -> Result<Self, WorkerError> {
        let Epoch { epoch: number, leader, token, ranks: all, .. } = epoch;
        let group = config.key.id();
        tracing::info!(group, epoch = number, %leader, ?ranks, "starting the ranks of this node");
        let (failures, mut processes) = (RankFailures::default(), RankProcesses::default());
        for rank in ranks {
            let place = RankConfig {
                rank,
                world_size: all.iter().sum(),
                leader: *leader,
                epoch: *number,
                token: token.clone(),
                model: Some(config.model.clone()),
                tls: config.tls.clone(),
            };
            processes.spawn(&place, config.rank_program.clone(), &failures)?;
        }
        let drain_limit = config.drain_limit;
        Ok(Self { epoch: *number, ranks: processes, failures, drain_limit, ending: None })
    }

    /// Until the ranks have ended; then why.
    async fn run(
        mut self,
        epochs: &mut watch::Receiver<Option<Epoch>>,
        shutdown: &watch::Receiver<bool>,
    ) -> Result<String, WorkerError> {
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut gone_since = None;
        let reason = loop {
            look.tick().await;
            let now = Instant::now();
            match &*epochs.borrow_and_update() {
                Some(other) if other.epoch != self.epoch => {
                    break format!("epoch {} has begun", other.epoch);
                }
                Some(_) => gone_since = None,
                None => gone_since = gone_since.or(Some(now)),
            }
            if *shutdown.borrow() {
                self.end_by(now + self.drain_limit, "this node was told to stop");
            }
            if let Some(reason) = self.failures.describe(Duration::ZERO) {
                self.end_by(now + END_LIMIT, &reason);
            }
            let over = gone_since.is_some_and(|since| now >= since + END_LIMIT);
            if over {
                self.end_by(now, "the leader has ended its epoch");
            }
            if self.ranks.are_over() {
                break self.reason();
            }
            if self.ending.as_ref().is_some_and(|(at, _)| now >= *at) {
                break self.reason();
            }
        };
        // Whoever is left has had its time: it is ended at once.
        let ranks = self.ranks;
        let ended = spawn_blocking(move || drop(ranks)).await;
        ended.map_err(|error| WorkerError::Group(format!("ending ranks: {error}")))?;
        Ok(reason)
    }

    /// The first reason stays, and the earliest time.
    fn end_by(&mut self, at: Instant, reason: &str) {
        match &mut self.ending {
            Some((known, _)) => *known = at.min(*known),
            None => self.ending = Some((at, reason.to_owned())),
        }
    }

    fn reason(&self) -> String {
        self.ending.as_ref().map_or_else(|| "they ended".into(), |(_, reason)| reason.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cluster::EtcdOptions;

    #[test]
    fn an_epoch_of_other_nodes_or_another_program_is_not_served() {
        let options = EtcdOptions::new(vec!["http://127.0.0.1:1".into()], "c");
        let config = |node, nodes| NodeConfig {
            key: GroupKey::new(options.clone(), "g").unwrap(),
            node,
            nodes,
            model: PathBuf::new(),
            version: "1".into(),
            drain_limit: Duration::ZERO,
            rank_program: None,
            tls: None,
        };
        let epoch = |version: &str| Epoch {
            epoch: 4,
            leader: ([127, 0, 0, 1], 1).into(),
            token: String::new(),
            ranks: vec![1, 2, 3],
            version: version.into(),
            tls: false,
        };
        assert_eq!(config(2, 3).ranks(&epoch("1")), Ok(3..6));
        let secret = Epoch { tls: true, ..epoch("1") };
        assert!(config(1, 3).ranks(&secret).unwrap_err().contains("--cluster-cert"));
        assert!(config(1, 2).ranks(&epoch("1")).unwrap_err().contains("the leader has 3 nodes"));
        assert!(config(1, 3).ranks(&epoch("2")).unwrap_err().contains("run the same"));
    }
}
