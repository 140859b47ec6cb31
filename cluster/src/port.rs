//! A port of this process: whether it speaks TLS, and who did not get in.
//!
//! A client that speaks TLS to a plain port, or the other way round, is answered in a way that a
//! person understands, and told in the log; lines of one kind come once in 10 s, with a count.

mod incoming;

use std::{
    fmt,
    io::{self, IoSlice},
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

pub use incoming::incoming;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
};
use tls::{Fault, Reason, TLS_FIRST_BYTE};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

/// From a connection's begin to the end of its handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Between two log lines with the same reason.
const TELL_AGAIN: Duration = Duration::from_secs(10);
const NO_WORD: &str = "it left without a word";
/// How long a refused client may still send, and how much.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: u64 = 64 << 10;
/// For a client that speaks HTTP/1 where TLS is spoken.
const USE_HTTPS: &[u8] = b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-type: \
    text/plain; charset=utf-8\r\ncontent-length: 63\r\n\r\nthis port speaks TLS; write https:// in \
    place of http:// here.\n";

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReasonLabels {
    reason: &'static str,
}

/// Connections that did not come about, by reason.
pub type HandshakeFailures = Family<ReasonLabels, Counter>;

/// What connections to one port have in common.
pub struct Port {
    /// For people.
    name: &'static str,
    tls: Option<tls::Server>,
    failures: HandshakeFailures,
    told: Mutex<[Told; Reason::ALL.len()]>,
}

/// Of one reason.
#[derive(Clone, Copy, Default)]
struct Told {
    last: Option<Instant>,
    /// Since then.
    more: u64,
}

impl Port {
    /// Without `tls` the port is plain.
    pub fn new(name: &'static str, tls: Option<tls::Server>, failures: HandshakeFailures) -> Self {
        // There from the start, so that the first failure is seen as a change.
        for reason in Reason::ALL {
            drop(failures.get_or_create(&ReasonLabels { reason: reason.label() }));
        }
        Self { name, tls, failures, told: Mutex::default() }
    }

    /// Whether clients must speak TLS.
    pub fn is_secure(&self) -> bool {
        self.tls.is_some()
    }

    /// What is read and written on a connection of `peer`, which `wrap` makes the socket of. Within
    /// 10 s; `None` for one that was refused, which has been told.
    pub async fn open<S: AsyncRead + AsyncWrite + Unpin>(
        self: &Arc<Self>,
        socket: TcpStream,
        peer: SocketAddr,
        wrap: impl FnOnce(TcpStream) -> S,
    ) -> Option<Stream<S>> {
        let Some(tls) = &self.tls else {
            let port = Some((self.clone(), peer));
            return Some(Stream::Plain(Plain { inner: wrap(socket), port }));
        };
        let handshake = async {
            let socket = greet(socket).await?;
            let accepting = TlsAcceptor::from(tls.config()).accept(wrap(socket));
            match accepting.into_fallible().await {
                Ok(stream) => Ok(stream),
                Err((error, mut io)) => {
                    linger(&mut io).await;
                    Err(fault(&error))
                }
            }
        };
        let late = || {
            let seconds = HANDSHAKE_LIMIT.as_secs();
            Fault::new(Reason::Deadline, format!("no TLS handshake within {seconds} s"))
        };
        match timeout(HANDSHAKE_LIMIT, handshake).await.unwrap_or_else(|_| Err(late())) {
            Ok(stream) => Some(Stream::Tls(Box::new(stream))),
            // As balancers do, to see whether somebody listens.
            Err(fault) if fault.to_string() == NO_WORD => {
                tracing::debug!(port = self.name, %peer, "connection without a word closed");
                None
            }
            Err(fault) => {
                self.refuse(peer, &fault);
                None
            }
        }
    }

