//! One connection to another rank: frames in order, every wait bounded.

use super::{
    beats::{BEAT, Loss, exchange},
    pipe::Pipe,
};
use crate::CollectiveError;
use std::{
    cell::RefCell,
    io::{self, BufReader, Read, Write},
    net::{Shutdown, TcpStream, ToSocketAddrs},
    time::{Duration, Instant},
};

/// Longest payload of a frame. Plans are kilobytes, gathered logits megabytes.
const PAYLOAD_BYTES_MAX: u64 = 1 << 30;
/// Memory starts at twice this and doubles: a length is believed only as its bytes arrive.
const STRIDE_BYTES: usize = 1 << 20;
const HEADER_BYTES: usize = 16;

/// What a frame belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Broadcast = 1,
    Gather = 2,
    Reduce = 3,
    GatherBytes = 4,
}

impl Kind {
    fn op(self) -> &'static str {
        match self {
            Self::Broadcast => "broadcast",
            Self::Gather => "all_gather_cols",
            Self::Reduce => "all_reduce_sum",
            Self::GatherBytes => "all_gather_bytes",
        }
    }
}

/// A connection to `addr`, or nothing where nobody answers yet.
pub(super) fn reach(addr: &str, limit: Duration) -> Option<TcpStream> {
    let addrs = addr.to_socket_addrs().ok()?;
    addrs.into_iter().find_map(|addr| TcpStream::connect_timeout(&addr, limit).ok())
}

pub(super) struct Link {
    stream: BufReader<Pipe>,
    rank: usize,
    /// The socket's read and write timeout.
    timeout: Duration,
    frame: Vec<u8>,
}

impl Link {
    /// A link to `rank`.
    pub fn new(pipe: Pipe, rank: usize) -> Self {
        let stream = BufReader::with_capacity(1 << 16, pipe);
        Self { stream, rank, timeout: Duration::ZERO, frame: Vec::new() }
    }

    fn socket(&self) -> &TcpStream {
        self.stream.get_ref().socket()
    }

