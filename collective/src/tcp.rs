//! Ranks that are processes exchange over TCP, rank 0 in the middle.
//!
//! Sums are taken by rank 0 in rank order and sent back, so every rank holds the same bits. Frames
//! say which operation they belong to and how long they are; one that is not the expected one, or
//! longer than its operation allows, ends the group. A failure closes every link, so that the
//! others learn of it at once. Links carry no encryption: a shared secret keeps strangers out, not
//! eavesdroppers.

mod hello;
mod link;

use super::{CollectiveError, HostCollective, take_cols, take_share};
use hello::Hello;
use link::{Kind, Link};
use std::{
    io,
    net::{SocketAddr, TcpListener, ToSocketAddrs},
    thread,
    time::{Duration, Instant},
};

/// Patience of `all_gather_cols` and `all_reduce_sum`.
const DATA_DEADLINE: Duration = Duration::from_secs(30);
/// Between two attempts to reach a rank 0 that may not be up yet, or looks at an idle listener.
const RETRY: Duration = Duration::from_millis(20);

/// Rank 0 before the others came.
pub struct TcpDoor {
    listener: TcpListener,
}

impl TcpDoor {
    /// Where other ranks connect to.
    ///
    /// # Errors
    /// The system's, if the listener is broken.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Waits for ranks `1..world_size` that know `token`. Whoever does not is turned away.
    ///
    /// # Errors
    /// `Deadline` names the first rank that did not come; `Device` for a failing listener.
    pub fn accept(
        self,
        world_size: usize,
        token: &str,
        deadline: Duration,
    ) -> Result<Tcp, CollectiveError> {
        let start = Instant::now();
        let mut links: Vec<Option<Link>> = (1..world_size).map(|_| None).collect();
        while let Some(missing) = links.iter().position(Option::is_none) {
            let left = deadline.saturating_sub(start.elapsed());
            if left.is_zero() {
                let (rank, seconds) = (missing + 1, deadline.as_secs());
                return Err(CollectiveError::Deadline { op: "accept", rank, seconds });
            }
            match self.listener.accept() {
                Ok((stream, _)) => {
                    let taken: Vec<bool> = links.iter().map(Option::is_some).collect();
                    // A stranger, or a rank that gave up: the place stays free.
                    if let Some((rank, link)) =
                        hello::answer(stream, token, world_size, &taken, left)
                    {
                        links[rank - 1] = Some(link);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => thread::sleep(RETRY.min(left)),
                Err(e) => return Err(CollectiveError::Device(format!("accept: {e}"))),
            }
        }
        Ok(Tcp::new(0, world_size, links.into_iter().flatten().collect()))
    }
}

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
    /// Opens rank 0's address; port 0 takes a free one.
    ///
    /// # Errors
    /// The address cannot be bound.
    pub fn listen(addr: impl ToSocketAddrs) -> io::Result<TcpDoor> {
        let listener = TcpListener::bind(addr)?;
        listener.set_nonblocking(true)?;
        Ok(TcpDoor { listener })
    }

    /// Joins rank 0 at `addr`, trying again until `deadline` while nobody listens there.
    ///
    /// # Errors `Mismatch` where rank 0 answers that this rank does not belong; `Deadline` where it
    /// does not.
    pub fn connect(
        addr: &str,
        (rank, world_size): (usize, usize),
        token: &str,
        deadline: Duration,
    ) -> Result<Self, CollectiveError> {
        if rank == 0 || rank >= world_size {
            let detail = format!("rank {rank} cannot join a group of {world_size}");
            return Err(CollectiveError::Mismatch(detail));
        }
        let start = Instant::now();
        loop {
            let left = deadline.saturating_sub(start.elapsed());
            if left.is_zero() {
                let seconds = deadline.as_secs();
                return Err(CollectiveError::Deadline { op: "connect", rank: 0, seconds });
            }
            if let Some(stream) = link::reach(addr, left) {
                let hello = Hello { rank, world_size, token };
                let left = deadline.saturating_sub(start.elapsed());
                let link = hello::introduce(stream, &hello, left)?;
                return Ok(Self::new(rank, world_size, vec![link]));
            }
            thread::sleep(RETRY.min(left));
        }
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