    /// Counts, and tells unless it told of the like a moment ago.
    pub fn refuse(&self, peer: SocketAddr, fault: &Fault) {
        let reason = fault.reason.label();
        self.failures.get_or_create(&ReasonLabels { reason }).inc();
        let at = Reason::ALL.iter().position(|known| *known == fault.reason).unwrap_or_default();
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let Told { last, more } = &mut told[at];
        if last.is_some_and(|last| last.elapsed() < TELL_AGAIN) {
            *more += 1;
            return;
        }
        let more = std::mem::take(more);
        *last = Some(Instant::now());
        drop(told);
        let of = self.name;
        match more {
            0 => tracing::warn!(port = of, %peer, reason, "connection refused: {fault}"),
            _ => tracing::warn!(port = of, %peer, reason, more, "connection refused: {fault}"),
        }
    }
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Port").field("name", &self.name).field("tls", &self.tls).finish()
    }
}

fn fault(error: &io::Error) -> Fault {
    Fault::of(error).unwrap_or_else(|| {
        Fault::new(Reason::Closed, format!("it left in the TLS handshake: {error}"))
    })
}

/// Answers whoever does not speak TLS.
async fn greet(mut socket: TcpStream) -> Result<TcpStream, Fault> {
    let mut first = [0];
    let left = |error: io::Error| Fault::new(Reason::Closed, format!("it left: {error}"));
    match socket.peek(&mut first).await.map_err(left)? {
        0 => return Err(Fault::new(Reason::Closed, NO_WORD)),
        _ if first[0] == TLS_FIRST_BYTE => return Ok(socket),
        _ => {}
    }
    if first[0].is_ascii_alphabetic() {
        // Whoever is gone needs no answer.
        let _sent = socket.write_all(USE_HTTPS).await;
        linger(&mut socket).await;
    }
    Err(Fault::new(
        Reason::PlainText,
        "it does not speak TLS, which this port does; use https:// there, or a client with TLS",
    ))
}

/// Takes what a refused client still sends: closed with unread data, the socket would answer with a
/// reset, and the client might lose what it was told.
async fn linger<S: AsyncRead + AsyncWrite + Unpin>(socket: &mut S) {
    let rest = async {
        socket.shutdown().await?;
        let mut taken = socket.take(LINGER_BYTES);
        tokio::io::copy(&mut taken, &mut tokio::io::sink()).await
    };
    // Whoever still sends by then has been told for long.
    let _passed = timeout(LINGER, rest).await;
}

/// One connection, plain or not.
pub enum Stream<S> {
    Plain(Plain<S>),
    Tls(Box<TlsStream<S>>),
}

impl<S> Stream<S> {
    /// What `wrap` made.
    pub fn socket(&self) -> &S {
        match self {
            Self::Plain(plain) => &plain.inner,
            Self::Tls(stream) => stream.get_ref().0,
        }
    }
}

/// Looks at the first byte: a handshake of TLS is told.
pub struct Plain<S> {
    inner: S,
    /// Until then.
    port: Option<(Arc<Port>, SocketAddr)>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Plain<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(cx, buffer))?;
        if let Some(first) = buffer.filled().get(before)
            && let Some((port, peer)) = self.port.take()
            && *first == TLS_FIRST_BYTE
        {
            let text = "it speaks TLS, which this port does not; use http:// there, or give this \
                        port a certificate";
            port.refuse(peer, &Fault::new(Reason::PlainText, text));
        }
        Poll::Ready(Ok(()))
    }
}

/// Either side of a match, pinned.
macro_rules! either {
    ($self:ident, $stream:ident => $does:expr) => {
        match $self.get_mut() {
            Stream::Plain(Plain { inner: $stream, .. }) => {
                let $stream = Pin::new($stream);
                $does
            }
            Stream::Tls($stream) => {
                let $stream = Pin::new(&mut **$stream);
                $does
            }
        }
    };
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Stream<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(plain) => Pin::new(plain).poll_read(cx, buffer),
            Self::Tls(stream) => Pin::new(&mut **stream).poll_read(cx, buffer),
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Stream<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        either!(self, stream => stream.poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        either!(self, stream => stream.poll_write_vectored(cx, slices))
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(plain) => plain.inner.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_shutdown(cx))
    }
}
