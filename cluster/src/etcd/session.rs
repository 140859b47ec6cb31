//! One connection to one member, every call with a deadline.

use std::{future::Future, sync::Arc, time::Duration};

use etcd_client::{
    Client, ConnectOptions, Error, GetOptions, GetResponse, LeaseKeepAliveStream, LeaseKeeper,
    PutOptions, WatchOptions, WatchStream,
};
use tokio::time::timeout;

use super::{EtcdOptions, INSTANCES_MAX};

/// gRPC codes by number: `etcd_client` does not hand out the type that names them.
const INVALID_ARGUMENT: i32 = 3;
const NOT_FOUND: i32 = 5;
const PERMISSION_DENIED: i32 = 7;
const UNAUTHENTICATED: i32 = 16;
const MESSAGE_BYTES_MAX: usize = 256 << 20;

/// Why a session is given up.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    #[error("no answer to {what} within {} ms", .after.as_millis())]
    Deadline { what: &'static str, after: Duration },
    #[error("{0}")]
    Broken(String),
    /// The lease is not known any more.
    #[error("the lease expired")]
    LeaseGone,
    /// Asking again would not help.
    #[error("{0}")]
    Refused(String),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        match &error {
            Error::GRpcStatus(status) => match status.code() as i32 {
                NOT_FOUND if status.message().contains("lease") => Self::LeaseGone,
                INVALID_ARGUMENT | PERMISSION_DENIED | UNAUTHENTICATED => {
                    Self::Refused(status.message().to_owned())
                }
                _ => Self::Broken(status.message().to_owned()),
            },
            // The client's own words for a first keepalive answer without time left.
            Error::LeaseKeepAliveError(reason) if reason.contains("not found") => Self::LeaseGone,
            _ => Self::Broken(error.to_string()),
        }
    }
}

pub(super) struct Session {
    client: Client,
    options: Arc<EtcdOptions>,
}

impl Session {
    /// Connects to endpoint number `at`, counted round and round.
    pub(super) async fn open(options: &Arc<EtcdOptions>, at: usize) -> Result<Self, Fault> {
        let endpoint = &options.endpoints[at % options.endpoints.len()];
        let wait = options.call_deadline;
        // No HTTP/2 pings: etcd ends connections that ping more often than every 5 s. Readings and
        // renewals with deadlines notice a stopped member sooner.
        let mut connect =
            ConnectOptions::new().with_connect_timeout(wait).with_require_leader(true);
        if let Some((user, password)) = &options.user {
            // Tokens are not known to every member at once.
            connect = connect.with_user(user, password).with_auto_token_refresh(true);
        }
        let client = within(wait, "connect", Client::connect([endpoint], Some(connect))).await?;
        Ok(Self { client, options: options.clone() })
    }

    async fn call<T>(
        &self,
        what: &'static str,
        call: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Fault> {
        within(self.options.call_deadline, what, call).await
    }

    /// Every instance of the cluster, as a majority of the members knows it.
    pub(super) async fn list(&mut self) -> Result<GetResponse, Fault> {
        let mut kv = self.client.kv_client().max_decoding_message_size(MESSAGE_BYTES_MAX);
        let limit = GetOptions::new().with_prefix().with_limit(INSTANCES_MAX as i64);
        self.call("list", kv.get(self.options.prefix(), Some(limit))).await
    }

    /// Changes from `revision` on.
    pub(super) async fn watch(&mut self, revision: i64) -> Result<WatchStream, Fault> {
        let from = WatchOptions::new().with_prefix().with_start_revision(revision);
        let mut watch = self.client.watch_client().max_decoding_message_size(MESSAGE_BYTES_MAX);
        self.call("watch", watch.watch(self.options.prefix(), Some(from))).await
    }

    /// A new lease.
    pub(super) async fn grant(&mut self) -> Result<i64, Fault> {
        let seconds = self.options.lease.as_secs_f64().ceil() as i64;
        let mut lease = self.client.lease_client();
        Ok(self.call("grant a lease", lease.grant(seconds, None)).await?.id())
    }

    pub(super) async fn put(&mut self, key: &str, value: Vec<u8>, lease: i64) -> Result<(), Fault> {
        let mut kv = self.client.kv_client();
        let with_lease = Some(PutOptions::new().with_lease(lease));
        self.call("put", kv.put(key, value, with_lease)).await.map(|_| ())
    }

    /// Opens the stream that keeps `lease` alive; its first answer has been seen.
    pub(super) async fn keep(&mut self, lease: i64) -> Result<Keepalive, Fault> {
        let mut client = self.client.lease_client();
        let opened = self.call("keep the lease alive", client.keep_alive(lease)).await;
        let (keeper, answers) = opened?;
        Ok(Keepalive { keeper, answers, wait: self.options.call_deadline })
    }

    /// Ends the lease and with it the keys that it holds.
    pub(super) async fn revoke(&mut self, lease: i64) -> Result<(), Fault> {
        let mut client = self.client.lease_client();
        self.call("revoke the lease", client.revoke(lease)).await.map(|_| ())
    }
}

/// An open keepalive stream.
pub(super) struct Keepalive {
    keeper: LeaseKeeper,
    answers: LeaseKeepAliveStream,
    wait: Duration,
}

impl Keepalive {
    /// Renews the lease once. The end of the stream, an error and silence are all the same: dead.
    pub(super) async fn renew(&mut self) -> Result<(), Fault> {
        let Self { keeper, answers, wait } = self;
        let exchange = async {
            keeper.keep_alive().await?;
            answers.message().await
        };
        match within(*wait, "keepalive", exchange).await? {
            Some(answer) if answer.ttl() > 0 => Ok(()),
            Some(_) => Err(Fault::LeaseGone),
            None => Err(Fault::Broken("the keepalive stream ended".into())),
        }
    }
}

/// `future`, or a fault once `after` has passed.
async fn within<T>(
    after: Duration,
    what: &'static str,
    future: impl Future<Output = Result<T, Error>>,
) -> Result<T, Fault> {
    match timeout(after, future).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(Fault::Deadline { what, after }),
    }
}
