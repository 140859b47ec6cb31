//! Flags of a group whose ranks run on several machines.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, bail};
use clap::Args;
use cluster::GroupKey;
use worker::Nodes;

use crate::serve::ClusterArgs;

/// What LeaderWorkerSet tells a pod of its group.
const LWS_LEADER: &str = "LWS_LEADER_ADDRESS";
const LWS_SIZE: &str = "LWS_GROUP_SIZE";
const LWS_INDEX: &str = "LWS_WORKER_INDEX";

/// The machines of one group.
#[derive(Args, Debug)]
pub struct NodesArgs {
    /// The name of a group whose ranks run on several machines, the same on each of them; they
    /// find each other by --etcd [default: LWS_LEADER_ADDRESS, in a group of LeaderWorkerSet]
    #[arg(long, env = "LOCKSTEP_GROUP")]
    group: Option<String>,
    /// Which of how many machines of the group this is, e.g. 0/2; machine 0 leads and serves
    /// [default: LWS_WORKER_INDEX/LWS_GROUP_SIZE]
    #[arg(long, value_name = "I/M", value_parser = place, env = "LOCKSTEP_NODES")]
    nodes: Option<Place>,
    /// Ranks of each machine, the first's first, e.g. 1,2 [default: the same on each]
    #[arg(long, value_name = "A,B,...", value_delimiter = ',', env = "LOCKSTEP_NODE_RANKS")]
    node_ranks: Vec<usize>,
    /// This machine's address, where ranks of the others come to if it leads; a port may follow
    /// [default: the one by which it reaches etcd]
    #[arg(long, value_name = "HOST", value_parser = listen, env = "LOCKSTEP_RANK_LISTEN")]
    rank_listen: Option<SocketAddr>,
}

/// One machine of so many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    node: usize,
    nodes: usize,
}

/// The machines of a group, and which of them this is.
pub struct Group {
    pub node: usize,
    pub nodes: Nodes,
}

impl NodesArgs {
    /// `None` where the whole group is on this machine.
    pub fn resolve(&self, etcd: &ClusterArgs, ranks: usize) -> Result<Option<Group>> {
        self.resolve_in(|name| std::env::var(name).ok(), etcd, ranks)
    }

    fn resolve_in(
        &self,
        variable: impl Fn(&str) -> Option<String>,
        etcd: &ClusterArgs,
        ranks: usize,
    ) -> Result<Option<Group>> {
        let told = match (variable(LWS_INDEX), variable(LWS_SIZE)) {
            (Some(index), Some(size)) => Some(
                place(&format!("{index}/{size}"))
                    .map_err(|error| anyhow::anyhow!("{LWS_INDEX} and {LWS_SIZE}: {error}"))?,
            ),
            _ => None,
        };
        let Some(Place { node, nodes }) = self.nodes.or(told) else {
            if self.group.is_some() || !self.node_ranks.is_empty() || self.rank_listen.is_some() {
                bail!(
                    "--group, --node-ranks and --rank-listen are for groups over several \
                     machines; say with --nodes I/M which of them this is"
                );
            }
            return Ok(None);
        };
        if nodes == 1 {
            return Ok(None);
        }
        let group = self.group.clone().or_else(|| variable(LWS_LEADER));
        let group = group.context("--nodes needs the group's name: give it with --group")?;
        let Some(options) = etcd.options()? else {
            bail!("the machines of a group find each other by etcd; name it with --etcd");
        };
        let key = GroupKey::new(options, group)?;
        let ranks = self.ranks(nodes, ranks)?;
        let version = env!("LOCKSTEP_VERSION").to_owned();
        let tls = etcd.tls.load()?;
        let nodes = Nodes { key, ranks, listen: self.rank_listen, version, tls };
        Ok(Some(Group { node, nodes }))
    }

    /// Of each machine.
    fn ranks(&self, nodes: usize, ranks: usize) -> Result<Vec<usize>> {
        let given = &self.node_ranks;
        if given.is_empty() && ranks.is_multiple_of(nodes) && ranks > 0 {
            return Ok(vec![ranks / nodes; nodes]);
        }
        if given.is_empty() {
            bail!(
                "{ranks} ranks on {nodes} machines: give --tp a multiple of {nodes}, or say with \
                 --node-ranks how many each has"
            );
        }
        if given.len() != nodes || given.iter().sum::<usize>() != ranks || given.contains(&0) {
            bail!(
                "--node-ranks {given:?} for {nodes} machines and --tp {ranks}: give each machine's \
                 ranks, at least 1, which make --tp together"
            );
        }
        Ok(given.clone())
    }
}

