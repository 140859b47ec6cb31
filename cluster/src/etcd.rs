//! The roster in etcd: instances are keys under a lease, read by list-then-watch.
//!
//! etcd is trusted to say who is alive, not to be there: the roster last known stays in use while
//! etcd is away, and a registration is renewed for as long as its owner lives. Each task speaks to
//! one member at a time and moves on at the first doubt, because a member that is stopped or cut
//! off keeps its connections open. Every call has a deadline.

mod group;
mod keeper;
mod session;
mod view;
mod watcher;

use std::{
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use tokio::{sync::watch, task::JoinHandle};

use crate::{Instance, Membership, MembershipError, Registration, Roster};
pub use group::{Epoch, GroupKey, Reign, route_to};
use session::{Fault, Session};
use view::View;

/// Instances of one cluster, at most.
const INSTANCES_MAX: usize = 10_000;

/// Where the registry is and how patient to be with it.
#[derive(Clone, Debug)]
pub struct EtcdOptions {
    /// Member addresses, e.g. `http://127.0.0.1:2379`.
    pub endpoints: Vec<String>,
    /// Clusters of different names share an etcd without seeing each other.
    pub cluster: String,
    /// User and password, where etcd asks for them.
    pub user: Option<(String, String)>,
    /// With it members are reached by TLS alone, and shown a certificate where there is one.
    pub tls: Option<tls::Client>,
    /// A dead process is out of the roster after this.
    pub lease: Duration,
    /// For each call, and for connecting.
    pub call_deadline: Duration,
    /// How long instances that vanished together after trouble with etcd are still believed in.
    pub grace: Duration,
}

impl EtcdOptions {
    /// The usual patience: leases of 10 s, calls of 2 s, 30 s of grace.
    pub fn new(endpoints: Vec<String>, cluster: impl Into<String>) -> Self {
        Self {
            endpoints,
            cluster: cluster.into(),
            user: None,
            tls: None,
            lease: Duration::from_secs(10),
            call_deadline: Duration::from_secs(2),
            grace: Duration::from_secs(30),
        }
    }

    fn check(&self) -> Result<(), MembershipError> {
        let invalid = |message: String| Err(MembershipError::Invalid(message));
        if self.endpoints.is_empty() {
            return invalid("no etcd address given; use --etcd http://HOST:2379".into());
        }
        for endpoint in &self.endpoints {
            let rest = bare(endpoint);
            match &self.tls {
                None if endpoint.starts_with("https://") => {
                    let remedy = "name the CA of its certificate with --etcd-ca";
                    return invalid(format!("etcd address {endpoint}: {remedy}"));
                }
                Some(_) if endpoint.starts_with("http://") => {
                    let remedy = "write https://, or leave --etcd-ca and --etcd-cert out";
                    return invalid(format!("etcd address {endpoint}: no TLS there; {remedy}"));
                }
                _ => {}
            }
            if rest.is_empty() || rest.contains(['/', ' ', ',']) {
                let wanted = "use http://HOST:PORT or https://, several with commas between";
                return invalid(format!("etcd address {endpoint:?} is no address; {wanted}"));
            }
        }
        if self.lease < Duration::from_secs(1) {
            return invalid(format!("a lease of {:?} is too short; at least 1 s", self.lease));
        }
        check_name("cluster name", &self.cluster)
    }

    fn prefix(&self) -> String {
        format!("/lockstep/{}/instances/", self.cluster)
    }

    /// The keys of all instances: the first, and the first behind them.
    fn keys(&self) -> (Vec<u8>, Vec<u8>) {
        let first = self.prefix().into_bytes();
        let mut end = first.clone();
        // The prefix ends in a slash: no carry.
        *end.last_mut().expect("a prefix is not empty") += 1;
        (first, end)
    }
}

/// Without the scheme.
fn bare(endpoint: &str) -> &str {
    let cut = |scheme| endpoint.strip_prefix(scheme);
    cut("http://").or_else(|| cut("https://")).unwrap_or(endpoint)
}

/// Names become parts of keys, so they may not contain separators.
fn check_name(what: &str, name: &str) -> Result<(), MembershipError> {
    let fine = |c: char| c.is_ascii_alphanumeric() || "._-:".contains(c);
    if name.is_empty() || name.len() > 128 || !name.chars().all(fine) {
        return Err(MembershipError::Invalid(format!(
            "{what} {name:?} is not usable: 1 to 128 letters, digits, dots, colons, dashes"
        )));
    }
    Ok(())
}

/// Membership over an etcd cluster.
pub struct Etcd {
    options: Arc<EtcdOptions>,
    /// The member that answered first; those before it did not.
    found: usize,
    /// As first read, with what follows it from then on.
    first: Mutex<Option<(View, watch::Sender<Roster>)>>,
    roster: watch::Receiver<Roster>,
    watcher: OnceLock<JoinHandle<()>>,
}

impl Etcd {
    /// Reads the roster once, which proves that etcd answers. Whoever asks for the roster has it
    /// followed from then on, for as long as the value lives; who only announces does not.
    ///
    /// # Errors
    /// `Invalid` for options that cannot work, `Refused` where etcd says no, `Unreachable` where
    /// no member answers in time.
    pub async fn connect(options: EtcdOptions) -> Result<Self, MembershipError> {
        options.check()?;
        let options = Arc::new(options);
        let mut faults = Vec::new();
        for at in 0..options.endpoints.len() {
            match Self::first_list(&options, at).await {
                Ok(view) => {
                    let (sender, roster) = watch::channel(view.roster());
                    let (first, watcher) = (Mutex::new(Some((view, sender))), OnceLock::new());
                    return Ok(Self { options, found: at, first, roster, watcher });
                }
                Err(Fault::Refused(reason)) => return Err(MembershipError::Refused(reason)),
                Err(fault) => faults.push(format!("{}: {fault}", options.endpoints[at])),
            }
        }
        Err(unreachable(&options, faults.join("; ")))
    }

    async fn first_list(options: &Arc<EtcdOptions>, at: usize) -> Result<View, Fault> {
        let mut session = Session::open(options, at).await?;
        let mut view = View::new(options.prefix(), options.grace);
        view.replace(session.list().await?, std::time::Instant::now());
        Ok(view)
    }
}

fn unreachable(options: &EtcdOptions, reason: String) -> MembershipError {
    MembershipError::Unreachable { endpoints: options.endpoints.join(","), reason }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        if let Some(watcher) = self.watcher.get() {
            watcher.abort();
        }
    }
}

