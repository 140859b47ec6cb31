//! Who leads a group whose ranks run on several machines: one key for each group, under the lease
//! of its leader.
//!
//! The key tells the other machines where the leader waits for their ranks. Each leader opens an
//! epoch of its own, one above the last: a number in a key without a lease keeps them apart. A
//! leader that etcd has forgotten leads on, and enters its key again where nobody else has led
//! meanwhile. It listens where its key says for as long as it leads: where a connection is refused,
//! it has ended, and the next need not wait for the end of its lease.

mod keeper;

use std::{
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket},
    sync::Arc,
    time::{Duration, Instant},
};

use proto::etcd::{
    Compare, PutRequest, RangeResponse,
    compare::{CompareTarget, TargetUnion},
    event::EventType,
};
use serde::{Deserialize, Serialize};
use tokio::{
    net::TcpStream,
    sync::watch,
    time::{sleep, timeout},
};

use super::{
    EtcdOptions, bare, check_name,
    keeper::{PAUSE, State, Trouble},
    session::{Fault, Session},
    unreachable,
};
use crate::MembershipError;
use keeper::Keeper;

/// Bytes of an epoch in its outer form, at most.
const EPOCH_BYTES_MAX: usize = 64 * 1024;
/// With nothing to hear for this long the key is read again.
const SILENCE: Duration = Duration::from_secs(5);
/// How long a leader may take to be seen alive.
const KNOCK_LIMIT: Duration = Duration::from_secs(1);
/// Above a lease: until then, the key of a leader that has died is gone.
const MARGIN: Duration = Duration::from_secs(2);

/// One leader's time, as the other machines learn of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Epoch {
    /// From 1 on; a later leader's is higher.
    pub epoch: u64,
    /// Where the leader waits for ranks, and listens for as long as it leads.
    pub leader: SocketAddr,
    /// The secret of this epoch.
    pub token: String,
    /// Ranks of each machine, the leader's first.
    pub ranks: Vec<usize>,
    /// Of the program: others do not understand what the leader says.
    pub version: String,
    /// Whether ranks come by TLS.
    pub tls: bool,
}

/// The key of one group.
#[derive(Clone, Debug)]
pub struct GroupKey {
    options: Arc<EtcdOptions>,
    id: String,
}

