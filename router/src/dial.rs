//! How this router reaches a worker's address.

use cluster::{Connector, Instance};
use std::time::Duration;
use tonic::transport::{Channel, Endpoint, Error};

/// Unread bytes of one stream: a slow client's tokens wait at the worker.
const STREAM_WINDOW: u32 = 64 << 10;
/// Unread bytes of all streams of one worker: a thousand stuck ones do not block the others.
const CONNECTION_WINDOW: u32 = 64 << 20;
/// Workers say by themselves that they live; this ends connections that nobody is at any more.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Makes the channel to a worker; it connects by itself, as often as need be. An error means that
/// the address is none.
pub(crate) type Dial = Box<dyn Fn(&Instance) -> Result<Channel, Error> + Send + Sync>;

/// Over TCP, by TLS alone where there is `tls`; a worker has `hello` to say who it is.
pub(crate) fn tcp(hello: Duration, tls: Option<tls::Client>) -> Dial {
    let connector = Connector::new(tls, connect_limit(hello));
    Box::new(move |instance| {
        Ok(endpoint(instance, hello)?.connect_with_connector_lazy(connector.clone()))
    })
}

/// Connecting ends before `hello` does, so that the next question begins with a packet of its own:
/// the kernel's own next ones come after 1, 2, 4 s and more.
fn connect_limit(hello: Duration) -> Duration {
    hello * 3 / 4
}

/// What every connection to the worker keeps to, however it is made.
pub(crate) fn endpoint(instance: &Instance, hello: Duration) -> Result<Endpoint, Error> {
    let endpoint = Endpoint::from_shared(instance.address.clone())?
        .connect_timeout(connect_limit(hello))
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW);
    Ok(endpoint)
}
