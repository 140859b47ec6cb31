//! Start, run and end of a router.

use crate::{
    RouterConfig, RouterError, RouterState,
    aliases::Aliases,
    config::Deadlines,
    dial, grpc,
    http::{self, Server},
    metrics::Metrics,
    openai,
    policy::PrefixAffinity,
    raised,
    record::{Door, recorded},
    service::Service,
    targets::Targets,
    upstream::Upstream,
};
use axum::middleware;
use cluster::{Membership, port::Port};
use proto::v1::inference_server::{InferenceServer, SERVICE_NAME};
use std::{
    net::SocketAddr,
    sync::{Arc, atomic::AtomicUsize},
    time::Duration,
};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep, timeout},
};
use tonic::service::Routes;
use tonic_health::{ServingStatus, server::HealthReporter};

/// For last bytes to leave, once nothing runs any more.
const LINGER: Duration = Duration::from_millis(500);
/// Between two looks at whether anything still runs.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// The front of a cluster.
pub struct Router;

/// A running router.
pub struct RouterHandle {
    http: Option<SocketAddr>,
    grpc: Option<SocketAddr>,
    shared: Arc<RouterState>,
    task: JoinHandle<()>,
}

impl Router {
    /// Listens and serves until `shutdown` is true, or its sender is gone. Workers come from the
    /// membership's roster; none needs to be there yet. Errors: an address that cannot be bound.
    pub async fn start(
        config: RouterConfig,
        membership: Arc<dyn Membership>,
        shutdown: watch::Receiver<bool>,
    ) -> Result<RouterHandle, RouterError> {
        let http = bind(config.http).await?;
        let grpc = bind(config.grpc).await?;
        if http.is_none() && grpc.is_none() {
            return Err(RouterError::NoListener);
        }
        let addresses = (http.as_ref().map(|b| b.1), grpc.as_ref().map(|b| b.1));
        let cors = http::cors::layer(&config.cors_origins)?;
        let shared = Arc::new(shared(&config, membership.as_ref()));
        let (limits, deadlines) = (&config.limits, &config.deadlines);
        let mut servers = JoinSet::new();
        if let Some((listener, _)) = http {
            let port = port(&config, "http", &["h2", "http/1.1"], &shared);
            let app = openai::routes(shared.clone(), cors);
            let server = Server::http(app, port, limits, deadlines);
            servers.spawn(server.serve(listener, shared.drain.subscribe()));
        }
        if let Some((listener, _)) = grpc {
            let (reporter, app) = grpc_app(&shared, limits.body_bytes_max)?;
            let port = port(&config, "grpc", &["h2"], &shared);
            let server = Server::grpc(app, port, limits, deadlines);
            servers.spawn(server.serve(listener, shared.drain.subscribe()));
            servers.spawn(report_health(shared.clone(), reporter));
        }
        let running = shared.clone();
        let task = tokio::spawn(async move {
            run(running, servers, shutdown).await;
            // The roster is followed only as long as the membership lives.
            drop(membership);
        });
        Ok(RouterHandle { http: addresses.0, grpc: addresses.1, shared, task })
    }
}

impl RouterHandle {
    /// Where HTTP is served, with the port that was found.
    pub fn http(&self) -> Option<SocketAddr> {
        self.http
    }

    /// Where gRPC is served, with the port that was found.
    pub fn grpc(&self) -> Option<SocketAddr> {
        self.grpc
    }

    /// Waits until there is a worker to give.
    pub async fn served(&self) {
        let mut changes = self.shared.upstream.targets.changes();
        while self.shared.served().is_empty() {
            changes.next().await;
        }
    }

    /// Waits for the end: after `shutdown` nothing new is accepted, and running streams have the
    /// drain deadline to finish.
    pub async fn join(self) {
        if let Err(error) = self.task.await {
            tracing::error!(%error, "router failed");
        }
    }
}

async fn bind(
    address: Option<SocketAddr>,
) -> Result<Option<(TcpListener, SocketAddr)>, RouterError> {
    match address {
        Some(address) => http::bind(address).await.map(Some),
        None => Ok(None),
    }
}

/// A port, and how it is told of.
fn port(
    config: &RouterConfig,
    name: &'static str,
    protocols: &[&str],
    shared: &RouterState,
) -> Port {
    let tls = config.tls.as_ref().map(|tls| tls.speaking(protocols));
    Port::new(name, tls, shared.metrics.handshake_failures.clone())
}

