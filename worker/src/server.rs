//! A worker from start to end: listen, announce, load, serve, drain, leave.

mod task;

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use cluster::{
    Membership, State,
    port::{Port, incoming},
};
use model::Loaded;
use proto::v1::worker_server::WorkerServer;
use task::WorkerTask;
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};
use tonic::{service::Routes, transport::Server};
use tonic_health::server::HealthReporter;

use crate::{
    Engine, Group, GroupConfig, GroupPlan, Metrics, ModelInfo, WorkerError,
    announce::Announcement,
    service::{Service, ServiceState},
};

/// Largest request: a prompt of millions of tokens.
const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// On one connection: a router has one, and must hear of a full queue instead of waiting unseen.
const STREAMS_MAX: u32 = 4096;
/// A peer that answers no ping within these is gone, and its streams with it.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the registry may take to confirm that we left.
const LEAVE_LIMIT: Duration = Duration::from_secs(3);

/// What a worker is made of.
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    pub group: GroupConfig,
    /// Where to listen; port 0 takes any.
    pub listen: SocketAddr,
    /// What routers connect to, e.g. `http://10.0.0.7:7001`. Default: the bound address.
    pub advertise: Option<String>,
    /// The host of that address, where it is not the one listened at.
    pub host: Option<IpAddr>,
    /// The name that clients ask for. Default: the checkpoint's.
    pub model_name: Option<String>,
    /// Requests that wait for a place before others are refused.
    pub waiting_max: usize,
    /// How long running streams may take to finish once shutdown is asked for.
    pub drain_limit: Duration,
    /// With it the port speaks TLS alone.
    pub tls: Option<tls::Server>,
}

impl WorkerConfig {
    /// The defaults for a group: any loopback port without TLS, 256 waiting requests, 30 s of
    /// draining.
    pub fn new(group: GroupConfig) -> Self {
        Self {
            group,
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            advertise: None,
            host: None,
            model_name: None,
            waiting_max: 256,
            drain_limit: Duration::from_secs(30),
            tls: None,
        }
    }
}

/// Starts workers.
pub struct Worker;

impl Worker {
    /// Listens, announces itself as loading, loads the group, and serves. `progress` hears how
    /// far that is. Returns once requests are taken.
    ///
    /// When `shutdown` turns true the worker drains by itself; `WorkerHandle::join` waits for the
    /// end.
    pub async fn start(
        config: WorkerConfig,
        membership: Arc<dyn Membership>,
        mut progress: Box<dyn FnMut(Loaded) + Send>,
        shutdown: watch::Receiver<bool>,
    ) -> Result<WorkerHandle, WorkerError> {
        let (listener, addr) = bind(config.listen).await?;
        let group = config.group.clone();
        let plan = blocking(move || GroupPlan::new(group)).await??;
        let announcement = announce(&config, plan.info(), addr, &*membership).await?;
        let loaded = blocking(move || plan.start(&mut *progress)).await;
        let group = match loaded.and_then(|loaded| loaded) {
            Ok(group) => group,
            Err(error) => {
                announcement.leave(LEAVE_LIMIT).await;
                return Err(error);
            }
        };
        Self::serve(config, group, Listening { listener, addr, announcement }, shutdown).await
    }

    /// As `start`, for a group that runs already: one of the caller's own making, for instance.
    pub async fn start_with(
        config: WorkerConfig,
        group: Group,
        membership: Arc<dyn Membership>,
        shutdown: watch::Receiver<bool>,
    ) -> Result<WorkerHandle, WorkerError> {
        let (listener, addr) = bind(config.listen).await?;
        let announcement = announce(&config, &group.info, addr, &*membership).await?;
        Self::serve(config, group, Listening { listener, addr, announcement }, shutdown).await
    }

    async fn serve(
        config: WorkerConfig,
        group: Group,
        at: Listening,
        shutdown: watch::Receiver<bool>,
    ) -> Result<WorkerHandle, WorkerError> {
        let name = config.model_name.as_deref().unwrap_or(&group.info.name);
        let metrics = Arc::new(Metrics::new(name));
        let bounds = group.info.scheduler_config(config.waiting_max);
        let engine = Engine::start(group.executor, bounds, Arc::clone(&metrics))?;
        let epoch = group.epoch;
        at.announcement.set(State::Ready, epoch.load(Ordering::Relaxed), "");
        let (closing, closed) = watch::channel(false);
        let (drain, drain_asked) = watch::channel(None);
        let shared = Arc::new(ServiceState {
            engine,
            model: group.info,
            metrics,
            instance: at.announcement.instance(),
            draining: AtomicBool::new(false),
            drain,
            drain_limit: config.drain_limit,
            closing: closed.clone(),
            streams: AtomicUsize::new(0),
        });
        let (health, server) = spawn_server(&shared, (at.listener, config.tls), closed).await;
        let task = WorkerTask {
            shared: Arc::clone(&shared),
            announcement: at.announcement,
            health,
            server,
            closing,
            drain_limit: config.drain_limit,
            step_limit: config.group.step_limit,
            epoch,
        };
        let task = tokio::spawn(task.run(shutdown, drain_asked));
        Ok(WorkerHandle { addr: at.addr, shared, task })
    }
}

