//! Ranks that are processes exchange over TCP, rank 0 in the middle.
//!
//! Sums are taken by rank 0 in rank order and sent back, so every rank holds the same bits. Frames
//! say which operation they belong to and how long they are; one that is not the expected one, or
//! longer than its operation allows, ends the group. A failure closes every link, so that the
//! others learn of it at once. A shared secret keeps strangers out; against eavesdroppers, and on
//! networks where secrets can be overheard, all links of a group can be TLS.

mod beats;
mod door;
mod hello;
mod link;
mod pipe;

use super::{CollectiveError, HostCollective, take_cols, take_share};
pub use beats::{Beats, Cut, Loss};
pub use door::{GroupId, TcpDoor};
use link::{Kind, Link};
use std::{io, net::ToSocketAddrs, time::Duration};

/// Patience of `all_gather_cols` and `all_reduce_sum`.
const DATA_DEADLINE: Duration = Duration::from_secs(30);

/// One rank of a group of processes.
pub struct Tcp {
    rank: usize,
    world_size: usize,
    /// Rank 0: to ranks 1, 2 …; others: to rank 0.
    links: Vec<Link>,
    /// Operations begun.
    operation: u32,
    data_deadline: Duration,
    failed: Option<CollectiveError>,
    share: Vec<f32>,
}

impl Tcp {
    /// Opens rank 0's address for a group whose ranks are joined by so many links each; port 0
    /// takes a free one. With `tls` they speak that alone.
    ///
    /// # Errors
    /// The address cannot be bound.
    pub fn listen(
        addr: impl ToSocketAddrs,
        group: GroupId,
        links: usize,
        tls: Option<tls::Server>,
    ) -> io::Result<TcpDoor> {
        TcpDoor::open(addr, group, links, tls)
    }

    /// Joins rank 0 at `addr` as `rank`, by the link of that number, trying again until `deadline`
    /// while nobody listens there.
    ///
    /// # Errors
    /// `Mismatch` where rank 0 answers that this rank does not belong, or one of the two does not
    /// trust the other's certificate; `Deadline` where it does not answer.
    pub fn connect(
        addr: &str,
        (rank, link): (usize, usize),
        group: &GroupId,
        tls: Option<&tls::Client>,
        deadline: Duration,
    ) -> Result<Self, CollectiveError> {
        door::connect(addr, (rank, link), group, tls, deadline)
    }

    fn new(rank: usize, world_size: usize, links: Vec<Link>) -> Self {
        let (data_deadline, share) = (DATA_DEADLINE, Vec::new());
        Self { rank, world_size, links, operation: 0, data_deadline, failed: None, share }
    }

    /// The longest wait for another rank's data; 30 s unless set.
    pub fn set_data_deadline(&mut self, deadline: Duration) {
        self.data_deadline = deadline;
    }

    /// Runs one operation; a failure is this rank's last.
    fn operate(
        &mut self,
        run: impl FnOnce(&mut Self, u32) -> Result<(), CollectiveError>,
    ) -> Result<(), CollectiveError> {
        if let Some(failed) = &self.failed {
            return Err(failed.clone());
        }
        self.operation = self.operation.wrapping_add(1);
        let outcome = run(self, self.operation);
        if let Err(error) = &outcome {
            self.failed = Some(error.clone());
            self.links.iter().for_each(Link::close);
        }
        outcome
    }
}

impl HostCollective for Tcp {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn broadcast(
        &mut self,
        bytes: &mut Vec<u8>,
        deadline: Duration,
    ) -> Result<(), CollectiveError> {
        if self.world_size == 1 {
            return Ok(());
        }
        self.operate(|group, operation| {
            let kind = (Kind::Broadcast, operation);
            if group.rank == 0 {
                return group.links.iter_mut().try_for_each(|l| l.send(kind, bytes, deadline));
            }
            group.links[0].receive(kind, bytes, deadline)
        })
    }

    fn all_gather_cols(
        &mut self,
        mine: &[f32],
        cols: &[usize],
        all: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let ranks = self.world_size;
        if ranks == 1 {
            return take_cols(all, mine, cols, (0, ranks));
        }
        self.operate(|group, operation| {
            let (kind, deadline) = ((Kind::Gather, operation), group.data_deadline);
            if group.rank > 0 {
                group.links[0].send_floats(kind, mine, deadline)?;
                group.links[0].receive_floats(kind, &mut group.share, deadline)?;
                return take_share(all, &group.share, 0, true);
            }
            take_cols(all, mine, cols, (0, ranks))?;
            for link in &mut group.links {
                link.receive_floats(kind, &mut group.share, deadline)?;
                take_cols(all, &group.share, cols, (link.rank(), ranks))?;
            }
            group.links.iter_mut().try_for_each(|link| link.send_floats(kind, all, deadline))
        })
    }

    fn all_reduce_sum(&mut self, values: &mut [f32]) -> Result<(), CollectiveError> {
        if self.world_size == 1 {
            return Ok(());
        }
        self.operate(|group, operation| {
            let (kind, deadline) = ((Kind::Reduce, operation), group.data_deadline);
            if group.rank > 0 {
                group.links[0].send_floats(kind, values, deadline)?;
                group.links[0].receive_floats(kind, &mut group.share, deadline)?;
                return take_share(values, &group.share, 0, true);
            }
            for link in &mut group.links {
                link.receive_floats(kind, &mut group.share, deadline)?;
                take_share(values, &group.share, link.rank(), false)?;
            }
            group.links.iter_mut().try_for_each(|link| link.send_floats(kind, values, deadline))
        })
    }

    fn all_gather_bytes(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let mut all = vec![mine.to_vec(); self.world_size];
        if self.world_size == 1 {
            return Ok(all);
        }
        self.operate(|group, operation| {
            let (kind, deadline) = ((Kind::GatherBytes, operation), group.data_deadline);
            // Rank 0 sends every rank's, one frame each.
            let ranks = &mut all[..];
            if group.rank > 0 {
                let link = &mut group.links[0];
                link.send(kind, mine, deadline)?;
                return ranks.iter_mut().try_for_each(|to| link.receive(kind, to, deadline));
            }
            for link in &mut group.links {
                link.receive(kind, &mut ranks[link.rank()], deadline)?;
            }
            let send =
                |link: &mut Link| ranks.iter().try_for_each(|of| link.send(kind, of, deadline));
            group.links.iter_mut().try_for_each(send)
        })?;
        Ok(all)
    }
}
