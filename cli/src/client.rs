//! Connecting to a router as a client.

use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use proto::v1::inference_client::InferenceClient;
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};

const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
const PING: Duration = Duration::from_secs(20);
const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// A channel that notices a router which is gone.
pub async fn connect(address: &str) -> Result<InferenceClient<Channel>> {
    let endpoint = Endpoint::from_shared(address.to_owned())
        .with_context(|| format!("{address:?} is no address; write HOST:PORT"))?
        .connect_timeout(CONNECT_DEADLINE)
        .http2_keep_alive_interval(PING)
        .keep_alive_timeout(PING);
    let channel = endpoint.connect().await.with_context(|| {
        format!("no router's gRPC interface at {address}; start one with `lockstep up`")
    })?;
    Ok(InferenceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX))
}

/// A router's refusal in its own words.
pub fn explain(status: Status) -> anyhow::Error {
    match status.code() {
        Code::Unknown | Code::Internal => anyhow!("the router failed: {}", status.message()),
        _ => anyhow!("{}", status.message()),
    }
}
