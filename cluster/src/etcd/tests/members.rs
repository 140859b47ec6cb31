//! Real etcd members on loopback, ended with the value.

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use tempfile::TempDir;
use tokio::sync::watch;

use crate::{Etcd, EtcdOptions, Instance, Roster, State};

/// One etcd process.
pub struct Member {
    process: Child,
    arguments: Vec<String>,
    pub endpoint: String,
}

/// An etcd cluster. `None` from `start` means that no etcd is installed.
pub struct Cluster {
    pub members: Vec<Member>,
    data: TempDir,
}

fn ports(count: usize) -> Vec<u16> {
    let held: Vec<_> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    held.iter().map(|listener| listener.local_addr().unwrap().port()).collect()
}

fn spawn(arguments: &[String]) -> Child {
    let mut command = Command::new("etcd");
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().unwrap()
}

impl Cluster {
    /// Starts `count` members and waits until they answer.
    pub async fn start(count: usize) -> Option<Self> {
        Self::start_with(count, &[]).await
    }

    /// The same, with further flags of etcd.
    pub async fn start_with(count: usize, flags: &[&str]) -> Option<Self> {
        if Command::new("etcd").arg("--version").output().is_err() {
            let want = "etcd is not installed; apt-get install etcd-server runs this test";
            // `./dev test` brings everything.
            assert!(std::env::var_os("LOCKSTEP_TEST_WHOLE").is_none(), "{want}");
            eprintln!("SKIPPED: {want}");
            return None;
        }
        let data = TempDir::new().unwrap();
        let ports = ports(2 * count);
        let peers: Vec<_> =
            (0..count).map(|at| format!("m{at}=http://127.0.0.1:{}", ports[count + at])).collect();
        let members = (0..count)
            .map(|at| {
                let client = format!("http://127.0.0.1:{}", ports[at]);
                let peer = format!("http://127.0.0.1:{}", ports[count + at]);
                let folder = data.path().join(format!("m{at}")).display().to_string();
                let mut arguments = vec!["--name".to_owned(), format!("m{at}")];
                for (flag, value) in [
                    ("--data-dir", folder.as_str()),
                    ("--listen-client-urls", &client),
                    ("--advertise-client-urls", &client),
                    ("--listen-peer-urls", &peer),
                    ("--initial-advertise-peer-urls", &peer),
                    ("--initial-cluster", &peers.join(",")),
                    ("--heartbeat-interval", "50"),
                    ("--election-timeout", "500"),
                ] {
                    arguments.extend([flag.to_owned(), value.to_owned()]);
                }
                arguments.push("--unsafe-no-fsync".to_owned());
                arguments.extend(flags.iter().map(|&flag| flag.to_owned()));
                Member { process: spawn(&arguments), arguments, endpoint: client }
            })
            .collect();
        let cluster = Self { members, data };
        let began = Instant::now();
        while Etcd::connect(cluster.options()).await.is_err() {
            assert!(began.elapsed() < Duration::from_secs(30), "etcd does not answer");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Some(cluster)
    }

    /// Impatient options, so that tests are quick.
    pub fn options(&self) -> EtcdOptions {
        let endpoints = self.members.iter().map(|member| member.endpoint.clone()).collect();
        let mut options = EtcdOptions::new(endpoints, "test");
        options.lease = Duration::from_secs(3);
        options.call_deadline = Duration::from_millis(700);
        options.grace = Duration::from_secs(6);
        options
    }

    pub fn etcdctl(&self, arguments: &[&str]) -> String {
        let endpoint = &self.members[0].endpoint;
        let output = Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", endpoint])
            .args(arguments)
            .output()
            .expect("etcdctl, of the package etcd-client");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Ends a member, forgets everything that it stored, and starts it again.
    pub fn restart_empty(&mut self, at: usize) {
        self.members[at].kill();
        let _absent = std::fs::remove_dir_all(self.data.path().join(format!("m{at}")));
        self.members[at].process = spawn(&self.members[at].arguments);
    }
}

impl Member {
    pub fn kill(&mut self) {
        let _ended = self.process.kill();
        self.process.wait().unwrap();
    }

    pub fn signal(&self, name: &str) {
        // The shell's own: the program `kill` is not on every machine.
        let kill = format!("kill {name} {}", self.process.id());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.kill();
    }
}

pub fn instance(id: &str) -> Instance {
    Instance {
        id: id.to_owned(),
        model: "demo".to_owned(),
        fingerprint: "f".to_owned(),
        address: "http://127.0.0.1:7001".to_owned(),
        protocol: proto::WORKER_PROTOCOL,
        started: 0,
        state: State::Loading,
        context_max: 2048,
        vocab_size: 1000,
        ranks: 2,
        blocks_total: 64,
        epoch: 0,
        reason: String::new(),
    }
}

/// Waits, for a bounded time, until the roster is as wanted.
pub async fn wait(
    roster: &mut watch::Receiver<Roster>,
    what: &str,
    wanted: impl Fn(&[Arc<Instance>]) -> bool,
) {
    let waiting = roster.wait_for(|roster| wanted(roster));
    let done = tokio::time::timeout(Duration::from_secs(20), waiting).await;
    if !done.is_ok_and(|seen| seen.is_ok()) {
        panic!("waited in vain for: {what}; the roster is {:?}", roster.borrow());
    }
}

pub fn ids(roster: &[Arc<Instance>]) -> Vec<&str> {
    roster.iter().map(|instance| instance.id.as_str()).collect()
}
