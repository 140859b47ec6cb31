//! Connections as they come, for tonic's server.

use std::{io, sync::Arc, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinSet,
    time::sleep,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::{Connected, TcpConnectInfo};

use super::{Port, Stream};

/// Handshakes at once: a caller without a word must not keep others out.
const HANDSHAKES_MAX: usize = 4096;
/// Connections that nobody has taken over yet.
const WAITING_MAX: usize = 64;
/// After a failure to accept, e.g. too many open files.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

type Accepted = io::Result<Stream<TcpStream>>;

/// Connections to `listener`, each once its handshake is done. Listens until the stream is dropped.
/// Must be called within a tokio runtime.
pub fn incoming(listener: TcpListener, port: Port) -> ReceiverStream<Accepted> {
    let (sender, accepted) = mpsc::channel(WAITING_MAX);
    tokio::spawn(accept(listener, Arc::new(port), sender));
    ReceiverStream::new(accepted)
}

async fn accept(listener: TcpListener, port: Arc<Port>, to: mpsc::Sender<Accepted>) {
    let places = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    let mut handshakes = JoinSet::new();
    loop {
        let next = async {
            let place = places.clone().acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            biased;
            () = to.closed() => return,
            Some(_) = handshakes.join_next() => continue,
            next = next => next,
        };
        match (place, accepted) {
            (Ok(place), Ok((socket, peer))) => {
                let (port, to) = (port.clone(), to.clone());
                let handshake = async move {
                    let opened = open(&port, socket, peer).await;
                    hand_over(opened, place, &to).await;
                };
                handshakes.spawn(handshake);
            }
            (_, Err(error)) => {
                tracing::warn!(%error, "cannot accept connections");
                sleep(ACCEPT_AGAIN).await;
            }
            (Err(_), _) => return,
        }
    }
}

async fn open(
    port: &Arc<Port>,
    socket: TcpStream,
    peer: std::net::SocketAddr,
) -> Option<Stream<TcpStream>> {
    if let Err(error) = socket.set_nodelay(true) {
        tracing::debug!(%error, "connection gone before its first byte");
        return None;
    }
    port.open(socket, peer, |socket| socket).await
}

async fn hand_over(
    opened: Option<Stream<TcpStream>>,
    _place: OwnedSemaphorePermit,
    to: &mpsc::Sender<Accepted>,
) {
    if let Some(stream) = opened {
        // Nobody takes connections any more: this one is closed.
        let _ended = to.send(Ok(stream)).await;
    }
}

impl Connected for Stream<TcpStream> {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.socket().connect_info()
    }
}
