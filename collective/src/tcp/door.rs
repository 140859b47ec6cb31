//! Rank 0 before the others came: a door that every rank passes once for each of its links.

use super::{
    Tcp,
    hello::{self, Hello},
    link::{self, Link},
    pipe::Pipe,
};
use crate::CollectiveError;
use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    thread,
    time::{Duration, Instant},
};
use tls::{Fault, Reason};

/// Between two attempts to reach a rank 0 that may not be up yet, or looks at an idle listener.
const RETRY: Duration = Duration::from_millis(20);
/// How long one attempt to reach rank 0 may take. The kernel sends its packets again after 1, 2, 4
/// and more seconds: where the network comes back meanwhile, a new attempt is there earlier.
const REACH_LIMIT: Duration = Duration::from_secs(1);
/// How long rank 0 may take to answer whom it has heard, and some others before.
const VERDICT_LIMIT: Duration = Duration::from_secs(5);

/// What the ranks of one group have in common; whoever says otherwise is turned away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupId {
    pub world_size: usize,
    /// Counts the groups that took each other's place: a rank of an earlier one is too late.
    pub epoch: u64,
    /// The group's secret.
    pub token: String,
}

/// Rank 0 before the others came.
pub struct TcpDoor {
    listener: TcpListener,
    group: GroupId,
    tls: Option<tls::Server>,
    /// The last caller that was set up otherwise.
    refused: Option<(SocketAddr, Fault)>,
    /// Of each rank.
    links: usize,
    /// Of each rank from 1 on, its links so far, by number.
    ranks: Vec<Vec<Option<Link>>>,
}

impl TcpDoor {
    pub(super) fn open(
        addr: impl ToSocketAddrs,
        group: GroupId,
        links: usize,
        tls: Option<tls::Server>,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(addr)?;
        listener.set_nonblocking(true)?;
        let ranks = (1..group.world_size).map(|_| (0..links).map(|_| None).collect()).collect();
        Ok(Self { listener, group, tls, refused: None, links, ranks })
    }

    /// Where other ranks connect to.
    ///
    /// # Errors
    /// The system's, if the listener is broken.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// For a door that nobody has been told of.
    pub fn set_epoch(&mut self, epoch: u64) {
        self.group.epoch = epoch;
    }

    /// The ranks that have not come with all of their links.
    pub fn missing(&self) -> Vec<usize> {
        let missing = |(at, links): (usize, &Vec<Option<Link>>)| {
            links.iter().any(Option::is_none).then_some(at + 1)
        };
        self.ranks.iter().enumerate().filter_map(missing).collect()
    }

