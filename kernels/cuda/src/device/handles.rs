//! File descriptors on their way from one process to another of the same user on this machine.
//!
//! What is offered has a random number. A thread of the offering process hands a descriptor to
//! whoever asks for a number on the process's socket (in the abstract namespace, so that no file is
//! left behind) and runs under the same user. Within a process nothing is sent.

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg, sockopt::socket_peercred,
};
use std::{
    collections::HashMap,
    io::{self, IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
    process,
    sync::{Mutex, OnceLock, PoisonError},
    thread,
    time::Duration,
};

/// How long each side waits for the other.
const PATIENCE: Duration = Duration::from_secs(5);
/// Of a device's place in the machine.
const BUS_ID_BYTES_MAX: usize = 64;

/// What a descriptor is of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct About {
    /// All of the memory.
    pub bytes: u64,
    /// The device that it is on, by its place in the machine.
    pub bus_id: String,
}

impl About {
    fn to_bytes(&self) -> Vec<u8> {
        [&self.bytes.to_le_bytes()[..], self.bus_id.as_bytes()].concat()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (number, bus_id) = bytes.split_first_chunk::<8>()?;
        let bus_id = String::from_utf8(bus_id.to_vec()).ok()?;
        Some(Self { bytes: u64::from_le_bytes(*number), bus_id })
    }
}

/// What is offered by this process, by number.
static OFFERS: Mutex<Option<HashMap<u64, (OwnedFd, About)>>> = Mutex::new(None);

/// An offer; it ends when this is dropped.
pub(super) struct Ticket(u64);

impl Ticket {
    /// What [`fetch`] takes: the process and the number.
    pub fn bytes(&self) -> Vec<u8> {
        [u64::from(process::id()).to_le_bytes(), self.0.to_le_bytes()].concat()
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut offers = OFFERS.lock().unwrap_or_else(PoisonError::into_inner);
        offers.as_mut().and_then(|offers| offers.remove(&self.0));
    }
}

/// Offers `file` to processes of this user.
pub(super) fn offer(file: OwnedFd, about: About) -> Result<Ticket, String> {
    static SERVED: OnceLock<Result<(), String>> = OnceLock::new();
    SERVED.get_or_init(|| serve().map_err(|e| format!("offering memory to ranks: {e}"))).clone()?;
    let mut number = [0; 8];
    rustix::rand::getrandom(&mut number, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| format!("drawing a number: {error}"))?;
    let number = u64::from_le_bytes(number);
    let mut offers = OFFERS.lock().unwrap_or_else(PoisonError::into_inner);
    offers.get_or_insert_default().insert(number, (file, about));
    Ok(Ticket(number))
}

/// What `ticket` stands for.
pub(super) fn fetch(ticket: &[u8]) -> Result<(OwnedFd, About), String> {
    let halves = ticket.as_chunks::<8>();
    let ([process, number], []) = halves else {
        return Err(format!("a ticket of {} bytes for memory", ticket.len()));
    };
    let (process, number) = (u64::from_le_bytes(*process), u64::from_le_bytes(*number));
    let failed = |error: io::Error| format!("memory of process {process}: {error}");
    if process == u64::from(process::id()) {
        return offered(number).map_err(failed);
    }
    ask(process, number).map_err(failed)
}

/// A second descriptor of what this process offers.
fn offered(number: u64) -> io::Result<(OwnedFd, About)> {
    let offers = OFFERS.lock().unwrap_or_else(PoisonError::into_inner);
    let offer = offers.as_ref().and_then(|offers| offers.get(&number));
    let (file, about) = offer.ok_or_else(|| io::Error::other("it is gone"))?;
    Ok((file.try_clone()?, about.clone()))
}

fn address(process: u64) -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(format!("lockstep-memory-{process}"))
}

fn serve() -> io::Result<()> {
    let listener = UnixListener::bind_addr(&address(u64::from(process::id()))?)?;
    let body = move || {
        for stream in listener.incoming() {
            // Whoever asks wrongly, or is gone, waits for nothing.
            let _answered = stream.and_then(|stream| answer(&stream));
        }
    };
    thread::Builder::new().name("handles".into()).spawn(body).map(drop)
}

fn bounded(stream: &UnixStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))
}

fn answer(mut stream: &UnixStream) -> io::Result<()> {
    bounded(stream)?;
    if socket_peercred(stream)?.uid != rustix::process::geteuid() {
        return Err(io::Error::other("another user"));
    }
    let mut number = [0; 8];
    stream.read_exact(&mut number)?;
    let (file, about) = offered(u64::from_le_bytes(number))?;
    let files = [file.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    beside.push(SendAncillaryMessage::ScmRights(&files));
    sendmsg(stream, &[IoSlice::new(&about.to_bytes())], &mut beside, SendFlags::empty())?;
    Ok(())
}

fn ask(process: u64, number: u64) -> io::Result<(OwnedFd, About)> {
    let mut stream = UnixStream::connect_addr(&address(process)?)?;
    bounded(&stream)?;
    stream.write_all(&number.to_le_bytes())?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; 8 + BUS_ID_BYTES_MAX];
    let to = &mut [IoSliceMut::new(&mut bytes)];
    let got = recvmsg(&stream, to, &mut beside, RecvFlags::CMSG_CLOEXEC)?.bytes;
    let files = beside.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    let about = About::from_bytes(&bytes[..got]);
    files.flatten().next().zip(about).ok_or_else(|| io::Error::other("it is gone"))
}