fn shared(config: &RouterConfig, membership: &dyn Membership) -> RouterState {
    let metrics = Arc::new(Metrics::new());
    let upstream = Upstream {
        targets: Targets::follow(
            membership.roster(),
            &config.deadlines,
            dial::tcp(config.deadlines.hello, config.worker_tls.clone()),
        ),
        policy: Box::new(PrefixAffinity::default()),
        limits: config.limits,
        deadlines: config.deadlines,
        metrics: metrics.clone(),
        queued: AtomicUsize::new(0),
    };
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    RouterState {
        upstream: Arc::new(upstream),
        aliases: Aliases::new(config.aliases.clone()),
        metrics,
        tokenizers: Arc::new(Semaphore::new(threads)),
        in_flight: Arc::new(Semaphore::new(config.limits.in_flight_max)),
        leaving: watch::Sender::new(false),
        drain: watch::Sender::new(false),
        stop: watch::Sender::new(false),
    }
}

/// A service that takes and gives compressed messages.
macro_rules! compressed {
    ($service:expr) => {
        grpc::ENCODINGS.into_iter().fold($service, |service, encoding| {
            service.accept_compressed(encoding).send_compressed(encoding)
        })
    };
}

/// Inference, health, and reflection in both versions that tools speak.
fn grpc_app(
    shared: &Arc<RouterState>,
    body_bytes_max: usize,
) -> Result<(HealthReporter, axum::Router), RouterError> {
    let broken =
        |error: tonic_reflection::server::Error| RouterError::Reflection(error.to_string());
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .with_service_name(SERVICE_NAME)
            .with_service_name("grpc.health.v1.Health")
    };
    let (reporter, health) = tonic_health::server::health_reporter();
    let inference = InferenceServer::new(Service { shared: shared.clone() })
        .max_decoding_message_size(body_bytes_max);
    let mut routes = Routes::builder();
    routes
        .add_service(compressed!(inference))
        .add_service(compressed!(health))
        .add_service(compressed!(reflection().build_v1().map_err(broken)?))
        .add_service(compressed!(reflection().build_v1alpha().map_err(broken)?));
    let adapt = middleware::from_fn_with_state(body_bytes_max, grpc::adapt);
    let routes = routes.routes().into_axum_router().layer(adapt);
    Ok((reporter, recorded(routes, &shared.metrics, Door::Grpc)))
}

/// Says `SERVING` while some model is served and the router does not end.
async fn report_health(shared: Arc<RouterState>, reporter: HealthReporter) {
    let mut changes = shared.upstream.targets.changes();
    let mut leaving = shared.leaving.subscribe();
    let mut told = None;
    loop {
        let serving = !shared.leaves() && !shared.served().is_empty();
        if told.replace(serving) != Some(serving) {
            let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
            for name in ["", SERVICE_NAME] {
                reporter.set_service_status(name, status).await;
            }
        }
        if shared.leaves() {
            return;
        }
        tokio::select! {
            () = changes.next() => {}
            changed = leaving.changed() => if changed.is_err() { return },
        }
    }
}

/// Waits for the shutdown, tells it, drains, ends what is left.
async fn run(
    shared: Arc<RouterState>,
    mut servers: JoinSet<()>,
    mut shutdown: watch::Receiver<bool>,
) {
    raised(&mut shutdown).await;
    shared.leaving.send_replace(true);
    let Deadlines { grace, drain: limit, .. } = shared.upstream.deadlines;
    if !grace.is_zero() {
        tracing::info!(seconds = grace.as_secs(), "health says draining; still taking requests");
        sleep(grace).await;
    }
    shared.drain.send_replace(true);
    let until = Instant::now() + limit;
    tracing::info!(seconds = limit.as_secs(), "router drains");
    while !shared.idle() && Instant::now() < until {
        sleep(LOOK_AGAIN).await;
    }
    if !shared.idle() {
        tracing::warn!("the drain limit passed; running streams are ended");
        shared.stop.send_replace(true);
    }
    let all = async { while servers.join_next().await.is_some() {} };
    if timeout(LINGER, all).await.is_err() {
        servers.shutdown().await;
    }
    tracing::info!("router ended");
}