    /// Lets in who comes within `wait`; true once all ranks are there. Whoever does not belong is
    /// turned away, and so is a second of a rank whose first is still there.
    ///
    /// # Errors
    /// `Device` for a failing listener.
    pub fn admit(&mut self, wait: Duration) -> Result<bool, CollectiveError> {
        let start = Instant::now();
        loop {
            let left = wait.saturating_sub(start.elapsed());
            match self.listener.accept() {
                Ok((stream, peer)) => {
                    self.forget_the_gone();
                    let tls = self.tls.as_ref();
                    // A stranger, or a rank that gave up: the place stays free.
                    match hello::answer(stream, &self.group, &self.ranks, tls) {
                        Ok((rank, number, link)) => self.ranks[rank - 1][number] = Some(link),
                        Err(fault) => {
                            self.refused = fault.map(|fault| (peer, fault)).or(self.refused.take());
                        }
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => thread::sleep(RETRY.min(left)),
                Err(e) => return Err(CollectiveError::Device(format!("accept: {e}"))),
            }
            let complete = self.missing().is_empty();
            if complete || left.is_zero() {
                return Ok(complete);
            }
        }
    }

    /// The last caller since this was asked that speaks TLS where this door does not, or fails in
    /// it, and why.
    pub fn refused(&mut self) -> Option<(SocketAddr, Fault)> {
        self.refused.take()
    }

    /// Another process may take the place of a rank that came and ended.
    fn forget_the_gone(&mut self) {
        for link in self.ranks.iter_mut().flatten() {
            if link.as_ref().is_some_and(Link::is_gone) {
                *link = None;
            }
        }
    }

    /// Rank 0's ends of the links, by number; call it once all ranks are there. Nobody is let in
    /// any more, but as long as the door lasts it can be seen that rank 0 lives.
    ///
    /// # Errors
    /// `Gone` names a rank that is missing.
    pub fn links(&mut self) -> Result<Vec<Tcp>, CollectiveError> {
        let missing = self.missing();
        if let Some(&rank) = missing.first() {
            return Err(CollectiveError::Gone { rank });
        }
        let mut groups: Vec<Vec<Link>> = (0..self.links).map(|_| Vec::new()).collect();
        for rank in self.ranks.drain(..) {
            for (of_group, link) in groups.iter_mut().zip(rank.into_iter().flatten()) {
                of_group.push(link);
            }
        }
        let world_size = self.group.world_size;
        Ok(groups.into_iter().map(|links| Tcp::new(0, world_size, links)).collect())
    }

    /// Waits for all ranks: [`Self::admit`] and [`Self::links`] in one.
    ///
    /// # Errors
    /// `Deadline` names the first rank that did not come; `Device` for a failing listener.
    pub fn accept(mut self, deadline: Duration) -> Result<Vec<Tcp>, CollectiveError> {
        if self.missing().is_empty() || self.admit(deadline)? {
            return self.links();
        }
        let rank = self.missing().first().copied().unwrap_or_default();
        Err(CollectiveError::Deadline { op: "accept", rank, seconds: deadline.as_secs() })
    }
}

/// Joins rank 0 at `addr` as `rank` by link number `link`, trying again until `deadline` while
/// nobody listens there.
pub(super) fn connect(
    addr: &str,
    (rank, link): (usize, usize),
    group: &GroupId,
    tls: Option<&tls::Client>,
    deadline: Duration,
) -> Result<Tcp, CollectiveError> {
    let world_size = group.world_size;
    if rank == 0 || rank >= world_size {
        let detail = format!("rank {rank} cannot join a group of {world_size}");
        return Err(CollectiveError::Mismatch(detail));
    }
    let (start, mut fault) = (Instant::now(), None);
    loop {
        let left = deadline.saturating_sub(start.elapsed());
        if left.is_zero() {
            if let Some(fault) = fault {
                return Err(CollectiveError::Mismatch(format!("rank 0 at {addr}: {fault}")));
            }
            let seconds = deadline.as_secs();
            return Err(CollectiveError::Deadline { op: "connect", rank: 0, seconds });
        }
        if let Some(stream) = link::reach(addr, left.min(REACH_LIMIT)) {
            let left = deadline.saturating_sub(start.elapsed()).min(VERDICT_LIMIT);
            let pipe = match secured(stream, addr, tls, left) {
                Ok(pipe) => pipe,
                // It may be another one's end.
                Err(met) if matches!(met.reason, Reason::Closed | Reason::Deadline) => {
                    fault = Some(met);
                    thread::sleep(RETRY.min(left));
                    continue;
                }
                Err(met) => {
                    return Err(CollectiveError::Mismatch(format!("rank 0 at {addr}: {met}")));
                }
            };
            match hello::introduce(pipe, &Hello { rank, link, group }, left) {
                Ok(link) => return Ok(Tcp::new(rank, world_size, vec![link])),
                // What was said on the way may be lost.
                Err(CollectiveError::Deadline { .. } | CollectiveError::Gone { .. }) => {}
                Err(refused) => return Err(refused),
            }
        }
        thread::sleep(RETRY.min(left));
    }
}

fn secured(
    stream: TcpStream,
    addr: &str,
    tls: Option<&tls::Client>,
    limit: Duration,
) -> Result<Pipe, Fault> {
    match tls {
        Some(tls) => Pipe::dial(stream, addr, tls, limit),
        None => Pipe::plain(stream).map_err(|error| Fault::new(Reason::Closed, error.to_string())),
    }
}
