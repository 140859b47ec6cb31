//! What the router is told at its start: where to listen, how much to hold, how long to wait.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

/// Where to listen and within which bounds. Port 0 takes any free port.
#[derive(Clone, Debug)]
pub struct RouterConfig {
    /// OpenAI-compatible HTTP, `/health` and `/metrics`; `None` leaves it out.
    pub http: Option<SocketAddr>,
    /// `lockstep.v1.Inference`, health and reflection; `None` leaves it out.
    pub grpc: Option<SocketAddr>,
    /// Origins of web pages that may call the HTTP interface, scheme://host[:port] each or `*` for
    /// all; pages that this machine serves may without being named.
    pub cors_origins: Vec<String>,
    /// With it both ports speak TLS alone.
    pub tls: Option<tls::Server>,
    /// With it workers are reached by TLS alone.
    pub worker_tls: Option<tls::Client>,
    pub limits: Limits,
    pub deadlines: Deadlines,
    /// Further names for models: the alias, then the model's own name.
    pub aliases: BTreeMap<String, String>,
}

impl RouterConfig {
    /// Default limits and deadlines, no foreign web pages, no TLS.
    pub fn new(http: Option<SocketAddr>, grpc: Option<SocketAddr>) -> Self {
        let (limits, deadlines) = (Limits::default(), Deadlines::default());
        let (cors_origins, aliases) = (Vec::new(), BTreeMap::new());
        let (tls, worker_tls) = (None, None);
        Self { http, grpc, cors_origins, tls, worker_tls, limits, deadlines, aliases }
    }
}

/// How much the router holds at once. What is beyond is refused, never piled up.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of one request's body, on HTTP and gRPC.
    pub body_bytes_max: usize,
    /// Choices in flight over all requests, waiting ones included.
    pub in_flight_max: usize,
    /// Choices that wait because every worker's queue is full.
    pub queue_max: usize,
    /// Open connections, on HTTP and on gRPC each.
    pub connections_max: usize,
    /// How often one choice may move to another worker, or back to the same one, after a break.
    pub resumes_max: u32,
    /// How many in a row it may break without anything new between: a request that breaks its
    /// workers must not go through all of them. Twice as many for each reason to doubt that it is
    /// the cause: it has brought tokens before, or other workers break too.
    pub workers_broken_max: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes_max: 4 << 20,
            in_flight_max: 4096,
            queue_max: 1024,
            connections_max: 4096,
            resumes_max: 16,
            workers_broken_max: 2,
        }
    }
}

/// How long each wait may last. None of them ends work that progresses: a worker tells its progress
/// every second, and only its silence counts against it.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// Until a worker has accepted or refused a call.
    pub connect: Duration,
    /// Until a worker has said who it is.
    pub hello: Duration,
    /// Between two signs of life of a worker's process: one that is silent for longer gets nothing
    /// new, and what it has goes elsewhere where there is an elsewhere.
    pub heartbeat: Duration,
    /// Without any message from a worker that runs a sequence.
    pub silence: Duration,
    /// For a worker that takes the request, while those that are ready fail.
    pub open: Duration,
    /// For a ready worker, while the model has none and none loads.
    pub ready: Duration,
    /// For a ready worker, while one loads, or for an answer that has begun.
    pub loading: Duration,
    /// For a place while every worker's queue is full: longer expected waits are refused at once.
    pub queue: Duration,
    /// For a request's first token, and for the whole request, whatever its client says: beyond any
    /// real work, so that nothing waits for ever.
    pub first_token: Duration,
    pub total: Duration,
    /// For the model's tokenizer files.
    pub describe: Duration,
    /// For a connection's first request, for a request's headers, and for the next request on an
    /// idle HTTP/1.1 connection.
    pub headers: Duration,
    /// For a request's body.
    pub body: Duration,
    /// Once the router is told to stop: how long it still takes requests while its health says that
    /// it ends, so that balancers notice before they are refused.
    pub grace: Duration,
    /// For running streams after that.
    pub drain: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            hello: Duration::from_secs(2),
            heartbeat: Duration::from_millis(2500),
            silence: Duration::from_secs(10),
            open: Duration::from_secs(30),
            ready: Duration::from_secs(60),
            loading: Duration::from_secs(600),
            queue: Duration::from_secs(30),
            first_token: Duration::from_secs(1800),
            total: Duration::from_secs(7200),
            describe: Duration::from_secs(60),
            // Longer than clients keep idle connections, so that theirs is the side that closes.
            headers: Duration::from_secs(120),
            body: Duration::from_secs(60),
            grace: Duration::ZERO,
            drain: Duration::from_secs(30),
        }
    }
}
