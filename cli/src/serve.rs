//! Flags of the servers: the router's side, the worker's side, and how the two find each other.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use clap::Args;
use cluster::{Etcd, EtcdOptions, InMemory, Membership, MembershipError, StaticList};
use router::RouterConfig;
use tokio::time::{Instant, sleep};
use worker::{GroupConfig, WorkerConfig};

use crate::{
    address,
    deadlines::{DeadlineArgs, seconds},
    security::{Clear, ClusterTlsArgs, FrontTlsArgs, pair},
};

/// How long a process that starts waits for etcd. One that ends instead, on a machine that is cut
/// off, is started again later and later by what watches over it, long after the network is back.
const ETCD_PATIENCE: Duration = Duration::from_secs(60);
const ETCD_PAUSE: Duration = Duration::from_millis(500);

/// What gives a port within the cluster TLS.
pub const CLUSTER_REMEDY: &str = "--cluster-cert, --cluster-key and --cluster-ca";

/// The router's side of `up` and `router`.
#[derive(Args, Debug)]
pub struct FrontArgs {
    /// Address of the OpenAI-compatible HTTP interface; port 0 takes any
    #[arg(long, default_value = "127.0.0.1:8000", env = "LOCKSTEP_HTTP")]
    pub http: SocketAddr,
    /// Address of the gRPC interface; port 0 takes any
    #[arg(long, default_value = "127.0.0.1:8001", env = "LOCKSTEP_GRPC")]
    pub grpc: SocketAddr,
    /// Bytes of one request's body, at most
    #[arg(long, default_value_t = 4 << 20, env = "LOCKSTEP_BODY_BYTES")]
    body_bytes: usize,
    /// A further name that clients may ask for, as NAME=MODEL; may be given several times, in the
    /// environment with commas between
    #[arg(long, value_name = "NAME=MODEL", value_parser = alias, value_delimiter = ',',
        env = "LOCKSTEP_ALIAS")]
    alias: Vec<(String, String)>,
    /// Web pages that may call the HTTP interface from a browser, as scheme://host[:port], or * for
    /// all; pages that this machine serves always may
    #[arg(long, value_name = "ORIGIN", value_delimiter = ',', env = "LOCKSTEP_CORS_ORIGIN")]
    cors_origin: Vec<String>,
    #[command(flatten)]
    deadlines: DeadlineArgs,
    #[command(flatten)]
    tls: FrontTlsArgs,
}

impl FrontArgs {
    pub fn resolve(&self, drain_seconds: u64, cluster: &ClusterArgs) -> Result<RouterConfig> {
        if self.body_bytes == 0 {
            bail!("--body-bytes must be at least 1");
        }
        let tls = self.tls.server()?;
        if tls.is_none() {
            let remedy = "--tls-cert and --tls-key";
            for (flag, address) in [("--http", self.http), ("--grpc", self.grpc)] {
                Clear { flag, address, remedy }.check(cluster.insecure)?;
            }
        }
        let mut config = RouterConfig::new(Some(self.http), Some(self.grpc));
        self.deadlines.apply(&mut config);
        config.limits.body_bytes_max = self.body_bytes;
        config.deadlines.drain = Duration::from_secs(drain_seconds);
        config.aliases = aliases(&self.alias)?;
        config.cors_origins = self.cors_origin.clone();
        config.tls = tls;
        config.worker_tls = cluster.tls.load()?.map(|tls| tls.client("h2"));
        Ok(config)
    }
}

/// The worker's side of `up` and `worker`.
#[derive(Args, Debug)]
pub struct ServedArgs {
    /// The name that clients ask for [default: the checkpoint's]
    #[arg(long, env = "LOCKSTEP_NAME")]
    name: Option<String>,
    /// Requests that wait for a place before others are refused
    #[arg(long, default_value_t = 256, env = "LOCKSTEP_QUEUE")]
    queue: usize,
    /// The worker's address as routers see it, e.g. http://10.0.0.7:7001 [default: where it
    /// listens, at this machine's address towards etcd where that is 0.0.0.0]
    #[arg(long, value_parser = address::http, env = "LOCKSTEP_ADVERTISE")]
    advertise: Option<String>,
    /// Seconds that one step may last; a longer one means that the group hangs, and ends the worker
    #[arg(
        long,
        default_value_t = 600,
        value_parser = seconds(),
        env = "LOCKSTEP_STEP_LIMIT_SECONDS"
    )]
    step_limit_seconds: u64,
}

