//! A network in memory: addresses, and cables that are cut in either direction, or for good.

use crate::dial::{self, Dial};
use hyper_util::rt::TokioIo;
use std::{
    collections::BTreeMap,
    future::poll_fn,
    io::{self, ErrorKind::ConnectionReset},
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, Waker},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf, duplex},
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
};
use tonic::codegen::{Service, http::Uri};

/// Unread bytes in either direction of a connection.
const BUFFER: usize = 64 << 10;

type Incoming = io::Result<DuplexStream>;

/// Who is at which address.
#[derive(Clone, Default)]
pub struct Net(Arc<Mutex<BTreeMap<String, Port>>>);

#[derive(Clone)]
struct Port {
    accept: UnboundedSender<Incoming>,
    cable: Arc<Cable>,
}

/// All connections to one host.
#[derive(Default)]
pub struct Cable(Mutex<Condition>);

#[derive(Default)]
struct Condition {
    /// What is sent to the host, or by it, does not arrive for now.
    held: (bool, bool),
    broken: bool,
    waiting: Vec<Waker>,
}

impl Cable {
    pub fn hold(&self, to: bool, from: bool) {
        self.change(|condition| condition.held = (to, from));
    }

    pub fn cut(&self) {
        self.change(|condition| condition.broken = true);
    }

    fn change(&self, change: impl FnOnce(&mut Condition)) {
        let mut condition = self.0.lock().unwrap();
        change(&mut condition);
        condition.waiting.drain(..).for_each(Waker::wake);
    }

    /// Whether something may pass; the task hears when that changes.
    fn passes(&self, cx: &Context<'_>, held: fn(&(bool, bool)) -> bool) -> Poll<io::Result<()>> {
        let mut condition = self.0.lock().unwrap();
        if condition.broken {
            return Poll::Ready(Err(ConnectionReset.into()));
        }
        if !condition.waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            condition.waiting.push(cx.waker().clone());
        }
        if held(&condition.held) { Poll::Pending } else { Poll::Ready(Ok(())) }
    }
}

impl Net {
    /// Takes an address over: whoever was there is not reached by new connections.
    pub fn listen(&self, authority: &str) -> (Arc<Cable>, UnboundedReceiver<Incoming>) {
        let (accept, incoming) = unbounded_channel();
        let cable = Arc::<Cable>::default();
        let port = Port { accept, cable: cable.clone() };
        self.0.lock().unwrap().insert(authority.to_owned(), port);
        (cable, incoming)
    }

    pub fn dial(&self, hello: Duration) -> Dial {
        let net = self.clone();
        Box::new(move |instance| {
            let endpoint = dial::endpoint(instance, hello)?;
            Ok(endpoint.connect_with_connector_lazy(Connector(net.clone())))
        })
    }

    async fn connect(self, authority: String) -> io::Result<TokioIo<End>> {
        let port = self.0.lock().unwrap().get(&authority).cloned();
        let Port { accept, cable } = port.ok_or(io::ErrorKind::ConnectionRefused)?;
        poll_fn(|cx| cable.passes(cx, |&(to, from)| to || from)).await?;
        let (stream, theirs) = duplex(BUFFER);
        accept.send(Ok(theirs)).map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Ok(TokioIo::new(End { stream, cable }))
    }
}

#[derive(Clone)]
struct Connector(Net);

impl Service<Uri> for Connector {
    type Response = TokioIo<End>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<TokioIo<End>>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let authority = uri.authority().map(ToString::to_string).unwrap_or_default();
        Box::pin(self.0.clone().connect(authority))
    }
}

/// The router's end of a connection.
struct End {
    stream: DuplexStream,
    cable: Arc<Cable>,
}

impl AsyncRead for End {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.cable.passes(cx, |held| held.1) {
            Poll::Ready(Ok(())) => Pin::new(&mut self.stream).poll_read(cx, buffer),
            other => other,
        }
    }
}

impl AsyncWrite for End {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.cable.passes(cx, |held| held.0) {
            Poll::Ready(Ok(())) => Pin::new(&mut self.stream).poll_write(cx, bytes),
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => Poll::Pending,
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
