//! How a rank joins: it sends its place and the secret, rank 0 accepts or refuses.
//!
//! The hello is `LKSP`, then as little-endian u32: version, rank, world size, number of the link,
//! the epoch's lower and upper half, length of the token; then the token. The verdict is one byte.

use super::{door::GroupId, link::Link, pipe::Pipe};
use crate::CollectiveError;
use std::{
    net::TcpStream,
    time::{Duration, Instant},
};
use tls::{Fault, Reason, TLS_FIRST_BYTE};

const MAGIC: [u8; 4] = *b"LKSP";
/// Changes whenever frames do.
const VERSION: u32 = 2;
const HEADER_BYTES: usize = 32;
const TOKEN_BYTES_MAX: usize = 1024;
/// How long rank 0 listens to one caller: a silent one must not keep the others out.
const CALLER_PATIENCE: Duration = Duration::from_secs(2);
const OP: &str = "hello";

/// The place that a rank claims.
pub(super) struct Hello<'a> {
    pub rank: usize,
    pub link: usize,
    pub group: &'a GroupId,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Welcome = 0,
    Version = 1,
    Token = 2,
    WorldSize = 3,
    Rank = 4,
    Epoch = 5,
}

/// Says hello and waits for the verdict.
pub(super) fn introduce(
    pipe: Pipe,
    hello: &Hello<'_>,
    deadline: Duration,
) -> Result<Link, CollectiveError> {
    let Hello { rank, link: number, group } = *hello;
    let GroupId { world_size, epoch, token } = group;
    if token.len() > TOKEN_BYTES_MAX {
        let detail = format!("a token of {} bytes, at most {TOKEN_BYTES_MAX} go", token.len());
        return Err(CollectiveError::Mismatch(detail));
    }
    let mut link = Link::new(pipe, 0);
    let wait = (OP, Instant::now(), deadline);
    let mut bytes = MAGIC.to_vec();
    for word in [VERSION, rank as u32, *world_size as u32, number as u32] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend_from_slice(&epoch.to_le_bytes());
    bytes.extend_from_slice(&(token.len() as u32).to_le_bytes());
    bytes.extend_from_slice(token.as_bytes());
    link.write(&bytes, wait)?;
    let mut verdict = [0];
    link.read(&mut verdict, wait)?;
    let reason = match verdict[0] {
        v if v == Verdict::Welcome as u8 => return Ok(link),
        v if v == Verdict::Version as u8 => "another version: run the same binary on every rank",
        v if v == Verdict::Token as u8 => "another group's token",
        v if v == Verdict::WorldSize as u8 => "another world size",
        v if v == Verdict::Rank as u8 => "a rank or link that is taken or does not exist",
        v if v == Verdict::Epoch as u8 => "another epoch of the group",
        _ => "something else than a rank listens there",
    };
    Err(CollectiveError::Mismatch(format!("rank 0 turned rank {rank} away: {reason}")))
}

/// What a caller is: a rank that this group still waits for, with its rank and the link's number,
/// or nobody; with a fault where it is to be told that it, or this side, was set up otherwise.
pub(super) fn answer(
    stream: TcpStream,
    group: &GroupId,
    ranks: &[Vec<Option<Link>>],
    tls: Option<&tls::Server>,
) -> Result<(usize, usize, Link), Option<Fault>> {
    let pipe = match tls {
        Some(tls) => Pipe::answer(stream, tls, CALLER_PATIENCE)?,
        None => Pipe::plain(stream).map_err(|_| None)?,
    };
    let mut link = Link::new(pipe, 0);
    let wait = (OP, Instant::now(), CALLER_PATIENCE);
    let mut header = [0; HEADER_BYTES];
    link.read(&mut header, wait).map_err(|_| None)?;
    if header[0] == TLS_FIRST_BYTE {
        let text = "it speaks TLS, which the ranks of this group do not; give this worker \
                    --cluster-cert, --cluster-key and --cluster-ca, or take them from that one";
        return Err(Some(Fault::new(Reason::PlainText, text)));
    }
    let (rank, number, verdict) = judge(&mut link, &header, group, ranks).ok_or(None)?;
    link.write(&[verdict as u8], wait).map_err(|_| None)?;
    if verdict == Verdict::Welcome { Ok((rank, number, link.named(rank))) } else { Err(None) }
}

/// The place that a caller claims, and whether it gets it; `None` for something else than a rank.
fn judge(
    link: &mut Link,
    header: &[u8; HEADER_BYTES],
    group: &GroupId,
    ranks: &[Vec<Option<Link>>],
) -> Option<(usize, usize, Verdict)> {
    let words: Vec<u32> = header.as_chunks().0.iter().map(|w| u32::from_le_bytes(*w)).collect();
    let [magic, version, rank, size, number, low, high, token_len] = words[..] else { return None };
    let (rank, number, token_len) = (rank as usize, number as usize, token_len as usize);
    if magic.to_le_bytes() != MAGIC {
        return None;
    }
    if version != VERSION {
        // What follows is laid out as theirs.
        return Some((rank, number, Verdict::Version));
    }
    if token_len > TOKEN_BYTES_MAX {
        return None;
    }
    let mut theirs = vec![0; token_len];
    link.read(&mut theirs, (OP, Instant::now(), CALLER_PATIENCE)).ok()?;
    let place = rank.checked_sub(1).and_then(|at| ranks.get(at)?.get(number));
    let verdict = if (u64::from(high) << 32 | u64::from(low)) != group.epoch {
        Verdict::Epoch
    } else if !same(group.token.as_bytes(), &theirs) {
        Verdict::Token
    } else if size as usize != group.world_size {
        Verdict::WorldSize
    } else if !place.is_some_and(Option::is_none) {
        Verdict::Rank
    } else {
        Verdict::Welcome
    };
    Some((rank, number, verdict))
}

/// Equality in a time that does not depend on where the two differ.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |d, (a, b)| d | (a ^ b)) == 0
}
