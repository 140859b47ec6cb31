//! A group whose ranks run on several machines, as its leader sees it.

use std::{net::SocketAddr, ops::Range};

use cluster::{Epoch, GroupKey, Reign};
use tokio::runtime::Handle;

use super::{Device, GroupConfig, RankMode};
use crate::WorkerError;

/// The machines of a group; this one, the first, leads.
#[derive(Clone, Debug)]
pub struct Nodes {
    /// Where the others learn of the leader.
    pub key: GroupKey,
    /// Ranks of each machine.
    pub ranks: Vec<usize>,
    /// Where to wait for ranks; port 0 takes any. Default: the address by which etcd is reached.
    pub listen: Option<SocketAddr>,
    /// Of this program: other nodes must have the same.
    pub version: String,
    /// With it all links between ranks are TLS.
    pub tls: Option<tls::Cluster>,
}

/// The ranks of machine `node`.
pub(super) fn ranks_of(ranks: &[usize], node: usize) -> Range<usize> {
    let first = ranks[..node].iter().sum();
    first..first + ranks[node]
}

impl Nodes {
    /// Refuses what cannot be a group.
    pub(super) fn check(&self, config: &GroupConfig) -> Result<(), WorkerError> {
        let wrong = |text: String| Err(WorkerError::Config(text));
        let (ranks, sum) = (&self.ranks, self.ranks.iter().sum::<usize>());
        if ranks.is_empty() || ranks.contains(&0) || sum != config.ranks {
            return wrong(format!(
                "{} ranks on nodes with {ranks:?}: each node has at least one, and together they \
                 have all",
                config.ranks
            ));
        }
        if config.rank_mode != RankMode::Processes {
            return wrong("ranks of several nodes are processes".into());
        }
        if config.device != Device::Cpu {
            return wrong("--group is for ranks on the CPU so far; leave --device out".into());
        }
        match self.listen {
            Some(listen) if listen.ip().is_unspecified() => wrong(format!(
                "--rank-listen {listen} is no address to connect to; give this machine's own"
            )),
            _ => Ok(()),
        }
    }

    /// Where to wait for ranks.
    pub(super) fn door(&self) -> Result<SocketAddr, WorkerError> {
        match self.listen {
            Some(listen) => Ok(listen),
            None => Ok(SocketAddr::from((self.key.local_address()?, 0))),
        }
    }

    /// Opens the next epoch of the group, with ranks waited for at `leader`. `told` gets its number
    /// before others can read it. Blocks; to be called within a tokio runtime.
    pub(super) fn lead(
        &self,
        (leader, token): (SocketAddr, String),
        told: impl FnMut(u64),
    ) -> Result<Reign, WorkerError> {
        let runtime = Handle::try_current()
            .map_err(|error| WorkerError::Config(format!("a group over several nodes: {error}")))?;
        let (ranks, version) = (self.ranks.clone(), self.version.clone());
        let tls = self.tls.is_some();
        let offer = Epoch { epoch: 0, leader, token, ranks, version, tls };
        let reign = runtime.block_on(self.key.lead(offer, told))?;
        let (group, epoch) = (self.key.id(), reign.epoch);
        tracing::info!(group, epoch, %leader, "waiting for the ranks of all nodes");
        Ok(reign)
    }

    /// For people: whose ranks these are.
    pub(super) fn named(&self, ranks: &[usize]) -> String {
        let nodes = (0..self.ranks.len()).filter_map(|node| {
            let of_node = ranks_of(&self.ranks, node);
            let missing: Vec<_> = ranks.iter().filter(|rank| of_node.contains(rank)).collect();
            (!missing.is_empty()).then(|| format!("node {node} (ranks {missing:?})"))
        });
        nodes.collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cluster::EtcdOptions;

    fn nodes(ranks: &[usize]) -> Nodes {
        let options = EtcdOptions::new(vec!["http://127.0.0.1:1".into()], "c");
        let key = GroupKey::new(options, "g").unwrap();
        Nodes { key, ranks: ranks.into(), listen: None, version: String::new(), tls: None }
    }

    #[test]
    fn missing_ranks_are_told_by_node() {
        let nodes = nodes(&[2, 1, 3]);
        assert_eq!(nodes.named(&[1, 3, 5]), "node 0 (ranks [1]), node 2 (ranks [3, 5])");
        assert_eq!(ranks_of(&nodes.ranks, 2), 3..6);
    }

    #[test]
    fn nodes_that_do_not_fit_are_refused() {
        let config =
            |ranks| GroupConfig { ranks, rank_mode: RankMode::Processes, ..GroupConfig::new("x") };
        assert!(nodes(&[1, 2]).check(&config(3)).is_ok());
        for (shares, ranks) in [(&[1, 2][..], 4), (&[3, 0], 3), (&[], 0)] {
            assert!(nodes(shares).check(&config(ranks)).is_err(), "{shares:?}");
        }
        let threads = GroupConfig { rank_mode: RankMode::Threads, ..config(3) };
        assert!(nodes(&[1, 2]).check(&threads).is_err());
        let everywhere = Nodes { listen: Some(([0, 0, 0, 0], 0).into()), ..nodes(&[1, 2]) };
        let error = everywhere.check(&config(3)).unwrap_err().to_string();
        assert!(error.contains("--rank-listen"), "{error}");
    }
}
