//! One connection to one member, every call with a deadline.

use std::{future::Future, sync::Arc, time::Duration};

use proto::etcd::{
    AuthenticateRequest, Compare, LeaseGrantRequest, LeaseKeepAliveRequest, LeaseKeepAliveResponse,
    LeaseRevokeRequest, PutRequest, RangeRequest, RangeResponse, RequestOp, TxnRequest,
    WatchCreateRequest, WatchRequest, WatchResponse, auth_client::AuthClient, kv_client::KvClient,
    lease_client::LeaseClient, request_op::Request as RequestUnionOp, watch_client::WatchClient,
    watch_request::RequestUnion,
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tonic::{
    Code, Request, Response, Status, Streaming,
    metadata::AsciiMetadataValue,
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};

use super::{EtcdOptions, INSTANCES_MAX};
use crate::{Connector, root_cause};

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

impl From<Status> for Fault {
    fn from(status: Status) -> Self {
        match status.code() {
            Code::NotFound if status.message().contains("lease") => Self::LeaseGone,
            Code::InvalidArgument | Code::PermissionDenied | Code::Unauthenticated => {
                Self::Refused(status.message().to_owned())
            }
            _ => Self::Broken(match std::error::Error::source(&status) {
                Some(source) => root_cause(source).to_string(),
                None => status.message().to_owned(),
            }),
        }
    }
}

/// What is sent with every call.
#[derive(Clone)]
struct Headers {
    /// Says who asks, where etcd wants to know it.
    token: Option<AsciiMetadataValue>,
}

impl Interceptor for Headers {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let headers = request.metadata_mut();
        // A member that has lost the others is to refuse instead of answering from the past.
        headers.insert("hasleader", AsciiMetadataValue::from_static("true"));
        if let Some(token) = &self.token {
            headers.insert("token", token.clone());
        }
        Ok(request)
    }
}

type Connection = InterceptedService<Channel, Headers>;

pub(super) struct Session {
    channel: Channel,
    headers: Headers,
    options: Arc<EtcdOptions>,
}

impl Session {
    /// Connects to endpoint number `at`, counted round and round.
    pub(super) async fn open(options: &Arc<EtcdOptions>, at: usize) -> Result<Self, Fault> {
        let endpoint = &options.endpoints[at % options.endpoints.len()];
        let endpoint = match (endpoint.contains("://"), &options.tls) {
            (true, _) => endpoint.clone(),
            (false, Some(_)) => format!("https://{endpoint}"),
            (false, None) => format!("http://{endpoint}"),
        };
        let unusable =
            |error: tonic::transport::Error| Fault::Refused(root_cause(&error).to_string());
        let wait = options.call_deadline;
        // No HTTP/2 pings: etcd ends connections that ping more often than every 5 s. Readings and
        // renewals with deadlines notice a stopped member sooner.
        let endpoint = Endpoint::from_shared(endpoint).map_err(unusable)?.connect_timeout(wait);
        within(wait, "connect", async {
            let broken = |error| Fault::Broken(root_cause(&error).to_string());
            let connector = Connector::new(options.tls.clone(), wait);
            let channel = endpoint.connect_with_connector(connector).await.map_err(broken)?;
            let headers = Headers { token: None };
            let mut session = Self { channel, headers, options: options.clone() };
            session.authenticate().await?;
            Ok(session)
        })
        .await
    }

    /// Gets a token for the user, where there is one.
    async fn authenticate(&mut self) -> Result<(), Status> {
        let Some((name, password)) = self.options.user.clone() else { return Ok(()) };
        self.headers.token = None;
        let request = AuthenticateRequest { name, password };
        let answer = AuthClient::new(self.connection()).authenticate(request).await?;
        let token = answer.into_inner().token.parse();
        self.headers.token =
            Some(token.map_err(|_| Status::internal("etcd's token is no header"))?);
        Ok(())
    }

    fn connection(&self) -> Connection {
        InterceptedService::new(self.channel.clone(), self.headers.clone())
    }

