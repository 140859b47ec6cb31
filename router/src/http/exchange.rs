//! One request and its answer on a connection: what its reader left of the body is taken, and a
//! client that left ends the work for it.

use super::{
    Server,
    body::{Unread, UntilBroken, hand_over},
    socket::Socket,
};
use crate::record::Client;
use axum::{
    body::{Body, HttpBody},
    response::Response,
};
use http::{HeaderValue, Request, Version, header};
use hyper::{body::Incoming, service::Service};
use hyper_util::service::TowerToHyperService;
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::time::{Instant, sleep, timeout_at};

/// What the requests of one connection have in common.
pub(super) struct Exchange {
    service: TowerToHyperService<axum::Router>,
    socket: Socket,
    client: Client,
    begun: AtomicBool,
    discard_bytes_max: usize,
    body_deadline: Duration,
}

impl Exchange {
    pub fn new(server: &Server, socket: Socket, client: Client) -> Self {
        Self {
            service: TowerToHyperService::new(server.app.clone()),
            socket,
            client,
            begun: AtomicBool::new(false),
            discard_bytes_max: server.discard_bytes_max,
            body_deadline: server.body_deadline,
        }
    }

    /// Returns when no request has come by then; otherwise never.
    pub async fn overdue(&self, limit: Duration) {
        sleep(limit).await;
        if self.begun.load(Relaxed) {
            std::future::pending().await
        }
    }

    /// Errors: the client is gone.
    pub async fn answer(self: Arc<Self>, mut request: Request<Incoming>) -> io::Result<Response> {
        self.begun.store(true, Relaxed);
        request.extensions_mut().insert(self.client);
        let body_until = Instant::now() + self.body_deadline;
        let one = request.version() < Version::HTTP_2;
        let asks_first = one && request.headers().contains_key(header::EXPECT);
        let (head, body) = request.into_parts();
        let (body, back) = hand_over(body);
        let mut response = tokio::select! {
            biased;
            response = self.service.call(Request::from_parts(head, body)) => {
                response.unwrap_or_else(|never| match never {})
            }
            () = self.socket.gone(), if one => {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
        };
        if !one {
            return Ok(response);
        }
        if let Some(unread) = back.and_then(Unread::take) {
            // A client that was not told to go on with its body keeps it.
            let wanted = unread.begun || !asks_first;
            let rest = unread.discard(self.discard_bytes_max);
            if !wanted || !timeout_at(body_until, rest).await.unwrap_or(false) {
                let close = HeaderValue::from_static("close");
                response.headers_mut().insert(header::CONNECTION, close);
            }
        }
        if response.body().size_hint().exact().is_some() {
            return Ok(response);
        }
        let socket = self.socket.clone();
        let kind = response.headers().get(header::CONTENT_TYPE);
        let events = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
        let probes = events.then(|| socket.clone().probes());
        let broken = Box::pin(async move { socket.broken().await });
        Ok(response.map(|body| Body::new(UntilBroken::new(body, broken, probes))))
    }
}