/// Bound and in the roster.
struct Listening {
    listener: TcpListener,
    addr: SocketAddr,
    announcement: Announcement,
}

async fn bind(addr: SocketAddr) -> Result<(TcpListener, SocketAddr), WorkerError> {
    let failed = |source| WorkerError::Bind { addr, source };
    let listener = TcpListener::bind(addr).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, WorkerError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| WorkerError::Group(format!("loading ended early: {error}")))
}

async fn announce(
    config: &WorkerConfig,
    info: &ModelInfo,
    addr: SocketAddr,
    membership: &dyn Membership,
) -> Result<Announcement, WorkerError> {
    let model = config.model_name.clone().unwrap_or_else(|| info.name.clone());
    let scheme = if config.tls.is_some() { "https" } else { "http" };
    let own = SocketAddr::new(config.host.unwrap_or(addr.ip()), addr.port());
    let address = config.advertise.clone().unwrap_or_else(|| format!("{scheme}://{own}"));
    Announcement::new(membership, addr, (model, address), info).await
}

/// gRPC, health and, by HTTP/1 on the same port, `/metrics`.
async fn spawn_server(
    shared: &Arc<ServiceState>,
    (listener, tls): (TcpListener, Option<tls::Server>),
    mut closed: watch::Receiver<bool>,
) -> (HealthReporter, JoinHandle<Result<(), tonic::transport::Error>>) {
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<WorkerServer<Service>>().await;
    let worker =
        WorkerServer::new(Service(Arc::clone(shared))).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let routes = Routes::new(health_service).add_service(worker);
    let metrics = Arc::clone(&shared.metrics);
    let routes: Routes = routes
        .into_axum_router()
        .route(
            "/metrics",
            get(move |headers: HeaderMap| async move { metrics_page(&metrics, &headers) }),
        )
        .into();
    let port = Port::new("worker", tls, shared.metrics.handshake_failures().clone());
    let server = Server::builder()
        .accept_http1(true)
        .max_concurrent_streams(Some(STREAMS_MAX))
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .add_routes(routes)
        .serve_with_incoming_shutdown(incoming(listener, port), async move {
            // A dropped sender closes as well.
            let _closing = closed.wait_for(|&closing| closing).await;
        });
    (health, tokio::spawn(server))
}

fn metrics_page(metrics: &Metrics, headers: &HeaderMap) -> Response {
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok());
    match metrics.exposition(accept) {
        Ok((kind, text)) => ([(header::CONTENT_TYPE, kind)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// A running worker. Dropping the handle leaves it running until `shutdown`.
pub struct WorkerHandle {
    addr: SocketAddr,
    shared: Arc<ServiceState>,
    task: JoinHandle<Result<(), WorkerError>>,
}

impl WorkerHandle {
    /// The bound address.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// What routers connect to: the advertised address.
    pub fn address(&self) -> String {
        self.shared.instance.borrow().address.clone()
    }

    /// The name that clients ask for.
    pub fn model_name(&self) -> String {
        self.shared.instance.borrow().model.clone()
    }

    pub fn info(&self) -> &ModelInfo {
        &self.shared.model
    }

    /// The figures behind `/metrics` at `addr`.
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// Takes nothing new, lets running streams finish within `limit`, leaves the roster and stops.
    ///
    /// Errors: as `join`; `DrainLimit` when streams had to be cut.
    pub async fn drain(self, limit: Duration) -> Result<(), WorkerError> {
        self.shared.drain.send_replace(Some(limit));
        self.join().await
    }

    /// Waits for the end: in order after `shutdown`, or `Group` when the group is lost and the
    /// process should end.
    pub async fn join(self) -> Result<(), WorkerError> {
        let outcome = self.task.await;
        outcome.map_err(|error| WorkerError::Group(format!("the worker ended early: {error}")))?
    }
}
