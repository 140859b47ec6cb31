//! A real etcd of several members that may be killed, stopped, started again and robbed of their
//! data, at addresses that stay the same.

use std::{
    net::TcpListener,
    process::{Command, Stdio},
    sync::atomic::{AtomicU16, Ordering},
    time::Duration,
};

use serde_json::Value;

use crate::{Process, skip, wait_for};

const DEADLINE: Duration = Duration::from_secs(30);

struct Member {
    client: String,
    arguments: Vec<String>,
    /// `None` while it is not there.
    process: Option<Process>,
}

/// The members, ended with the value.
pub struct Registry {
    members: Vec<Member>,
    data: tempfile::TempDir,
}

/// Ports that nothing takes while their owner is away: below those that connections are given.
fn ports(count: usize) -> Vec<u16> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = 12_000 + (std::process::id() % 1000) as u16 * 8;
    let next = || first + NEXT.fetch_add(1, Ordering::Relaxed);
    let free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    std::iter::repeat_with(next).filter(free).take(count).collect()
}

impl Registry {
    /// Waits until all speak. `None` where etcd is not installed.
    pub fn start(count: usize) -> Option<Self> {
        if Command::new("etcd").arg("--version").output().is_err() {
            return skip("etcd; apt-get install etcd-server runs this test");
        }
        if Command::new("etcdctl").arg("version").output().is_err() {
            return skip("etcdctl; apt-get install etcd-client runs this test");
        }
        let data = tempfile::tempdir().expect("a folder");
        let urls: Vec<String> =
            ports(2 * count).iter().map(|port| format!("http://127.0.0.1:{port}")).collect();
        let (clients, peers) = urls.split_at(count);
        let named = peers.iter().enumerate().map(|(at, peer)| format!("m{at}={peer}"));
        let all = named.collect::<Vec<_>>().join(",");
        let member = |at: usize| {
            let name = format!("m{at}");
            let folder = data.path().join(&name).display().to_string();
            let flags = [
                ("--name", name.as_str()),
                ("--data-dir", &folder),
                ("--listen-client-urls", &clients[at]),
                ("--advertise-client-urls", &clients[at]),
                ("--listen-peer-urls", &peers[at]),
                ("--initial-advertise-peer-urls", &peers[at]),
                ("--initial-cluster", &all),
            ];
            let words = flags.iter().flat_map(|(flag, value)| [*flag, *value]);
            let arguments = words.map(str::to_owned).collect();
            Member { client: clients[at].clone(), arguments, process: None }
        };
        let mut registry = Self { members: (0..count).map(member).collect(), data };
        (0..count).for_each(|at| registry.start_member(at));
        registry.await_majority();
        Some(registry)
    }

    /// Where the members are, as `--etcd` takes it.
    pub fn endpoints(&self) -> String {
        self.members.iter().map(|member| &*member.client).collect::<Vec<_>>().join(",")
    }

    pub fn count(&self) -> usize {
        self.members.len()
    }

    pub fn start_member(&mut self, at: usize) {
        let mut command = Command::new("etcd");
        // What is tested is no disk's speed.
        command.arg("--unsafe-no-fsync");
        command.args(&self.members[at].arguments).stdout(Stdio::null()).stderr(Stdio::null());
        self.members[at].process = Some(Process::spawn(&mut command));
    }

    pub fn kill(&mut self, at: usize) {
        // Dropping kills.
        self.members[at].process = None;
    }

    pub fn signal(&self, at: usize, name: &str) {
        self.members[at].process.as_ref().expect("a running member").signal(name);
    }

    /// Deletes what the members, none of which runs, have stored.
    pub fn forget(&self) {
        assert!(self.members.iter().all(|member| member.process.is_none()), "all are down");
        for at in 0..self.count() {
            std::fs::remove_dir_all(self.data.path().join(format!("m{at}"))).expect("a folder");
        }
    }

    /// The member that leads the others.
    pub fn leader(&self) -> usize {
        let is_leader = |at: &usize| {
            let words = ["endpoint", "status", "--write-out", "json"];
            let told: Value =
                serde_json::from_str(&self.etcdctl(*at, &words).unwrap_or_default()).ok()?;
            let status = &told[0]["Status"];
            (status["leader"] == status["header"]["member_id"]).then_some(())
        };
        (0..self.count()).find(|at| is_leader(at).is_some()).expect("a leader")
    }

    /// Waits until a change is taken, through any member.
    pub fn await_majority(&self) {
        let put = |at| self.etcdctl(at, &["put", "/tests/alive", "yes"]).is_some();
        let look = || (0..self.count()).any(put);
        wait_for("a majority of etcd members", DEADLINE, look, |taken| *taken);
    }

    /// Waits until each member takes changes.
    pub fn await_all(&self) {
        let put = |at| self.etcdctl(at, &["put", "/tests/alive", "yes"]).is_some();
        let look = || (0..self.count()).filter(|&at| put(at)).count();
        wait_for("all etcd members", DEADLINE, look, |taken| *taken == self.count());
    }

    /// What one member says; `None` where it does not.
    fn etcdctl(&self, at: usize, words: &[&str]) -> Option<String> {
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").args(["--endpoints", &self.members[at].client]);
        command.args(["--dial-timeout", "300ms", "--command-timeout", "500ms"]).args(words);
        let output = command.output().expect("etcdctl");
        output.status.success().then(|| String::from_utf8(output.stdout).expect("text"))
    }
}
