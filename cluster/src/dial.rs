//! How this process reaches a server: over TCP, with TLS where it has been given what that needs.
//!
//! With it every connection is encrypted, whatever the address says; without it an address with
//! `https://` is refused instead of being reached in clear text.

use std::{
    error::Error,
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use http::Uri;
use hyper_util::{
    client::legacy::connect::{Connected, Connection, HttpConnector},
    rt::TokioIo,
};
use tls::{Fault, Reason};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tower_service::Service;

/// Makes connections, for tonic and for hyper.
#[derive(Clone, Debug)]
pub struct Connector {
    tcp: HttpConnector,
    tls: Option<tls::Client>,
    told: Told,
}

/// When a refusal was last told: whoever waits for an answer often hears only that the connection
/// was closed.
#[derive(Clone, Debug, Default)]
struct Told(Arc<Mutex<Option<Instant>>>);

impl Told {
    fn tell(&self, address: &str, fault: &Fault) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_none_or(|last| last.elapsed() >= TELL_AGAIN) {
            *last = Some(Instant::now());
            let reason = fault.reason.label();
            tracing::warn!(address, reason, "connection refused by the other side: {fault}");
        }
    }
}

impl Connector {
    /// One attempt to connect may take `limit`, over all addresses of a name.
    pub fn new(tls: Option<tls::Client>, limit: Duration) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(limit));
        Self { tcp, tls, told: Told::default() }
    }
}

/// Between two lines about refusals.
const TELL_AGAIN: Duration = Duration::from_secs(10);

type Failure = Box<dyn Error + Send + Sync>;

impl Service<Uri> for Connector {
    type Response = TokioIo<Dialed>;
    type Error = Failure;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Failure>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        self.tcp.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, address: Uri) -> Self::Future {
        let secure = address.scheme_str() == Some("https");
        let host = address.host().unwrap_or_default().to_owned();
        let (authority, told) = (address.authority().map(ToString::to_string), self.told.clone());
        let connecting = self.tcp.call(address);
        let tls = self.tls.clone();
        Box::pin(async move {
            let Some(tls) = tls else {
                if secure {
                    let text = "its address says https://, and this process has nothing to speak \
                                TLS with there; give it a certificate and a CA, or a CA";
                    return Err(Fault::new(Reason::PlainText, text).into());
                }
                return Ok(TokioIo::new(Dialed::Plain(connecting.await?.into_inner())));
            };
            let name = tls.name(&host)?;
            let socket = connecting.await?.into_inner();
            let connected = TlsConnector::from(tls.config()).connect(name, socket).await;
            let stream = connected.map_err(explained)?;
            let address = authority.unwrap_or_default();
            Ok(TokioIo::new(Dialed::Tls(Box::new(Secure { stream, address, told }))))
        })
    }
}

/// What TLS says, in words that tell what to do.
fn explained(error: io::Error) -> io::Error {
    match Fault::of(&error) {
        Some(fault) => io::Error::new(error.kind(), fault),
        None if error.kind() == io::ErrorKind::UnexpectedEof => {
            let text = "it ended the connection in the TLS handshake; does it speak TLS there?";
            io::Error::new(error.kind(), Fault::new(Reason::Closed, text))
        }
        None => error,
    }
}

/// A connection that this process has made.
pub enum Dialed {
    Plain(TcpStream),
    Tls(Box<Secure>),
}

pub struct Secure {
    stream: TlsStream<TcpStream>,
    address: String,
    told: Told,
}

impl Dialed {
    /// Where writing failed: what the other side has said before it closed, if anything.
    fn reason(&mut self, cx: &mut Context<'_>, error: io::Error) -> io::Error {
        let mut byte = [0];
        match Pin::new(self).poll_read(cx, &mut ReadBuf::new(&mut byte)) {
            Poll::Ready(Err(said)) if said.get_ref().is_some_and(|inner| inner.is::<Fault>()) => {
                said
            }
            _ => error,
        }
    }
}

/// Either side of a match, pinned.
macro_rules! either {
    ($self:expr, $stream:ident => $does:expr) => {
        match $self.get_mut() {
            Dialed::Plain($stream) => {
                let $stream = Pin::new($stream);
                $does
            }
            Dialed::Tls($stream) => {
                let $stream = Pin::new(&mut $stream.stream);
                $does
            }
        }
    };
}

impl AsyncRead for Dialed {
    /// In TLS 1.3 a server that refuses this side's certificate says so after the handshake.
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let dialed = self.get_mut();
        let read = ready!(either!(Pin::new(&mut *dialed), stream => stream.poll_read(cx, buffer)));
        Poll::Ready(read.map_err(|error| match (Fault::of(&error), dialed) {
            (Some(fault), Self::Tls(secure)) => {
                secure.told.tell(&secure.address, &fault);
                io::Error::new(error.kind(), fault)
            }
            _ => error,
        }))
    }
}

impl AsyncWrite for Dialed {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let stream = self.get_mut();
        let written =
            ready!(either!(Pin::new(&mut *stream), stream => stream.poll_write(cx, bytes)));
        Poll::Ready(written.map_err(|error| stream.reason(cx, error)))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let stream = self.get_mut();
        let written = ready!(
            either!(Pin::new(&mut *stream), stream => stream.poll_write_vectored(cx, slices))
        );
        Poll::Ready(written.map_err(|error| stream.reason(cx, error)))
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Tls(secure) => secure.stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let stream = self.get_mut();
        let flushed = ready!(either!(Pin::new(&mut *stream), stream => stream.poll_flush(cx)));
        Poll::Ready(flushed.map_err(|error| stream.reason(cx, error)))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_shutdown(cx))
    }
}

/// What hyper's client wants to know.
impl Connection for Dialed {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}