/// Where a worker listens, and by which flag that is said.
#[derive(Clone, Copy)]
pub struct Listen {
    pub flag: &'static str,
    pub address: SocketAddr,
    /// In the address that routers are told, where it is another.
    host: Option<IpAddr>,
}

impl Listen {
    /// Where nothing is `given`: on loopback, or where etcd is elsewhere at the address by which
    /// this machine reaches it.
    pub fn new(flag: &'static str, given: Option<SocketAddr>, etcd: &ClusterArgs) -> Result<Self> {
        let route = address::route(&etcd.etcd).with_context(|| {
            format!("say with {flag} HOST:PORT where routers reach this worker")
        })?;
        let any = || SocketAddr::new(route.unwrap_or(Ipv4Addr::LOCALHOST.into()), 0);
        let address = given.unwrap_or_else(any);
        Ok(Self { flag, address, host: route.filter(|_| address.ip().is_unspecified()) })
    }
}

impl ServedArgs {
    /// Checks, before minutes are spent on loading, that routers can reach what is announced.
    pub fn check(&self, at: Listen, etcd: &ClusterArgs) -> Result<()> {
        let Listen { flag, address, host } = at;
        if etcd.tls.load()?.is_none() {
            Clear { flag, address, remedy: CLUSTER_REMEDY }.check(etcd.insecure)?;
        }
        if self.name.as_ref().is_some_and(String::is_empty) {
            bail!("--name is empty; give a name, or leave it out for the checkpoint's");
        }
        match &self.advertise {
            None if host.is_some() => Ok(()),
            None if address.ip().is_unspecified() => bail!(
                "{flag} {address} is no address to connect to; say with \
                 --advertise http://HOST:PORT how routers reach it"
            ),
            None => address::check_reachable(flag, &format!("http://{address}"), &etcd.etcd),
            Some(told) => address::check_reachable("--advertise", told, &etcd.etcd),
        }
    }

    pub fn resolve(
        &self,
        mut group: GroupConfig,
        listen: Listen,
        drain_seconds: u64,
        tls: Option<tls::Cluster>,
    ) -> WorkerConfig {
        group.step_limit = Duration::from_secs(self.step_limit_seconds);
        let mut config = WorkerConfig::new(group);
        config.listen = listen.address;
        config.advertise =
            self.advertise.as_deref().map(|told| address::secured(told, tls.is_some()));
        config.tls = tls.map(|tls| tls.server(&["h2", "http/1.1"]));
        config.host = listen.host;
        config.model_name = self.name.clone();
        config.waiting_max = self.queue;
        config.drain_limit = Duration::from_secs(drain_seconds);
        config
    }
}

/// How the processes of a cluster find each other, and by what they trust each other.
#[derive(Args, Debug)]
pub struct ClusterArgs {
    /// etcd members, e.g. http://10.0.0.1:2379,http://10.0.0.2:2379
    #[arg(long, value_delimiter = ',', env = "LOCKSTEP_ETCD")]
    pub etcd: Vec<String>,
    /// Clusters of different names share an etcd
    #[arg(long, default_value = "default", env = "LOCKSTEP_CLUSTER")]
    cluster: String,
    /// A file with user:password for etcd
    #[arg(long, env = "LOCKSTEP_ETCD_CREDENTIALS")]
    etcd_credentials: Option<PathBuf>,
    /// The CA of etcd's certificates; TLS then [default: --cluster-ca]
    #[arg(long, value_name = "FILE", env = "LOCKSTEP_ETCD_CA")]
    etcd_ca: Option<PathBuf>,
    /// A certificate to show to etcd [default: --cluster-cert]
    #[arg(long, value_name = "FILE", env = "LOCKSTEP_ETCD_CERT")]
    etcd_cert: Option<PathBuf>,
    /// The key of that certificate [default: --cluster-key]
    #[arg(long, value_name = "FILE", env = "LOCKSTEP_ETCD_KEY")]
    etcd_key: Option<PathBuf>,
    #[command(flatten)]
    pub tls: ClusterTlsArgs,
    /// Lets ports without TLS be reached from other machines, for networks that are trusted
    #[arg(long, env = "LOCKSTEP_INSECURE")]
    pub insecure: bool,
}