    /// The same link, now known to lead to `rank`.
    pub fn named(self, rank: usize) -> Self {
        Self { rank, ..self }
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The other side sees the end of the stream.
    pub fn close(&self) {
        // It may be gone already, which is as good.
        let _ = self.socket().shutdown(Shutdown::Both);
    }

    /// For [`super::Cut`].
    pub fn handle(&self) -> io::Result<TcpStream> {
        self.socket().try_clone()
    }

    /// Whether the other side has closed its end; only for links on which nothing was read since
    /// they were made.
    pub fn is_gone(&self) -> bool {
        let stream = self.socket();
        let look = || {
            stream.set_nonblocking(true)?;
            let seen = stream.peek(&mut [0]);
            stream.set_nonblocking(false)?;
            seen
        };
        match look() {
            Ok(bytes) => bytes == 0,
            Err(error) => error.kind() != io::ErrorKind::WouldBlock,
        }
    }

    /// Signs of life alone, until the other side gives none for `silence`, or leaves.
    pub fn beat(&mut self, silence: Duration) -> Loss {
        if self.socket().set_write_timeout(Some(BEAT)).is_err() {
            return Loss::Closed;
        }
        let pipe = RefCell::new(self.stream.get_mut());
        let mut heard = [0; 64];
        exchange(
            silence,
            || {
                let mut to = pipe.borrow_mut();
                // Whether it had room does not matter: the next one says the same.
                let _taken = to.write(&[0])?;
                to.flush()
            },
            |wait| {
                let mut from = pipe.borrow_mut();
                from.socket().set_read_timeout(Some(wait))?;
                from.read(&mut heard)
            },
        )
    }

    /// Reads `to.len()` bytes.
    pub fn read(
        &mut self,
        to: &mut [u8],
        (op, start, deadline): (&'static str, Instant, Duration),
    ) -> Result<(), CollectiveError> {
        self.set_timeout(deadline).map_err(|e| self.explain(&e, op, deadline))?;
        let mut done = 0;
        while done < to.len() {
            match self.stream.read(&mut to[done..]) {
                Ok(0) => return Err(CollectiveError::Gone { rank: self.rank }),
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.explain(&e, op, deadline)),
            }
            if done < to.len() && start.elapsed() >= deadline {
                return Err(self.late(op, deadline));
            }
        }
        Ok(())
    }

    /// Writes all of `bytes`.
    pub fn write(
        &mut self,
        bytes: &[u8],
        (op, start, deadline): (&'static str, Instant, Duration),
    ) -> Result<(), CollectiveError> {
        self.set_timeout(deadline).map_err(|e| self.explain(&e, op, deadline))?;
        let mut left = bytes;
        while !left.is_empty() {
            match self.stream.get_mut().write(left) {
                Ok(0) => return Err(CollectiveError::Gone { rank: self.rank }),
                Ok(n) => left = &left[n..],
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.explain(&e, op, deadline)),
            }
            if !left.is_empty() && start.elapsed() >= deadline {
                return Err(self.late(op, deadline));
            }
        }
        while let Err(e) = self.stream.get_mut().flush() {
            if e.kind() != io::ErrorKind::Interrupted {
                return Err(self.explain(&e, op, deadline));
            }
        }
        Ok(())
    }

    /// One frame out.
    pub fn send(
        &mut self,
        (kind, operation): (Kind, u32),
        payload: &[u8],
        deadline: Duration,
    ) -> Result<(), CollectiveError> {
        self.begin(kind, operation, payload.len());
        self.frame.extend_from_slice(payload);
        self.flush(kind, deadline)
    }

    /// One frame of floats out.
    pub fn send_floats(
        &mut self,
        (kind, operation): (Kind, u32),
        payload: &[f32],
        deadline: Duration,
    ) -> Result<(), CollectiveError> {
        self.begin(kind, operation, size_of_val(payload));
        self.frame.extend(payload.iter().flat_map(|x| x.to_le_bytes()));
        self.flush(kind, deadline)
    }

    /// One frame in; `payload` becomes its bytes.
    pub fn receive(
        &mut self,
        (kind, operation): (Kind, u32),
        payload: &mut Vec<u8>,
        deadline: Duration,
    ) -> Result<(), CollectiveError> {
        let wait = (kind.op(), Instant::now(), deadline);
        let mut header = [0; HEADER_BYTES];
        self.read(&mut header, wait)?;
        // Little-endian u32 kind, u32 operation, u64 payload bytes, read as one number.
        let header = u128::from_le_bytes(header);
        let (found, at, len) = (header as u32, (header >> 32) as u32, (header >> 64) as u64);
        if (found, at) != (kind as u32, operation) || len > PAYLOAD_BYTES_MAX {
            let rank = self.rank;
            let detail = format!(
                "rank {rank} sent kind {found}, operation {at}, {len} bytes at {kind:?} {operation}"
            );
            return Err(CollectiveError::Mismatch(detail));
        }
        payload.clear();
        while payload.len() < len as usize {
            let done = payload.len();
            payload.resize((len as usize).min(done.max(STRIDE_BYTES) * 2), 0);
            self.read(&mut payload[done..], wait)?;
        }
        Ok(())
    }

    /// One frame of floats in; `values` becomes them.
    pub fn receive_floats(
        &mut self,
        kind: (Kind, u32),
        values: &mut Vec<f32>,
        deadline: Duration,
    ) -> Result<(), CollectiveError> {
        let mut frame = std::mem::take(&mut self.frame);
        let outcome = self.receive(kind, &mut frame, deadline);
        let (words, rest) = frame.as_chunks::<4>();
        let whole = rest.is_empty();
        values.clear();
        values.extend(words.iter().map(|word| f32::from_le_bytes(*word)));
        self.frame = frame;
        outcome?;
        if !whole {
            let detail = format!("rank {} sent a part of a float", self.rank);
            return Err(CollectiveError::Mismatch(detail));
        }
        Ok(())
    }

    fn begin(&mut self, kind: Kind, operation: u32, len: usize) {
        self.frame.clear();
        self.frame.extend_from_slice(&(kind as u32).to_le_bytes());
        self.frame.extend_from_slice(&operation.to_le_bytes());
        self.frame.extend_from_slice(&(len as u64).to_le_bytes());
    }

    fn flush(&mut self, kind: Kind, deadline: Duration) -> Result<(), CollectiveError> {
        let frame = std::mem::take(&mut self.frame);
        let outcome = self.write(&frame, (kind.op(), Instant::now(), deadline));
        self.frame = frame;
        outcome
    }

    fn set_timeout(&mut self, timeout: Duration) -> io::Result<()> {
        let timeout = timeout.max(Duration::from_millis(1));
        if timeout != self.timeout {
            self.socket().set_read_timeout(Some(timeout))?;
            self.socket().set_write_timeout(Some(timeout))?;
            self.timeout = timeout;
        }
        Ok(())
    }

    fn late(&self, op: &'static str, deadline: Duration) -> CollectiveError {
        CollectiveError::Deadline { op, rank: self.rank, seconds: deadline.as_secs() }
    }

    fn explain(&self, e: &io::Error, op: &'static str, deadline: Duration) -> CollectiveError {
        match e.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => self.late(op, deadline),
            // In TLS 1.3 the other side refuses a certificate after the handshake.
            _ if let Some(fault) = tls::Fault::of(e) => {
                CollectiveError::Mismatch(format!("rank {}: {fault}", self.rank))
            }
            _ => CollectiveError::Gone { rank: self.rank },
        }
    }
}
