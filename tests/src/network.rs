//! Hosts as far as the network goes: namespaces of the kernel on one switch, all inside of a
//! network that the calling test has for itself.
//!
//! Links are made in there alone, so nothing of the machine's own network is touched; a namespace
//! lasts as long as a process that waits for its standard input, so all of it ends with the test,
//! however that ends. What one host sends to another is lost by giving it a wrong address of the
//! other's card: nobody hears of it, as with a broken switch, and the other way still works.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use crate::{Log, Process, lockstep, skip, wait_for};

/// Set within the network of a test's own.
const WITHIN: &str = "LOCKSTEP_TEST_NETWORK";
/// A card that no host has.
const NOBODY: &str = "02:00:00:00:00:ff";

/// Runs `body` in a network of its own: the calling test is run once more there, alone, for up to
/// `limit`. Leaves it out, loudly, where this machine has no such networks.
pub fn in_own_network(limit: Duration, body: impl FnOnce()) {
    if std::env::var_os(WITHIN).is_some() {
        return body();
    }
    if Command::new("ip").arg("-V").output().is_err() {
        return skip("ip, of the package iproute2").unwrap_or_default();
    }
    // Whoever is not root may be so in a network of his own, on most machines.
    let ways: [&[&str]; 2] = [&["--net"], &["--user", "--map-root-user", "--net"]];
    let open = |way: &&[&str]| {
        let output = Command::new("unshare").args(*way).arg("true").output();
        output.is_ok_and(|output| output.status.success())
    };
    let Some(way) = ways.into_iter().find(open) else {
        eprintln!("SKIPPED: this machine gives its user no network of his own (unshare --net)");
        return;
    };
    let thread = std::thread::current();
    let name = thread.name().expect("a test's thread has its name");
    let mut command = Command::new("unshare");
    command.args(way).arg(std::env::current_exe().expect("the test's own path"));
    command.args(["--exact", name, "--include-ignored", "--nocapture"]).env(WITHIN, "1");
    let status = Process::spawn(&mut command).wait(limit);
    assert!(status.success(), "{name}: {status}");
}

/// Keeps a namespace: a process that ends with this value, or with the test.
struct Keeper(Child);

impl Keeper {
    fn start() -> Self {
        let mut command = Command::new("unshare");
        command.args(["--net", "cat"]).stdin(Stdio::piped()).stdout(Stdio::null());
        let keeper = Self(command.spawn().expect("unshare runs"));
        // The namespace is entered before the other program starts.
        let of = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/net")).ok();
        let own = of("self");
        let look = || of(&keeper.0.id().to_string());
        wait_for("a namespace", Duration::from_secs(10), look, |its| its.is_some() && *its != own);
        keeper
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _status = self.0.wait();
    }
}

/// Hosts by number, from 0, which is where the test itself runs.
pub struct Network {
    /// Of the other hosts.
    keepers: Vec<Keeper>,
}

impl Network {
    /// So many hosts, which all reach each other. Only within [`in_own_network`].
    pub fn new(hosts: usize) -> Self {
        assert!(std::env::var_os(WITHIN).is_some(), "links are made in a network of one's own");
        let network = Self { keepers: (1..hosts).map(|_| Keeper::start()).collect() };
        network.ip(0, "link set lo up");
        network.ip(0, &format!("link add switch address {} type bridge", card(0)));
        network.ip(0, "link set switch up");
        for host in 1..hosts {
            let keeper = network.keepers[host - 1].0.id();
            let pair = format!("link add port{host} type veth peer name cable netns {keeper}");
            network.ip(0, &pair);
            network.ip(0, &format!("link set port{host} master switch up"));
            network.ip(host, &format!("link set cable address {} up", card(host)));
            network.ip(host, "link set lo up");
        }
        for host in 0..hosts {
            let device = device(host);
            network.ip(host, &format!("address add {}/24 dev {device}", Self::address(host)));
            (0..hosts).filter(|to| *to != host).for_each(|to| network.heal(host, to));
        }
        network
    }

    /// A host's address.
    pub fn address(host: usize) -> String {
        format!("10.77.0.{}", host + 1)
    }

    /// A program to run on a host.
    pub fn command(&self, host: usize, program: &Path) -> Command {
        match host {
            0 => Command::new(program),
            _ => {
                let keeper = self.keepers[host - 1].0.id();
                let mut command = Command::new("nsenter");
                command.arg(format!("--net=/proc/{keeper}/ns/net")).arg(program);
                command
            }
        }
    }

    /// `lockstep` on a host, and what it logs.
    pub fn lockstep(&self, host: usize, arguments: &[&str]) -> (Process, Log) {
        let mut command = self.command(host, &lockstep());
        Process::spawn_logged(command.args(arguments).stdout(Stdio::null()))
    }

    /// From now on what `from` sends to `to` is lost.
    pub fn cut(&self, from: usize, to: usize) {
        self.neighbour(from, to, NOBODY);
    }

    /// The end of [`Self::cut`].
    pub fn heal(&self, from: usize, to: usize) {
        self.neighbour(from, to, &card(to));
    }

    /// Pulls a host's cable at the switch.
    pub fn unplug(&self, host: usize) {
        self.ip(0, &format!("link set port{host} down"));
    }

    /// The end of [`Self::unplug`].
    pub fn plug(&self, host: usize) {
        self.ip(0, &format!("link set port{host} up"));
    }

    fn neighbour(&self, from: usize, to: usize, card: &str) {
        let device = device(from);
        let to = Self::address(to);
        self.ip(from, &format!("neigh replace {to} lladdr {card} nud permanent dev {device}"));
    }

    fn ip(&self, host: usize, words: &str) {
        let mut command = self.command(host, Path::new("ip"));
        let output = command.args(words.split(' ')).output().expect("ip runs");
        assert!(output.status.success(), "ip {words}: {output:?}");
    }
}

fn card(host: usize) -> String {
    format!("02:00:00:00:00:{:02x}", host + 1)
}

fn device(host: usize) -> &'static str {
    if host == 0 { "switch" } else { "cable" }
}
