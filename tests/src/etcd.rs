//! A real etcd of one member.

use std::{
    net::{TcpListener, TcpStream},
    process::{Command, Stdio},
    time::Duration,
};

use crate::{Ca, Process, skip, wait_for};

const DEADLINE: Duration = Duration::from_secs(30);

/// A registry of one member: the process, its URL and its data. `None` where etcd is not installed.
pub fn etcd() -> Option<(Process, String, tempfile::TempDir)> {
    etcd_with(None)
}

/// The same, by TLS alone: its certificate is `etcd` of the CA, of which clients must have one.
pub fn secure_etcd(ca: &Ca) -> Option<(Process, String, tempfile::TempDir)> {
    etcd_with(Some(ca))
}

fn etcd_with(ca: Option<&Ca>) -> Option<(Process, String, tempfile::TempDir)> {
    if Command::new("etcd").arg("--version").output().is_err() {
        return skip("etcd is not installed; apt-get install etcd-server runs this test");
    }
    let data = tempfile::tempdir().expect("a folder");
    let held = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").expect("a port"));
    let ports = held.each_ref().map(|port| port.local_addr().expect("a bound port").to_string());
    drop(held);
    let scheme = if ca.is_some() { "https" } else { "http" };
    let (client, peer) = (format!("{scheme}://{}", ports[0]), format!("http://{}", ports[1]));
    let mut command = Command::new("etcd");
    command
        .arg("--data-dir")
        .arg(data.path())
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("default={peer}")])
        // What is tested is no disk's speed.
        .arg("--unsafe-no-fsync")
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    if let Some(ca) = ca {
        command.args(["--cert-file", &ca.path("etcd.crt"), "--key-file", &ca.path("etcd.key")]);
        command.args(["--trusted-ca-file", &ca.path("ca.crt"), "--client-cert-auth"]);
    }
    let process = Process::spawn(&mut command);
    wait_for("etcd", DEADLINE, || TcpStream::connect(&ports[0]).map(drop), Result::is_ok);
    Some((process, client, data))
}