impl ClusterArgs {
    /// `None` where no members are named.
    pub fn options(&self) -> Result<Option<EtcdOptions>> {
        if self.etcd.is_empty() {
            return Ok(None);
        }
        let mut options = EtcdOptions::new(self.etcd.clone(), self.cluster.clone());
        if let Some(path) = &self.etcd_credentials {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("cannot read --etcd-credentials {}", path.display()))?;
            let Some((user, password)) = text.trim_end().split_once(':') else {
                bail!("{} does not hold user:password", path.display());
            };
            options.user = Some((user.to_owned(), password.to_owned()));
        }
        options.tls = self.etcd_tls()?;
        Ok(Some(options))
    }

    /// `None` for clear text. What is not said for etcd is the cluster's, where etcd speaks TLS.
    fn etcd_tls(&self) -> Result<Option<tls::Client>> {
        let own = pair(("--etcd-cert", &self.etcd_cert), ("--etcd-key", &self.etcd_key))?;
        let secure = self.etcd.iter().any(|member| member.starts_with("https://"));
        if !secure && self.etcd_ca.is_none() && own.is_none() {
            return Ok(None);
        }
        let cluster = self.tls.load()?;
        let files = cluster.as_ref().map(tls::Cluster::files);
        let ca = self.etcd_ca.as_ref().or(files.map(|(_, ca)| ca));
        let own = own.or_else(|| files.map(|(identity, _)| identity.clone()));
        let Some(ca) = ca else {
            bail!("etcd speaks TLS: name the CA of its certificates with --etcd-ca");
        };
        Ok(Some(tls::Client::load(Some(ca.clone()), own, "h2")?))
    }

    /// Connects, where members are named; waits a while for one that answers.
    pub async fn connect(&self) -> Result<Option<Arc<dyn Membership>>> {
        let Some(options) = self.options()? else { return Ok(None) };
        let (began, mut told) = (Instant::now(), false);
        loop {
            match Etcd::connect(options.clone()).await {
                Ok(etcd) => return Ok(Some(Arc::new(etcd))),
                Err(fault @ MembershipError::Unreachable { .. })
                    if began.elapsed() < ETCD_PATIENCE =>
                {
                    if !std::mem::replace(&mut told, true) {
                        let seconds = ETCD_PATIENCE.as_secs();
                        tracing::warn!(%fault, seconds, "trying again for so long");
                    }
                }
                Err(error) => return Err(error.into()),
            }
            sleep(ETCD_PAUSE).await;
        }
    }

    /// Connects, or makes a roster of this process alone where no members are named.
    pub async fn connect_or_alone(&self) -> Result<Arc<dyn Membership>> {
        Ok(self.connect().await?.unwrap_or_else(|| Arc::new(InMemory::new())))
    }
}

/// The workers of a router: by a registry or by their addresses.
#[derive(Args, Debug)]
pub struct WorkersArgs {
    #[command(flatten)]
    pub etcd: ClusterArgs,
    /// Workers at fixed addresses in place of etcd, e.g. http://10.0.0.7:7001,http://10.0.0.8:7001
    #[arg(long, value_parser = address::http, value_delimiter = ',', env = "LOCKSTEP_WORKERS")]
    workers: Vec<String>,
}

impl WorkersArgs {
    /// Follows the roster.
    pub async fn connect(&self) -> Result<Arc<dyn Membership>> {
        if !self.workers.is_empty() {
            if !self.etcd.etcd.is_empty() {
                bail!("--etcd and --workers both say where the workers are; give one of them");
            }
            let tls = self.etcd.tls.load()?.map(|tls| tls.client("h2"));
            let secure = tls.is_some();
            let workers = self.workers.iter().map(|worker| address::secured(worker, secure));
            return Ok(Arc::new(StaticList::follow(&workers.collect::<Vec<_>>(), tls)?));
        }
        let etcd = self.etcd.connect().await?;
        etcd.context(
            "nothing says where the workers are; name the cluster's etcd with \
             --etcd http://HOST:2379, or the workers with --workers http://HOST:PORT",
        )
    }
}

