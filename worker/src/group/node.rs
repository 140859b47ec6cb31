//! A machine that has ranks of a group and does not lead it: starts them, and tells them of each
//! epoch that a leader opens.
//!
//! Ranks find by themselves that their leader is gone, and keep what they have loaded for the next.
//! A rank that has ended is started again, later each time; one that is stopped does not say that
//! it has heard of an epoch, and is ended.

use std::{ops::Range, path::PathBuf, time::Duration};

use cluster::{Epoch, GroupKey};
use tokio::{
    sync::watch,
    task::spawn_blocking,
    time::{Instant, MissedTickBehavior, interval},
};

use super::{
    failures::RankFailures,
    nodes::ranks_of,
    place::Place,
    process::TELL_AGAIN,
    rank_process::{RankProcesses, Shared, Spawning},
};
use crate::WorkerError;

/// Between two looks at the ranks.
const LOOK: Duration = Duration::from_millis(100);
/// Before ranks that ended are started again, unless another epoch begins.
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
    let mut epochs = config.key.follow();
    let mut node = Node::new(&config);
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut leaderless = Instant::now();
    loop {
        look.tick().await;
        if epochs.has_changed().is_err() {
            return Err(WorkerError::Group("nobody follows the group's key any more".into()));
        }
        let epoch = epochs.borrow_and_update().clone();
        if epoch.is_some() {
            leaderless = Instant::now();
        } else if leaderless.elapsed() >= TELL_AGAIN {
            leaderless = Instant::now();
            tracing::info!(group = config.key.id(), "waiting for the group's leader");
        }
        let stops = *shutdown.borrow();
        match blocking(node, move |node| node.look(epoch, stops)).await? {
            Some(going) => node = going,
            None => return Ok(()),
        }
    }
}

/// Processes are started, told and ended by calls that may take a moment.
async fn blocking(
    mut node: Node,
    work: impl FnOnce(&mut Node) -> bool + Send + 'static,
) -> Result<Option<Node>, WorkerError> {
    let done = spawn_blocking(move || {
        let goes_on = work(&mut node);
        goes_on.then_some(node)
    });
    done.await.map_err(|error| WorkerError::Group(format!("looking at ranks: {error}")))
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

/// The ranks of this machine.
struct Node {
    config: NodeConfig,
    processes: Shared,
    failures: RankFailures,
    /// The epoch that the ranks were last told of.
    told: Option<u64>,
    /// Which ranks run, of how many.
    ranks: (Range<usize>, usize),
    /// Before ranks that ended are started again, and until when.
    pause: Duration,
    paused_until: Instant,
    /// When what is left will be ended.
    ending: Option<Instant>,
}

impl Node {
    fn new(config: &NodeConfig) -> Self {
        Self {
            config: config.clone(),
            processes: Shared::default(),
            failures: RankFailures::default(),
            told: None,
            ranks: (0..0, 0),
            pause: PAUSE_MIN,
            paused_until: Instant::now(),
            ending: None,
        }
    }

    /// Brings the ranks to where they belong; false once nothing is left to do.
    fn look(&mut self, epoch: Option<Epoch>, stops: bool) -> bool {
        let now = Instant::now();
        self.processes.with(RankProcesses::end_deaf);
        let running = self.processes.with(|processes| processes.running());
        if stops {
            // Their leader may drain, and tells them its end.
            let until = *self.ending.get_or_insert(now + self.config.drain_limit);
            return !running.is_empty() && now < until;
        }
        self.note_ended(now);
        let Some(epoch) = epoch else { return true };
        let news = self.told != Some(epoch.epoch);
        let ranks = match self.config.ranks(&epoch) {
            Ok(ranks) => ranks,
            Err(reason) => {
                if news {
                    let group = self.config.key.id();
                    tracing::error!(group, reason, "this node does not join its group");
                    (self.told, self.processes) = (Some(epoch.epoch), Shared::default());
                }
                return true;
            }
        };
        // The next leader's are started at once.
        let missing = ranks.clone().any(|rank| !running.contains(&rank));
        if news || (missing && now >= self.paused_until) {
            self.bring(&epoch, ranks, news);
        }
        true
    }

    /// Says why ranks have ended, and has the next ones wait.
    fn note_ended(&mut self, now: Instant) {
        let Some(reason) = self.failures.describe(Duration::ZERO) else { return };
        self.failures.clear();
        let (group, seconds) = (self.config.key.id(), self.pause.as_secs());
        tracing::warn!(group, reason, seconds, "ranks of this node have ended");
        self.rest(now);
    }

    fn rest(&mut self, now: Instant) {
        self.paused_until = now + self.pause;
        self.pause = (self.pause * 2).min(PAUSE_MAX);
    }

    /// Tells the ranks of `epoch`, and starts those that do not run.
    fn bring(&mut self, epoch: &Epoch, ranks: Range<usize>, news: bool) {
        let Epoch { epoch: number, leader, token, ranks: all, .. } = epoch;
        let group = self.config.key.id();
        if news {
            tracing::info!(group, epoch = number, %leader, ?ranks, "bringing this node's ranks");
            self.pause = PAUSE_MIN;
        }
        let world_size = all.iter().sum();
        if self.ranks != (ranks.clone(), world_size) {
            // Others than before.
            (self.ranks, self.processes) = ((ranks.clone(), world_size), Shared::default());
        }
        let place = Place { epoch: *number, leader: *leader, token: token.clone() };
        let spawning = Spawning {
            world_size,
            model: Some(self.config.model.clone()),
            program: self.config.rank_program.clone(),
            tls: self.config.tls.clone(),
            failures: self.failures.clone(),
        };
        self.told = Some(*number);
        let brought = self.processes.with(|processes| {
            ranks.into_iter().try_for_each(|rank| processes.bring(rank, &place, &spawning))
        });
        if let Err(error) = brought {
            tracing::error!(group, %error, "a rank of this node cannot be started");
            self.rest(Instant::now());
        }
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
        let secret = Epoch { tls: true, ..epoch("1") };
        assert!(config(1, 3).ranks(&secret).unwrap_err().contains("--cluster-cert"));
        assert_eq!(config(2, 3).ranks(&epoch("1")), Ok(3..6));
        assert!(config(1, 2).ranks(&epoch("1")).unwrap_err().contains("the leader has 3 nodes"));
        assert!(config(1, 3).ranks(&epoch("2")).unwrap_err().contains("run the same"));
    }
}