/// `I/M`.
fn place(text: &str) -> Result<Place, String> {
    let wrong = || format!("{text:?} is no machine of a group; write I/M, from 0/M to M-1 of M");
    let (node, nodes) = text.split_once('/').ok_or_else(wrong)?;
    let number = |text: &str| text.parse::<usize>().map_err(|_| wrong());
    let place = Place { node: number(node)?, nodes: number(nodes)? };
    if place.node < place.nodes { Ok(place) } else { Err(wrong()) }
}

/// An address, or an address with a port.
fn listen(text: &str) -> Result<SocketAddr, String> {
    let wrong = || format!("{text:?} is no address; write e.g. 10.0.0.7 or 10.0.0.7:7100");
    let with_port = || text.parse::<IpAddr>().map(|ip| SocketAddr::from((ip, 0)));
    text.parse().or_else(|_| with_port()).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        etcd: ClusterArgs,
        #[command(flatten)]
        nodes: NodesArgs,
    }

    fn resolved(words: &str, lws: &[(&str, &str)], ranks: usize) -> Result<Option<Group>, String> {
        let words = ["x"].into_iter().chain(words.split_whitespace());
        let line = Line::try_parse_from(words).map_err(|error| error.to_string())?;
        let found = |name: &str| lws.iter().find(|(known, _)| *known == name);
        let variable = |name: &str| found(name).map(|(_, value)| (*value).to_owned());
        line.nodes.resolve_in(variable, &line.etcd, ranks).map_err(|error| error.to_string())
    }

    #[test]
    fn machines_share_the_ranks() {
        let at = "--etcd http://127.0.0.1:2379 --group g";
        let group = |words: &str, ranks| {
            let group = resolved(&format!("{at} {words}"), &[], ranks).unwrap().unwrap();
            (group.node, group.nodes.ranks, group.nodes.listen)
        };
        assert_eq!(group("--nodes 1/2", 4), (1, vec![2, 2], None));
        let listen = Some(SocketAddr::from(([10, 0, 0, 7], 0)));
        let uneven = group("--nodes 0/2 --node-ranks 1,2 --rank-listen 10.0.0.7", 3);
        assert_eq!(uneven, (0, vec![1, 2], listen));
        assert!(resolved("", &[], 3).unwrap().is_none());
        assert!(resolved("--nodes 0/1", &[], 3).unwrap().is_none());
    }

    #[test]
    fn a_leader_worker_set_says_where_a_pod_belongs() {
        let lws = [(LWS_LEADER, "q-0.q.ns"), (LWS_SIZE, "2"), (LWS_INDEX, "1")];
        let group = resolved("--etcd http://127.0.0.1:2379", &lws, 2).unwrap().unwrap();
        assert_eq!((group.node, group.nodes.key.id()), (1, "q-0.q.ns"));
        let flags = "--etcd http://127.0.0.1:2379 --group g --nodes 0/3";
        let group = resolved(flags, &lws, 3).unwrap().unwrap();
        assert_eq!((group.node, group.nodes.key.id()), (0, "g"));
        let alone = [(LWS_LEADER, "q-0.q.ns"), (LWS_SIZE, "1"), (LWS_INDEX, "0")];
        assert!(resolved("", &alone, 2).unwrap().is_none());
        let broken = [(LWS_SIZE, "2"), (LWS_INDEX, "2")];
        assert!(resolved("", &broken, 2).err().unwrap().contains(LWS_INDEX));
    }

    #[test]
    fn what_cannot_be_a_group_is_refused_with_the_remedy() {
        let etcd = "--etcd http://127.0.0.1:2379";
        for (words, ranks, part) in [
            ("--group g", 2, "--nodes I/M"),
            ("--nodes 0/2", 2, "--group"),
            ("--nodes 0/2 --group g", 2, "--etcd"),
            (&format!("{etcd} --nodes 0/2 --group g"), 3, "--node-ranks"),
            (&format!("{etcd} --nodes 0/2 --group g --node-ranks 1,1"), 3, "--tp 3"),
            (&format!("{etcd} --nodes 0/2 --group a/b"), 2, "group id"),
            ("--nodes 2/2 --group g", 2, "I/M"),
            ("--nodes 1", 2, "I/M"),
            ("--nodes 0/2 --rank-listen here", 2, "10.0.0.7"),
        ] {
            let error = resolved(words, &[], ranks).err().unwrap_or_else(|| panic!("{words}"));
            assert!(error.contains(part), "{words}: {error}");
        }
    }
}
