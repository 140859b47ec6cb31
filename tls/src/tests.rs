//! Handshakes without sockets: what fits, what does not, and files that change between them.

use std::{fs, io, path::Path, time::Duration};

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::{ClientConnection, Connection, ServerConnection};
use tempfile::TempDir;
use time::OffsetDateTime;

use super::*;

const DAY: Duration = Duration::from_secs(24 * 3600);

/// A folder with a CA.
struct Ca {
    dir: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    fn new() -> Self {
        let (dir, key) = (tempfile::tempdir().unwrap(), KeyPair::generate().unwrap());
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let made = params.self_signed(&key).unwrap();
        fs::write(dir.path().join("ca.crt"), made.pem()).unwrap();
        Self { dir, issuer: Issuer::new(params, key) }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A certificate for these names that lasts so long; none: it ended a day ago.
    fn issue(&self, name: &str, names: &[&str], lasts: Option<Duration>) -> Identity {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        let now = OffsetDateTime::now_utc();
        params.not_before = now - 30 * DAY;
        params.not_after = lasts.map_or(now - DAY, |lasts| now + lasts);
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        let made = params.signed_by(&key, &self.issuer).unwrap();
        let identity = Identity {
            cert: self.file(&format!("{name}.crt")),
            key: self.file(&format!("{name}.key")),
        };
        fs::write(&identity.cert, made.pem()).unwrap();
        fs::write(&identity.key, key.serialize_pem()).unwrap();
        identity
    }

    fn member(&self, name: &str, names: &[&str], lasts: Option<Duration>) -> Cluster {
        Cluster::load(self.issue(name, names, lasts), self.file("ca.crt")).unwrap()
    }
}

/// What each side says of a handshake, the client first.
fn shake(client: &Client, server: &Server, host: &str) -> [Result<(), Fault>; 2] {
    let name = client.name(host).unwrap();
    let mut client: Connection = ClientConnection::new(client.config(), name).unwrap().into();
    let mut server: Connection = ServerConnection::new(server.config()).unwrap().into();
    let mut said = [Ok(()), Ok(())];
    for _ in 0..10 {
        pass(&mut client, &mut server, &mut said[1]);
        pass(&mut server, &mut client, &mut said[0]);
    }
    said
}

/// What one side has to send, and what the other makes of it.
fn pass(from: &mut Connection, to: &mut Connection, said: &mut Result<(), Fault>) {
    let mut wire = Vec::new();
    while from.wants_write() {
        from.write_tls(&mut wire).unwrap();
    }
    let mut wire = &wire[..];
    while !wire.is_empty() && said.is_ok() {
        to.read_tls(&mut wire).unwrap();
        *said = to.process_new_packets().map(drop).map_err(|error| Fault::from(&error));
    }
}

fn reasons(said: [Result<(), Fault>; 2]) -> [Option<Reason>; 2] {
    said.map(|side| side.err().map(|fault| fault.reason))
}

#[test]
fn members_of_one_cluster_meet_and_nobody_else() {
    let (ca, other) = (Ca::new(), Ca::new());
    let member = ca.member("a", &[CLUSTER_NAME], Some(30 * DAY));
    let server = member.server(&["h2"]);
    let meets = |who: &Cluster| reasons(shake(&who.client("h2"), &server, "10.0.0.7"));
    assert_eq!(meets(&ca.member("b", &["x", CLUSTER_NAME], Some(30 * DAY))), [None, None]);
    let refused = Some(Reason::Refused);
    for (who, reason) in [
        (ca.member("late", &[CLUSTER_NAME], None), Reason::Expired),
        (ca.member("user", &["x"], Some(30 * DAY)), Reason::WrongName),
    ] {
        assert_eq!(meets(&who), [refused, Some(reason)]);
    }
    let stranger = other.member("stranger", &[CLUSTER_NAME], Some(30 * DAY));
    assert_eq!(meets(&stranger), [Some(Reason::UnknownCa), refused]);
    let nobody = Client::load(Some(ca.file("ca.crt")), None, "h2").unwrap();
    let said = shake(&nobody, &server, CLUSTER_NAME);
    assert_eq!(reasons(said), [refused, Some(Reason::NoCertificate)]);
    // The other way round: a server that is none of the cluster's.
    let user = ca.member("user", &["x"], Some(30 * DAY));
    let said = shake(&member.client("h2"), &user.server(&["h2"]), "10.0.0.7");
    assert_eq!(said[0].as_ref().err().map(|fault| fault.reason), Some(Reason::WrongName));
    assert!(said[0].as_ref().unwrap_err().to_string().contains("--san lockstep"));
}

#[test]
fn clients_check_the_names_of_hosts() {
    let ca = Ca::new();
    let identity = ca.issue("router", &["llm.example", "10.0.0.6"], Some(30 * DAY));
    let server = Server::load(identity, None).unwrap().speaking(&["h2", "http/1.1"]);
    let client = Client::load(Some(ca.file("ca.crt")), None, "http/1.1").unwrap();
    for (host, reason) in [
        ("llm.example", None),
        ("10.0.0.6", None),
        ("other.example", Some(Reason::WrongName)),
        ("10.0.0.7", Some(Reason::WrongName)),
    ] {
        assert_eq!(reasons(shake(&client, &server, host))[0], reason, "{host}");
    }
    // No public CA has issued it.
    let public = Client::load(None, None, "http/1.1").unwrap();
    assert_eq!(reasons(shake(&public, &server, "llm.example"))[0], Some(Reason::UnknownCa));
    assert_eq!(client.name("a b").unwrap_err().reason, Reason::Other);
}

#[test]
fn files_that_change_are_taken_over_and_broken_ones_are_not() {
    let ca = Ca::new();
    let member = ca.member("a", &[CLUSTER_NAME], Some(30 * DAY));
    let shown = || {
        let current = member.kept.current();
        Arc::as_ptr(&current) as usize
    };
    let first = shown();
    member.kept.look();
    assert_eq!(shown(), first, "nothing has changed");
    // Half of a certificate, a key that is another's, no file.
    let cert = member.identity.cert.clone();
    let whole = fs::read_to_string(&cert).unwrap();
    let other = ca.issue("b", &[CLUSTER_NAME], Some(30 * DAY));
    let new = fs::read_to_string(&other.cert).unwrap();
    for text in [&whole[..whole.len() / 2], "", &new] {
        fs::write(&cert, text).unwrap();
        member.kept.look();
        assert_eq!(shown(), first);
    }
    fs::remove_file(&cert).unwrap();
    member.kept.look();
    assert_eq!(shown(), first);
    // The key follows: the two belong together again.
    fs::write(&cert, new).unwrap();
    fs::copy(&other.key, &member.identity.key).unwrap();
    member.kept.look();
    assert_ne!(shown(), first);
    let said = shake(&member.client("h2"), &member.server(&["h2"]), "a");
    assert_eq!(reasons(said), [None, None]);
}

#[test]
fn files_that_hold_something_else_are_refused_by_name() {
    let ca = Ca::new();
    let good = ca.issue("a", &[CLUSTER_NAME], Some(30 * DAY));
    let other = ca.issue("b", &[CLUSTER_NAME], Some(30 * DAY));
    let told = |cert: &Path, key: &Path| {
        let identity = Identity { cert: cert.into(), key: key.into() };
        Server::load(identity, None).unwrap_err().to_string()
    };
    assert!(told(&good.key, &good.key).contains("a.key: holds no certificate"));
    assert!(told(&good.cert, &good.cert).contains("a.crt: holds no private key"));
    assert!(told(&good.cert, &other.key).contains("b.key: not usable as the key"));
    assert!(told(&ca.file("no.crt"), &good.key).contains("cannot read"));
}

#[test]
fn what_is_no_tls_is_told_as_such() {
    let ca = Ca::new();
    let server = ca.member("a", &[CLUSTER_NAME], Some(30 * DAY)).server(&["h2"]);
    let mut server = ServerConnection::new(server.config()).unwrap();
    server.read_tls(&mut &b"GET / HTTP/1.1\r\n\r\n"[..]).unwrap();
    let error = server.process_new_packets().unwrap_err();
    assert_eq!(Fault::from(&error).reason, Reason::PlainText);
    let error = io::Error::new(io::ErrorKind::InvalidData, error);
    assert_eq!(Fault::of(&error).map(|fault| fault.reason), Some(Reason::PlainText));
    assert_eq!(Fault::of(&io::ErrorKind::BrokenPipe.into()), None);
}

#[test]
fn a_certificate_tells_who_it_is_for_and_until_when() {
    let ca = Ca::new();
    let identity = ca.issue("a", &["llm.example", "10.0.0.6", "::1"], Some(30 * DAY));
    let bytes = fs::read(identity.cert).unwrap();
    let [found] = &Certificate::from_pem(&bytes).unwrap()[..] else { panic!("one certificate") };
    assert_eq!(found.names, ["llm.example", "10.0.0.6", "::1"]);
    assert!(!found.is_ca);
    let days = found.seconds_left() / (24 * 3600);
    assert!((29..=30).contains(&days), "{days}");
    assert!(Certificate::from_pem(b"nothing").is_err());
}