    /// Asks once, and once more with a new token where the old one is not known: tokens end, and
    /// a new one is not known to every member at once.
    async fn call<Q: Clone, A, W>(
        &mut self,
        what: &'static str,
        question: Q,
        ask: impl Fn(Connection, Q) -> W,
    ) -> Result<A, Fault>
    where
        W: Future<Output = Result<A, Status>>,
    {
        within(self.options.call_deadline, what, async {
            match ask(self.connection(), question.clone()).await {
                Err(status)
                    if status.code() == Code::Unauthenticated && self.options.user.is_some() =>
                {
                    self.authenticate().await?;
                    Ok(ask(self.connection(), question).await?)
                }
                answer => Ok(answer?),
            }
        })
        .await
    }

    /// Every instance of the cluster, as a majority of the members knows it.
    pub(super) async fn list(&mut self) -> Result<RangeResponse, Fault> {
        let keys = self.options.keys();
        self.range(keys, INSTANCES_MAX as i64).await
    }

    /// Whether a majority of the members answers through this one, at the cost of no value.
    pub(super) async fn probe(&mut self) -> Result<(), Fault> {
        let key = self.options.prefix();
        self.get(&key).await.map(drop)
    }

    /// One key, where it is there.
    pub(super) async fn get(&mut self, key: &str) -> Result<RangeResponse, Fault> {
        self.range((key.into(), Vec::new()), 1).await
    }

    async fn range(
        &mut self,
        (key, range_end): (Vec<u8>, Vec<u8>),
        limit: i64,
    ) -> Result<RangeResponse, Fault> {
        let request = RangeRequest { key, range_end, limit };
        self.call("list", request, async |connection, request| {
            let mut client = KvClient::new(connection).max_decoding_message_size(MESSAGE_BYTES_MAX);
            client.range(request).await.map(Response::into_inner)
        })
        .await
    }

    /// Changes of instances from `revision` on.
    pub(super) async fn watch(&mut self, revision: i64) -> Result<Streaming<WatchResponse>, Fault> {
        let keys = self.options.keys();
        self.watch_keys(keys, revision).await
    }

    /// Changes of one key from `revision` on.
    pub(super) async fn watch_key(
        &mut self,
        key: &str,
        revision: i64,
    ) -> Result<Streaming<WatchResponse>, Fault> {
        self.watch_keys((key.into(), Vec::new()), revision).await
    }

    async fn watch_keys(
        &mut self,
        (key, range_end): (Vec<u8>, Vec<u8>),
        revision: i64,
    ) -> Result<Streaming<WatchResponse>, Fault> {
        let create = WatchCreateRequest { key, range_end, start_revision: revision };
        let request = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        self.call("watch", request, async |connection, request| {
            let mut client =
                WatchClient::new(connection).max_decoding_message_size(MESSAGE_BYTES_MAX);
            let open = tokio_stream::once(request).chain(tokio_stream::pending());
            client.watch(open).await.map(Response::into_inner)
        })
        .await
    }

    /// A new lease.
    pub(super) async fn grant(&mut self) -> Result<i64, Fault> {
        let ttl = self.options.lease.as_secs_f64().ceil() as i64;
        let request = LeaseGrantRequest { ttl };
        self.call("grant a lease", request, async |connection, request| {
            Ok(LeaseClient::new(connection).lease_grant(request).await?.into_inner().id)
        })
        .await
    }

    pub(super) async fn put(&mut self, key: &str, value: Vec<u8>, lease: i64) -> Result<(), Fault> {
        let request = PutRequest { key: key.into(), value, lease };
        self.call("put", request, async |connection, request| {
            KvClient::new(connection).put(request).await.map(|_| ())
        })
        .await
    }

    /// Puts every key with its value under its lease (0: none), where each comparison holds; or
    /// nothing, and false.
    pub(super) async fn put_if(
        &mut self,
        compare: Vec<Compare>,
        puts: Vec<PutRequest>,
    ) -> Result<bool, Fault> {
        let put = |put| RequestOp { request: Some(RequestUnionOp::RequestPut(put)) };
        let success = puts.into_iter().map(put).collect();
        let request = TxnRequest { compare, success, failure: Vec::new() };
        self.call("a transaction", request, async |connection, request| {
            Ok(KvClient::new(connection).txn(request).await?.into_inner().succeeded)
        })
        .await
    }