impl GroupKey {
    /// # Errors
    /// `Invalid` for options or an id that cannot work.
    pub fn new(options: EtcdOptions, id: impl Into<String>) -> Result<Self, MembershipError> {
        options.check()?;
        let id = id.into();
        check_name("group id", &id)?;
        Ok(Self { options: Arc::new(options), id })
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    fn key(&self) -> String {
        format!("/lockstep/{}/groups/{}", self.options.cluster, self.id)
    }

    /// Where the number of the last epoch is.
    fn number(&self) -> String {
        format!("/lockstep/{}/epochs/{}", self.options.cluster, self.id)
    }

    /// This machine's address on the way to etcd, which other machines that reach etcd see too.
    ///
    /// # Errors
    /// `Unreachable` where no member's name or route is known.
    pub fn local_address(&self) -> Result<IpAddr, MembershipError> {
        let mut faults = Vec::new();
        for endpoint in &self.options.endpoints {
            match route_to(bare(endpoint)) {
                Ok(address) => return Ok(address),
                Err(error) => faults.push(format!("{endpoint}: {error}")),
            }
        }
        Err(unreachable(&self.options, faults.join("; ")))
    }

    /// Opens the next epoch and keeps it open until the value is dropped. What `offer` says as its
    /// number does not count; `told` gets the right one before others can read it, and may be
    /// called again with another. Waits for the end of a leader that has died: until a connection
    /// to it is refused, or for a lease.
    ///
    /// # Errors
    /// `Invalid` where another leads this group and lives; as [`crate::Etcd::connect`].
    pub async fn lead(
        &self,
        offer: Epoch,
        mut told: impl FnMut(u64),
    ) -> Result<Reign, MembershipError> {
        let began = Instant::now();
        let patience = self.options.lease + MARGIN;
        let (mut at, mut waiting) = (0, false);
        loop {
            let fault = match self.try_lead(at, &offer, &mut told).await {
                Ok(Attempt::Leads(epoch, lease)) => return Ok(self.keep(epoch, lease, at)),
                Ok(Attempt::Led(other)) => {
                    let Epoch { epoch, leader, .. } = other;
                    if began.elapsed() > patience {
                        return Err(MembershipError::Invalid(format!(
                            "the group {} is led already, in epoch {epoch}, from {leader}: end \
                             that leader, or give this group another --group",
                            self.id
                        )));
                    }
                    if !std::mem::replace(&mut waiting, true) {
                        tracing::info!(
                            group = self.id, epoch, %leader,
                            "waiting for the end of the leader before"
                        );
                    }
                    None
                }
                Ok(Attempt::Overtaken) => None,
                Err(Fault::Refused(reason)) => return Err(MembershipError::Refused(reason)),
                Err(fault) => Some(fault),
            };
            if let Some(fault) = fault {
                at += 1;
                // Every member may be tried several times.
                if began.elapsed() > patience.max(self.options.call_deadline * 8) {
                    return Err(unreachable(&self.options, fault.to_string()));
                }
            }
            sleep(PAUSE).await;
        }
    }

    async fn try_lead(
        &self,
        at: usize,
        offer: &Epoch,
        told: &mut impl FnMut(u64),
    ) -> Result<Attempt, Fault> {
        let mut session = Session::open(&self.options, at).await?;
        let found = session.get(&self.key()).await?;
        let place = match (read(&found), found.kvs.first()) {
            (Some(other), Some(kv)) if has_ended(&other, offer).await => {
                let Epoch { epoch, leader, .. } = other;
                tracing::info!(group = self.id, epoch, %leader, "the leader before has ended");
                unchanged(self.key(), kv.mod_revision)
            }
            (Some(other), _) => return Ok(Attempt::Led(other)),
            (None, None) => absent(self.key()),
            (None, Some(_)) => {
                let reason = format!("{} has what no leader wrote; delete the key", self.key());
                return Err(Fault::Refused(reason));
            }
        };
        let last = session.get(&self.number()).await?;
        let (number, revision) = match last.kvs.first() {
            None => (0, 0),
            Some(kv) => {
                let number = std::str::from_utf8(&kv.value).ok().and_then(|text| text.parse().ok());
                let wrong = || Fault::Refused(format!("{} is no number", self.number()));
                (number.ok_or_else(wrong)?, kv.mod_revision)
            }
        };
        let epoch = Epoch { epoch: number + 1, ..offer.clone() };
        told(epoch.epoch);
        let lease = session.grant().await?;
        let compare = vec![place, unchanged(self.number(), revision)];
        if session.put_if(compare, self.entry(&epoch, lease)?).await? {
            return Ok(Attempt::Leads(epoch, lease));
        }
        session.revoke(lease).await?;
        Ok(Attempt::Overtaken)
    }

    /// What etcd holds of an epoch: the key under its leader's lease, and the number.
    fn entry(&self, epoch: &Epoch, lease: i64) -> Result<Vec<PutRequest>, Fault> {
        let number = epoch.epoch.to_string();
        Ok(vec![
            PutRequest { key: self.key().into(), value: encode(epoch)?, lease },
            PutRequest { key: self.number().into(), value: number.into(), lease: 0 },
        ])
    }

    fn keep(&self, epoch: Epoch, lease: i64, at: usize) -> Reign {
        let (stop, stopped) = watch::channel(false);
        let number = epoch.epoch;
        let keeper = Keeper::new(self.clone(), epoch, lease);
        tokio::spawn(keeper.run(at, stopped));
        Reign { epoch: number, stop }
    }

    /// The epoch that etcd tells of, for as long as somebody looks. While etcd is away it is the
    /// one last known.
    pub fn follow(&self) -> watch::Receiver<Option<Epoch>> {
        let (sender, receiver) = watch::channel(None);
        let group = self.clone();
        tokio::spawn(async move {
            let mut trouble = Trouble::default();
            for at in 0.. {
                let fault = tokio::select! {
                    fault = group.watch(at, &sender, &mut trouble) => fault,
                    () = sender.closed() => return,
                };
                let Err(fault) = fault;
                if trouble.failed(Instant::now()).is_some() {
                    tracing::warn!(group = group.id, %fault, "group: trying the next etcd member");
                }
                sleep(PAUSE).await;
            }
        });
        receiver
    }

    /// Returns only with what went wrong.
    async fn watch(
        &self,
        at: usize,
        sender: &watch::Sender<Option<Epoch>>,
        trouble: &mut Trouble,
    ) -> Result<std::convert::Infallible, Fault> {
        let mut session = Session::open(&self.options, at).await?;
        loop {
            let found = session.get(&self.key()).await?;
            if let Some(State { seconds, .. }) = trouble.over(Instant::now()) {
                tracing::info!(group = self.id, seconds, "group: etcd answers again");
            }
            publish(sender, read(&found));
            let revision = found.header.map_or(0, |header| header.revision);
            let mut changes = session.watch_key(&self.key(), revision + 1).await?;
            // In silence the key is read again, which proves that the member lives.
            while let Ok(change) = timeout(SILENCE, changes.message()).await {
                let change = change?.ok_or_else(|| Fault::Broken("the watch ended".into()))?;
                if change.canceled && change.compact_revision == 0 {
                    return Err(Fault::Broken(change.cancel_reason));
                }
                if change.canceled {
                    break;
                }
                for event in change.events {
                    let is_put = event.r#type() == EventType::Put;
                    let value = event.kv.filter(|_| is_put).map(|kv| kv.value);
                    publish(sender, value.and_then(|value| decode(&value)));
                }
            }
        }
    }
}

enum Attempt {
    Leads(Epoch, i64),
    Led(Epoch),
    /// Somebody else was quicker.
    Overtaken,
}

fn publish(sender: &watch::Sender<Option<Epoch>>, found: Option<Epoch>) {
    sender.send_if_modified(|known| {
        let changed = *known != found;
        *known = found;
        changed
    });
}

/// Whether nobody leads any more where `other` did; `offer` is from whoever listens at its own.
async fn has_ended(other: &Epoch, offer: &Epoch) -> bool {
    if other.version != offer.version {
        return false;
    }
    // Whoever is cut off does not refuse.
    let reached = timeout(KNOCK_LIMIT, TcpStream::connect(other.leader)).await;
    let refused = matches!(reached, Ok(Err(e)) if e.kind() == ErrorKind::ConnectionRefused);
    refused || other.leader == offer.leader
}

fn absent(key: String) -> Compare {
    let target_union = Some(TargetUnion::CreateRevision(0));
    Compare { target: CompareTarget::Create.into(), key: key.into(), target_union, result: 0 }
}

fn unchanged(key: String, revision: i64) -> Compare {
    let target_union = Some(TargetUnion::ModRevision(revision));
    Compare { target: CompareTarget::Mod.into(), key: key.into(), target_union, result: 0 }
}

fn encode(epoch: &Epoch) -> Result<Vec<u8>, Fault> {
    serde_json::to_vec(epoch).map_err(|error| Fault::Refused(error.to_string()))
}

fn read(found: &RangeResponse) -> Option<Epoch> {
    found.kvs.first().and_then(|kv| decode(&kv.value))
}

/// Without trusting it.
fn decode(value: &[u8]) -> Option<Epoch> {
    let long = (value.len() > EPOCH_BYTES_MAX).then(|| format!("{} bytes", value.len()));
    let read = || serde_json::from_slice(value).map_err(|error| error.to_string());
    match long.map_or_else(read, Err) {
        Ok(epoch) => Some(epoch),
        Err(reason) => {
            tracing::warn!(reason, "a group's key cannot be read");
            None
        }
    }
}

/// The local address from which packets to `host:port` go; none is sent.
///
/// # Errors
/// The name has no address, or there is no way to it.
pub fn route_to(address: &str) -> std::io::Result<IpAddr> {
    let mut fault = std::io::Error::other("the name has no address");
    for to in address.to_socket_addrs()? {
        let any: IpAddr = match to {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let route = UdpSocket::bind((any, 0)).and_then(|socket| {
            socket.connect(to)?;
            socket.local_addr()
        });
        match route {
            Ok(local) => return Ok(local.ip()),
            Err(error) => fault = error,
        }
    }
    Err(fault)
}

/// An open epoch; it ends with the value.
#[derive(Debug)]
pub struct Reign {
    pub epoch: u64,
    stop: watch::Sender<bool>,
}

impl Drop for Reign {
    /// The task goes on for as long as taking the lease back needs.
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::etcd::tests::members::Cluster;

    fn offer(port: u16) -> Epoch {
        Epoch {
            epoch: 0,
            leader: SocketAddr::from(([127, 0, 0, 1], port)),
            token: "secret".into(),
            ranks: vec![1, 2],
            version: "1".into(),
            tls: false,
        }
    }

    async fn seen(
        epochs: &mut watch::Receiver<Option<Epoch>>,
        what: &str,
        wanted: impl Fn(&Option<Epoch>) -> bool,
    ) {
        let waiting = epochs.wait_for(|epoch| wanted(epoch));
        let done = tokio::time::timeout(Duration::from_secs(20), waiting).await;
        assert!(done.is_ok_and(|seen| seen.is_ok()), "{what}: {:?}", epochs.borrow());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn one_leads_at_a_time_and_each_in_an_epoch_of_its_own() {
        let Some(mut cluster) = Cluster::start(1).await else { return };
        let group = GroupKey::new(cluster.options(), "g").unwrap();
        let other = GroupKey::new(cluster.options(), "h").unwrap();
        let mut epochs = group.follow();
        let mut numbers = Vec::new();
        let door = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = door.local_addr().unwrap().port();
        let first = group.lead(offer(port), |number| numbers.push(number)).await.unwrap();
        assert_eq!((first.epoch, &numbers[..]), (1, &[1][..]));
        let wanted = Some(Epoch { epoch: 1, ..offer(port) });
        seen(&mut epochs, "the first", |epoch| *epoch == wanted).await;
        // Groups of other names do not see each other.
        assert_eq!(other.lead(offer(7), |_| {}).await.unwrap().epoch, 1);

        let began = Instant::now();
        let second = group.lead(offer(2), |_| {}).await.unwrap_err().to_string();
        let told = format!("led already, in epoch 1, from 127.0.0.1:{port}");
        assert!(second.contains(&told), "{second}");
        assert!(began.elapsed() > cluster.options().lease, "a dead one has a lease");
        assert_eq!(epochs.borrow().as_ref().map(|epoch| epoch.epoch), Some(1));

        // Whoever leads on enters the key again where it was lost, and etcd's memory with it.
        let listed = cluster.etcdctl(&["lease", "list"]);
        for lease in listed.lines().skip(1) {
            cluster.etcdctl(&["lease", "revoke", lease]);
        }
        seen(&mut epochs, "gone with its lease", Option::is_none).await;
        seen(&mut epochs, "back", |epoch| epoch.as_ref().is_some_and(|e| e.epoch == 1)).await;
        cluster.restart_empty(0);
        let deadline = Instant::now() + Duration::from_secs(20);
        while !cluster_has(&cluster, &group.key()) {
            assert!(Instant::now() < deadline, "not entered in the empty etcd");
            sleep(PAUSE).await;
        }

        drop(first);
        seen(&mut epochs, "its end", Option::is_none).await;
        let third = group.lead(offer(3), |_| {}).await.unwrap();
        assert_eq!(third.epoch, 2);
        seen(&mut epochs, "the next", |epoch| epoch.as_ref().is_some_and(|e| e.epoch == 2)).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_leader_whose_door_is_closed_is_not_waited_for() {
        let Some(cluster) = Cluster::start(1).await else { return };
        let lease = Duration::from_secs(30);
        let group = GroupKey::new(EtcdOptions { lease, ..cluster.options() }, "g").unwrap();
        let lead = async |offer| group.lead(offer, |_| {}).await.unwrap();
        let mut epochs = group.follow();
        let began = Instant::now();
        let door = TcpListener::bind("127.0.0.1:0").unwrap();
        let open = door.local_addr().unwrap().port();
        let first = lead(offer(1)).await;
        // Nobody listens at port 1, and nobody but the next leader itself at its own address.
        let second = lead(offer(open)).await;
        let third = lead(offer(open)).await;
        assert_eq!([first.epoch, second.epoch, third.epoch], [1, 2, 3]);
        // Those that lost it do not take it back, nor out.
        drop((first, second));
        sleep(Duration::from_secs(3)).await;
        seen(&mut epochs, "the third", |epoch| epoch.as_ref().is_some_and(|e| e.epoch == 3)).await;
        // Another program may close its door when all are in.
        let other = Epoch { version: "2".into(), ..offer(open) };
        let waiting = group.lead(other, |_| {});
        assert!(timeout(Duration::from_secs(3), waiting).await.is_err());
        assert!(began.elapsed() < lease);
    }

    fn cluster_has(cluster: &Cluster, key: &str) -> bool {
        let endpoint = &cluster.members[0].endpoint;
        let output = std::process::Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", endpoint, "get", key])
            .output()
            .expect("etcdctl, of the package etcd-client");
        output.status.success() && !output.stdout.is_empty()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn rubbish_in_the_key_leads_nobody_and_is_in_nobodys_way() {
        let Some(cluster) = Cluster::start(1).await else { return };
        let group = GroupKey::new(cluster.options(), "g").unwrap();
        cluster.etcdctl(&["put", &group.number(), "many"]);
        let error = group.lead(offer(1), |_| {}).await.unwrap_err();
        assert!(error.to_string().contains("is no number"), "{error}");
        cluster.etcdctl(&["put", &group.key(), "hello"]);
        let error = group.lead(offer(1), |_| {}).await.unwrap_err();
        assert!(error.to_string().contains("delete the key"), "{error}");
        assert!(GroupKey::new(cluster.options(), "a/b").is_err());
    }

    #[test]
    fn the_way_to_this_machine_begins_at_loopback() {
        let with = |endpoint: &str| {
            let options = EtcdOptions::new(vec![endpoint.to_owned()], "main");
            GroupKey::new(options, "g").unwrap().local_address()
        };
        assert_eq!(with("http://127.0.0.1:2379").unwrap(), IpAddr::from([127, 0, 0, 1]));
        assert!(with("http://no.such.host.invalid:2379").is_err());
    }
}
