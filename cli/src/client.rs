//! Connecting to a router as a client.

use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use cluster::Connector;
use http_body_util::Full;
use hyper::body::Bytes;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use proto::v1::inference_client::InferenceClient;
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};

use crate::security::ToolTlsArgs;

const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
const PING: Duration = Duration::from_secs(20);
const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// A channel that notices a router which is gone.
pub async fn connect(address: &str, tls: &ToolTlsArgs) -> Result<InferenceClient<Channel>> {
    let connector = Connector::new(tls.client(address, "h2")?, CONNECT_DEADLINE);
    let endpoint = Endpoint::from_shared(address.to_owned())
        .with_context(|| format!("{address:?} is no address; write HOST:PORT"))?
        .connect_timeout(CONNECT_DEADLINE)
        .http2_keep_alive_interval(PING)
        .keep_alive_timeout(PING);
    let channel = endpoint.connect_with_connector(connector).await.with_context(|| {
        format!("no router's gRPC interface at {address}; start one with `lockstep up`")
    })?;
    Ok(InferenceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX))
}

/// For requests over HTTP/1.1.
pub type Http = Client<Connector, Full<Bytes>>;

/// A client of a router's HTTP interface.
pub fn http(address: &str, tls: &ToolTlsArgs) -> Result<Http> {
    let connector = Connector::new(tls.client(address, "http/1.1")?, CONNECT_DEADLINE);
    Ok(Client::builder(TokioExecutor::new()).build(connector))
}

/// A router's refusal in its own words.
pub fn explain(status: Status) -> anyhow::Error {
    match status.code() {
        Code::Unknown | Code::Internal => anyhow!("the router failed: {}", status.message()),
        _ => anyhow!("{}", status.message()),
    }
}
