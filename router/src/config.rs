//! What the router is told at its start: where to listen, how much to hold, how long to wait.

use std::{net::SocketAddr, time::Duration};

/// Where to listen and within which bounds. Port 0 takes any free port.
#[derive(Clone, Debug)]
pub struct RouterConfig {
    /// OpenAI-compatible HTTP, `/health` and `/metrics`; `None` leaves it out.
    pub http: Option<SocketAddr>,
    /// `lockstep.v1.Inference`, health and reflection; `None` leaves it out.
    pub grpc: Option<SocketAddr>,
    pub limits: Limits,
    pub deadlines: Deadlines,
}

impl RouterConfig {
    /// Default limits and deadlines.
    pub fn new(http: Option<SocketAddr>, grpc: Option<SocketAddr>) -> Self {
        Self { http, grpc, limits: Limits::default(), deadlines: Deadlines::default() }
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
    /// Open HTTP connections.
    pub connections_max: usize,
    /// How often one choice may move to another worker, or back to the same one, after a break.
    pub resumes_max: u32,
    /// How often in a row without anything new between: a request that breaks its workers must not
    /// go through all of them.
    pub barren_resumes_max: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes_max: 4 << 20,
            in_flight_max: 4096,
            queue_max: 1024,
            connections_max: 4096,
            resumes_max: 16,
            barren_resumes_max: 1,
        }
    }
}

/// How long each wait may last. None of them ends work that progresses: a worker tells its progress
/// every second, and only its silence counts against it.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// Until a worker has accepted or refused a call.
    pub connect: Duration,
    /// Without any message from a worker that runs a sequence.
    pub silence: Duration,
    /// For a worker that takes the request, while those that are ready fail.
    pub open: Duration,
    /// For a ready worker, while the model has none and none loads.
    pub ready: Duration,
    /// For a ready worker, while one loads.
    pub loading: Duration,
    /// For a place while every worker's queue is full: longer expected waits are refused at once.
    pub queue: Duration,
    /// For the model's tokenizer files.
    pub describe: Duration,
    /// For a request's body.
    pub body: Duration,
    /// For running streams once the router is told to stop.
    pub drain: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            silence: Duration::from_secs(10),
            open: Duration::from_secs(30),
            ready: Duration::from_secs(10),
            loading: Duration::from_secs(600),
            queue: Duration::from_secs(30),
            describe: Duration::from_secs(60),
            body: Duration::from_secs(60),
            drain: Duration::from_secs(30),
        }
    }
}