/// `NAME=MODEL`.
fn alias(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, model)) if !name.is_empty() && !model.is_empty() => {
            Ok((name.to_owned(), model.to_owned()))
        }
        _ => Err(format!("{text:?} is no alias; write NAME=MODEL")),
    }
}

/// One meaning for each alias, and none that leads to another.
fn aliases(given: &[(String, String)]) -> Result<BTreeMap<String, String>> {
    let mut all = BTreeMap::new();
    for (name, model) in given {
        match all.insert(name.clone(), model.clone()) {
            Some(other) if other != *model => {
                bail!("--alias {name} is given for {other} and for {model}; give it once")
            }
            _ => {}
        }
    }
    match all.iter().find(|(_, model)| all.contains_key(*model)) {
        Some((name, model)) => bail!(
            "--alias {name}={model} leads to another alias; give the model's own name instead"
        ),
        None => Ok(all),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        front: FrontArgs,
        #[command(flatten)]
        served: ServedArgs,
        #[command(flatten)]
        workers: WorkersArgs,
    }

    fn line(words: &str) -> Result<Line, clap::Error> {
        Line::try_parse_from(["x"].into_iter().chain(words.split_whitespace()))
    }

    #[test]
    fn aliases_have_one_meaning_and_lead_to_models() {
        let resolved = |words| {
            let line = line(words).expect(words);
            line.front.resolve(1, &line.workers.etcd)
        };
        let config = resolved("--alias a=m --alias b=m,c=n").unwrap();
        let wanted = [("a", "m"), ("b", "m"), ("c", "n")];
        assert_eq!(config.aliases, wanted.map(|(a, b)| (a.to_owned(), b.to_owned())).into());
        for (words, part) in [
            ("--alias a=m,a=n", "give it once"),
            ("--alias a=b,b=m", "another alias"),
            ("--alias a=a", "another alias"),
            ("--body-bytes 0", "--body-bytes"),
        ] {
            let error = resolved(words).unwrap_err().to_string();
            assert!(error.contains(part), "{words}: {error}");
        }
        for words in ["--alias a", "--alias =m", "--alias a="] {
            assert!(line(words).err().expect(words).to_string().contains("NAME=MODEL"));
        }
    }

    #[test]
    fn what_a_worker_announces_can_be_reached() {
        let check = |words: &str, listen: &str| {
            let line = line(words).expect(words);
            let listen = Listen { flag: "--listen", address: listen.parse().unwrap(), host: None };
            line.served.check(listen, &line.workers.etcd).map_err(|error| error.to_string())
        };
        let far = "--insecure --etcd http://10.0.0.5:2379";
        assert_eq!(check("", "127.0.0.1:0"), Ok(()));
        assert_eq!(check("--etcd 127.0.0.1:2379", "127.0.0.1:0"), Ok(()));
        assert_eq!(check(far, "10.0.0.7:7001"), Ok(()));
        let advertised = format!("{far} --advertise 10.0.0.7:7001");
        assert_eq!(check(&advertised, "0.0.0.0:7001"), Ok(()));
        let hidden = format!("{far} --advertise localhost:7001");
        for (words, listen, part) in [
            (far, "127.0.0.1:0", "--listen HOST:PORT"),
            ("--insecure", "0.0.0.0:7001", "--advertise http://HOST:PORT"),
            ("", "10.0.0.7:7001", "--cluster-cert"),
            ("", "10.0.0.7:7001", "--insecure"),
            (&hidden, "10.0.0.7:7001", "--advertise HOST:PORT"),
        ] {
            let error = check(words, listen).unwrap_err();
            assert!(error.contains(part), "{words}: {error}");
        }
    }

    #[tokio::test]
    async fn a_router_is_told_once_where_its_workers_are() {
        for (words, part) in [
            ("", "--workers"),
            ("--etcd http://a:1 --workers b:1", "give one"),
            ("--etcd https://a:1", "--etcd-ca"),
        ] {
            let error = line(words).expect(words).workers.connect().await.err().expect(words);
            assert!(error.to_string().contains(part), "{words}: {error}");
        }
        let listed = line("--workers a:1,http://b:2").unwrap().workers;
        assert_eq!(listed.workers, ["http://a:1", "http://b:2"]);
        assert!(listed.connect().await.is_ok());
    }
}