#[async_trait::async_trait]
impl Membership for Etcd {
    async fn announce(
        &self,
        instance: watch::Receiver<Instance>,
    ) -> Result<Box<dyn Registration>, MembershipError> {
        check_name("instance id", &instance.borrow().id)?;
        instance.borrow().encode()?;
        let registration = keeper::start(self.options.clone(), self.found, instance).await?;
        Ok(Box::new(registration))
    }

    fn roster(&self) -> watch::Receiver<Roster> {
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((view, sender)) = first {
            let (options, found) = (self.options.clone(), self.found);
            self.watcher.get_or_init(|| watcher::spawn(options, view, found, sender));
        }
        self.roster.clone()
    }
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod option_tests {
    use super::*;

    #[test]
    fn options_that_cannot_work_are_refused_with_the_remedy() {
        let with = |endpoint: &str, cluster: &str| {
            EtcdOptions::new(vec![endpoint.to_owned()], cluster).check()
        };
        assert!(with("http://127.0.0.1:2379", "main").is_ok());
        assert!(with("127.0.0.1:2379", "main").is_ok());
        for (endpoint, cluster, word) in [
            ("https://a:2379", "main", "--etcd-ca"),
            ("http://", "main", "http://HOST:PORT"),
            ("http://a:1,http://b:2", "main", "commas"),
            ("http://a:1", "a/b", "cluster name"),
            ("http://a:1", "", "cluster name"),
        ] {
            let error = with(endpoint, cluster).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        assert!(EtcdOptions::new(vec![], "main").check().is_err());
    }
}
