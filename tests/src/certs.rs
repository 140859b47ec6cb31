//! A private CA of a test's own, and certificates of it.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair};
use tempfile::TempDir;
use time::OffsetDateTime;

use crate::lockstep;

/// A folder with `ca.crt`, `ca.key` and what was issued.
pub struct Ca(TempDir);

impl Ca {
    /// As `lockstep certs init` makes it.
    pub fn init() -> Self {
        let ca = Self(tempfile::tempdir().expect("a folder"));
        certs(&["init", ca.folder()]);
        ca
    }

    fn folder(&self) -> &str {
        self.0.path().to_str().expect("a path in UTF-8")
    }

    /// As `lockstep certs issue` does it, for this machine.
    pub fn issue(&self, name: &str, flags: &[&str]) {
        let san = ["--san", "localhost,127.0.0.1"];
        certs(&[&["issue", self.folder(), name], &san[..], flags].concat());
    }

    /// The same, valid for so long only, or not any more.
    pub fn issue_until(&self, name: &str, until: Option<Duration>) {
        let read = |name: &str| std::fs::read_to_string(self.path(name)).expect("the CA");
        let key = KeyPair::from_pem(&read("ca.key")).expect("the CA's key");
        let issuer = Issuer::from_ca_cert_pem(&read("ca.crt"), key).expect("the CA");
        let names = ["localhost", "127.0.0.1", "lockstep"].map(str::to_owned).to_vec();
        let mut params = CertificateParams::new(names).expect("names");
        let now = OffsetDateTime::now_utc();
        params.not_before = now - Duration::from_secs(3600);
        params.not_after = until.map_or(now - Duration::from_secs(60), |until| now + until);
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let own = KeyPair::generate().expect("a key");
        let issued = params.signed_by(&own, &issuer).expect("a certificate");
        self.write(&format!("{name}.key"), &own.serialize_pem());
        self.write(&format!("{name}.crt"), &issued.pem());
    }

    fn write(&self, name: &str, text: &str) {
        let (path, new) = (self.file(name), self.file(&format!("{name}.new")));
        std::fs::write(&new, text).expect("a file");
        std::fs::rename(new, path).expect("a file");
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Of a file there.
    pub fn path(&self, name: &str) -> String {
        self.file(name).to_str().expect("a path in UTF-8").to_owned()
    }

    /// Flags with the files of `name`: their prefix is `cluster`, `tls` or `etcd`, or empty.
    pub fn flags(&self, prefix: &str, name: &str) -> Vec<String> {
        let dash = if prefix.is_empty() { "" } else { "-" };
        let ca = if prefix == "tls" { "client-ca" } else { "ca" };
        [("cert", format!("{name}.crt")), ("key", format!("{name}.key")), (ca, "ca.crt".into())]
            .iter()
            .flat_map(|(flag, file)| [format!("--{prefix}{dash}{flag}"), self.path(file)])
            .collect()
    }
}

fn certs(arguments: &[&str]) {
    let output = Command::new(lockstep()).arg("certs").args(arguments).output();
    let output = output.expect("lockstep runs");
    assert!(output.status.success(), "{arguments:?}: {output:?}");
}

/// A file's text, cut in its middle: as whoever copies it leaves it for a moment.
pub fn half(path: &Path) -> String {
    let text = std::fs::read_to_string(path).expect("a file");
    text[..text.len() / 2].to_owned()
}
