//! The server under both APIs: bounded connections, a deadline for each connection's first request
//! and for headers, HTTP/1.1 and HTTP/2, with TLS or in clear text, a graceful end.

mod body;
pub(crate) mod cors;
mod exchange;
mod socket;

use crate::{Deadlines, Limits, RouterError, raised, record::Client};
use cluster::port::{Port, Stream};
use exchange::Exchange;
use hyper::service::service_fn;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use socket::Socket;
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
};

/// After a failure to accept, e.g. too many open files.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// Sent bytes that a peer leaves unacknowledged for so long mean that it is gone or stuck.
const UNACKNOWLEDGED: Duration = Duration::from_secs(60);
/// HTTP/2 pings on a connection, and for the answer to one.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Requests at once on one HTTP/2 connection.
const STREAMS_MAX: u32 = 4096;
/// A body that nobody reads is still taken, up to this many times the limit of bodies: the client
/// gets to read the refusal, and the connection can be used again.
const DISCARD_FACTOR: usize = 16;

/// What is served on one listener, and within which bounds.
pub(crate) struct Server {
    app: axum::Router,
    port: Arc<Port>,
    protocols: auto::Builder<TokioExecutor>,
    connections_max: usize,
    discard_bytes_max: usize,
    headers_deadline: Duration,
    body_deadline: Duration,
}

impl Server {
    /// HTTP/1.1, and HTTP/2 for clients that begin with its preface.
    pub fn http(app: axum::Router, port: Port, limits: &Limits, deadlines: &Deadlines) -> Self {
        let mut protocols = auto::Builder::new(TokioExecutor::new());
        protocols
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(deadlines.headers)
            // A client that shuts down its side after the request still reads the answer;
            // `Socket::gone` tells it from one that left.
            .half_close(true)
            .http2()
            .timer(TokioTimer::new())
            .keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .max_concurrent_streams(STREAMS_MAX);
        Self {
            app,
            port: Arc::new(port),
            protocols,
            connections_max: limits.connections_max,
            discard_bytes_max: limits.body_bytes_max.saturating_mul(DISCARD_FACTOR),
            headers_deadline: deadlines.headers,
            body_deadline: deadlines.body,
        }
    }

    /// HTTP/2 alone, as gRPC speaks it.
    pub fn grpc(app: axum::Router, port: Port, limits: &Limits, deadlines: &Deadlines) -> Self {
        let server = Self::http(app, port, limits, deadlines);
        Self { protocols: server.protocols.http2_only(), ..server }
    }

    /// Serves until told to drain, then until the last connection ended.
    pub async fn serve(self, listener: TcpListener, mut drain: watch::Receiver<bool>) {
        let places = Arc::new(Semaphore::new(self.connections_max));
        let server = Arc::new(self);
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                biased;
                () = raised(&mut drain) => break,
                Some(_) = connections.join_next() => {}
                accepted = accept(&listener, &places) => {
                    if let Some((stream, client, place)) = accepted {
                        let server = server.clone();
                        let connection = server.connection(stream, client, drain.clone(), place);
                        connections.spawn(connection);
                    }
                }
            }
        }
        drop(listener);
        while connections.join_next().await.is_some() {}
    }

    async fn connection(
        self: Arc<Self>,
        stream: TcpStream,
        client: Client,
        mut drain: watch::Receiver<bool>,
        _place: OwnedSemaphorePermit,
    ) {
        let secure = self.port.is_secure();
        let stream = tokio::select! {
            stream = self.port.open(stream, client.0, |tcp| Socket::new(tcp, secure)) => stream,
            () = raised(&mut drain) => return,
        };
        let Some(stream) = stream else { return };
        self.serve_connection(stream, client, drain).await;
    }

    async fn serve_connection(
        self: Arc<Self>,
        stream: Stream<Socket>,
        client: Client,
        mut drain: watch::Receiver<bool>,
    ) {
        let socket = stream.socket().clone();
        let exchange = Arc::new(Exchange::new(&self, socket.clone(), client));
        let begun = exchange.clone();
        let service = service_fn(move |request| exchange.clone().answer(request));
        let connection = self.protocols.serve_connection(TokioIo::new(stream), service);
        let mut connection = std::pin::pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = raised(&mut drain) => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
            () = begun.overdue(self.headers_deadline) => {
                tracing::debug!("connection without a request closed");
                return;
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "connection ended");
        }
        if !*drain.borrow() {
            socket.linger().await;
        }
    }
}

/// Binds an address, and says which port it became.
pub(crate) async fn bind(address: SocketAddr) -> Result<(TcpListener, SocketAddr), RouterError> {
    let failed = |source| RouterError::Bind { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

/// Sends small messages at once, and notices peers that read no more.
fn tune(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    #[cfg(target_os = "linux")]
    socket2::SockRef::from(stream).set_tcp_user_timeout(Some(UNACKNOWLEDGED))?;
    Ok(())
}

/// The next connection, once there is a place for it.
async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> Option<(TcpStream, Client, OwnedSemaphorePermit)> {
    let place = places.clone().acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((stream, client)) => match tune(&stream) {
            Ok(()) => Some((stream, Client(client), place)),
            Err(error) => {
                tracing::debug!(%error, "connection gone before its first byte");
                None
            }
        },
        Err(error) => {
            tracing::warn!(%error, "cannot accept connections");
            tokio::time::sleep(ACCEPT_AGAIN).await;
            None
        }
    }
}
