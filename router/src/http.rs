//! The HTTP/1.1 server: bounded connections, a deadline for headers, a graceful end.

use crate::{RouterError, raised, record::Client};
use hyper::{
    body::Incoming,
    server::conn::http1,
    service::{Service, service_fn},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
};

/// For a request's headers, and for the next request on an idle connection. Longer than clients
/// keep idle connections, so that theirs is the side that closes.
const HEADERS: Duration = Duration::from_secs(120);
/// After a failure to accept, e.g. too many open files.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// Sent bytes that a peer leaves unacknowledged for so long mean that it is gone or stuck.
const UNACKNOWLEDGED: Duration = Duration::from_secs(60);

/// Binds an address, and says which port it became.
pub(crate) async fn bind(address: SocketAddr) -> Result<(TcpListener, SocketAddr), RouterError> {
    let failed = |source| RouterError::Bind { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

/// Sends small messages at once, and notices peers that read no more.
pub(crate) fn tune(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    #[cfg(target_os = "linux")]
    socket2::SockRef::from(stream).set_tcp_user_timeout(Some(UNACKNOWLEDGED))?;
    Ok(())
}

/// Serves until told to drain, then until the last connection ended.
pub(crate) async fn serve(
    listener: TcpListener,
    app: axum::Router,
    connections_max: usize,
    mut drain: watch::Receiver<bool>,
) {
    let places = Arc::new(Semaphore::new(connections_max));
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            () = raised(&mut drain) => break,
            Some(_) = connections.join_next() => {}
            accepted = accept(&listener, &places) => {
                if let Some((stream, client, place)) = accepted {
                    let (app, drain) = (app.clone(), drain.clone());
                    connections.spawn(connection((stream, client), app, drain, place));
                }
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// The next connection, once there is a place for it.
async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> Option<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let place = places.clone().acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((stream, client)) => match tune(&stream) {
            Ok(()) => Some((stream, client, place)),
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

async fn connection(
    (stream, client): (TcpStream, SocketAddr),
    app: axum::Router,
    mut drain: watch::Receiver<bool>,
    _place: OwnedSemaphorePermit,
) {
    let app = TowerToHyperService::new(app);
    let service = service_fn(move |mut request: http::Request<Incoming>| {
        request.extensions_mut().insert(Client(client));
        app.call(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = raised(&mut drain) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended");
    }
}