    /// Opens the stream that keeps `lease` alive; its first answer has been seen.
    pub(super) async fn keep(&mut self, lease: i64) -> Result<Keepalive, Fault> {
        let wait = self.options.call_deadline;
        let request = LeaseKeepAliveRequest { id: lease };
        let open = async |connection, request| {
            let (renewals, sent) = mpsc::channel(1);
            // Room for one: this never waits.
            let _room = renewals.try_send(request);
            let mut client = LeaseClient::new(connection);
            let answers = client.lease_keep_alive(ReceiverStream::new(sent)).await?.into_inner();
            let mut opened = Keepalive { request, renewals, answers, wait };
            let first = opened.answers.message().await?;
            Ok((opened, first))
        };
        let (opened, first) = self.call("keep the lease alive", request, open).await?;
        renewed(first)?;
        Ok(opened)
    }

    /// Ends the lease and with it the keys that it holds.
    pub(super) async fn revoke(&mut self, lease: i64) -> Result<(), Fault> {
        let request = LeaseRevokeRequest { id: lease };
        self.call("revoke the lease", request, async |connection, request| {
            LeaseClient::new(connection).lease_revoke(request).await.map(|_| ())
        })
        .await
    }
}

/// An open keepalive stream.
pub(super) struct Keepalive {
    request: LeaseKeepAliveRequest,
    renewals: mpsc::Sender<LeaseKeepAliveRequest>,
    answers: Streaming<LeaseKeepAliveResponse>,
    wait: Duration,
}

impl Keepalive {
    /// Renews the lease once. The end of the stream, an error and silence are all the same: dead.
    pub(super) async fn renew(&mut self) -> Result<(), Fault> {
        let Self { request, renewals, answers, wait } = self;
        let exchange = async {
            // Fails where the stream has ended, which the answer tells better.
            let _ended = renewals.send(*request).await;
            renewed(answers.message().await?)
        };
        within(*wait, "keepalive", exchange).await
    }
}

/// Whether the lease has time left.
fn renewed(answer: Option<LeaseKeepAliveResponse>) -> Result<(), Fault> {
    match answer {
        Some(answer) if answer.ttl > 0 => Ok(()),
        Some(_) => Err(Fault::LeaseGone),
        None => Err(Fault::Broken("the keepalive stream ended".into())),
    }
}

/// `future`, or a fault once `after` has passed.
async fn within<T>(
    after: Duration,
    what: &'static str,
    future: impl Future<Output = Result<T, Fault>>,
) -> Result<T, Fault> {
    timeout(after, future).await.unwrap_or(Err(Fault::Deadline { what, after }))
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;
    use crate::etcd::tests::members::Cluster;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_user_gets_a_new_token_where_the_old_one_expired() {
        let flags = ["--auth-token-ttl", "1", "--bcrypt-cost", "4"];
        let Some(cluster) = Cluster::start_with(1, &flags).await else { return };
        cluster.etcdctl(&["user", "add", "root:secret"]);
        cluster.etcdctl(&["user", "grant-role", "root", "root"]);
        cluster.etcdctl(&["auth", "enable"]);
        let mut options = cluster.options();
        options.call_deadline = Duration::from_secs(10);
        let open = async |user: Option<&str>| {
            let user = user.map(|password| ("root".to_owned(), password.to_owned()));
            let options = Arc::new(EtcdOptions { user, ..options.clone() });
            Session::open(&options, 0).await
        };

        let stranger = open(None).await.unwrap().list().await.unwrap_err();
        assert!(matches!(stranger, Fault::Refused(_)), "{stranger}");
        let Err(wrong) = open(Some("wrong")).await else { panic!("a wrong password was taken") };
        assert!(matches!(wrong, Fault::Refused(_)), "{wrong}");

        let mut session = open(Some("secret")).await.unwrap();
        let first = session.headers.token.clone();
        session.list().await.unwrap();
        assert_eq!(session.headers.token, first, "a token that is known is kept");
        let mut waited = 0;
        while session.headers.token == first {
            waited += 1;
            assert!(waited < 10, "the token never expired");
            sleep(Duration::from_secs(3)).await;
            session.list().await.unwrap();
        }
        let lease = session.grant().await.unwrap();
        session.put("/lockstep/test/instances/a", b"{}".to_vec(), lease).await.unwrap();
        assert_eq!(session.list().await.unwrap().kvs.len(), 1);
        session.revoke(lease).await.unwrap();
        assert!(session.list().await.unwrap().kvs.is_empty());
        let gone = session.revoke(lease).await.unwrap_err();
        assert!(matches!(gone, Fault::LeaseGone), "{gone}");
    }
}
