//! Flags of TLS: what ports and connections need, and which ports may do without.

use std::{net::SocketAddr, path::PathBuf, sync::OnceLock};

use anyhow::{Result, bail};
use clap::Args;
use tls::{Client, Cluster, Identity, Server};

/// What clients of a router meet.
#[derive(Args, Clone, Debug)]
pub struct FrontTlsArgs {
    /// The certificate of the HTTP and gRPC interfaces, a PEM file with those between it and its
    /// CA; read again while it changes [default: clear text]
    #[arg(long, value_name = "FILE", env = "LOCKSTEP_TLS_CERT")]
    tls_cert: Option<PathBuf>,
    /// The key of that certificate, a PEM file
    #[arg(long, value_name = "FILE", env = "LOCKSTEP_TLS_KEY")]
    tls_key: Option<PathBuf>,
    /// CAs of which clients must show a certificate [default: clients need none]
    #[arg(long, value_name = "FILE", env = "LOCKSTEP_TLS_CLIENT_CA")]
    tls_client_ca: Option<PathBuf>,
}

impl FrontTlsArgs {
    /// `None` for clear text.
    pub fn server(&self) -> Result<Option<Server>> {
        match (
            pair(("--tls-cert", &self.tls_cert), ("--tls-key", &self.tls_key))?,
            &self.tls_client_ca,
        ) {
            (Some(identity), ca) => Ok(Some(Server::load(identity, ca.clone())?)),
            (None, Some(_)) => {
                bail!("--tls-client-ca is for clients that speak TLS; add --tls-cert and --tls-key")
            }
            (None, None) => Ok(None),
        }
    }
}

/// What the processes of a cluster show to each other.
#[derive(Args, Debug)]
pub struct ClusterTlsArgs {
    /// This process's certificate within the cluster, as `lockstep certs issue` writes it: routers,
    /// workers and ranks of several machines speak TLS to each other with it, and both sides check
    /// [default: clear text]
    #[arg(long, value_name = "FILE", env = "LOCKSTEP_CLUSTER_CERT")]
    cluster_cert: Option<PathBuf>,
    /// The key of that certificate
    #[arg(long, value_name = "FILE", env = "LOCKSTEP_CLUSTER_KEY")]
    cluster_key: Option<PathBuf>,
    /// The cluster's CA
    #[arg(long, value_name = "FILE", env = "LOCKSTEP_CLUSTER_CA")]
    cluster_ca: Option<PathBuf>,
    #[arg(skip)]
    loaded: OnceLock<Cluster>,
}

impl ClusterTlsArgs {
    /// `None` for clear text. The files are read once, and then followed.
    pub fn load(&self) -> Result<Option<Cluster>> {
        if let Some(loaded) = self.loaded.get() {
            return Ok(Some(loaded.clone()));
        }
        let own =
            pair(("--cluster-cert", &self.cluster_cert), ("--cluster-key", &self.cluster_key))?;
        match (own, &self.cluster_ca) {
            (Some(identity), Some(ca)) => {
                let loaded = Cluster::load(identity, ca.clone())?;
                Ok(Some(self.loaded.get_or_init(|| loaded).clone()))
            }
            (None, None) => Ok(None),
            (Some(_), None) => bail!("--cluster-cert needs the cluster's CA; add --cluster-ca"),
            (None, Some(_)) => {
                bail!(
                    "--cluster-ca needs a certificate of it; add --cluster-cert and --cluster-key"
                )
            }
        }
    }
}

/// What a tool needs to speak TLS to a router.
#[derive(Args, Clone, Debug)]
pub struct ToolTlsArgs {
    /// The CA of the router's certificate; TLS then, whatever the address says [default: public
    /// CAs, for https://]
    #[arg(long, value_name = "FILE", env = "LOCKSTEP_CA")]
    ca: Option<PathBuf>,
    /// A certificate to show to the router, where it asks for one
    #[arg(long, value_name = "FILE", env = "LOCKSTEP_CERT")]
    cert: Option<PathBuf>,
    /// The key of that certificate
    #[arg(long, value_name = "FILE", env = "LOCKSTEP_KEY")]
    key: Option<PathBuf>,
}

impl ToolTlsArgs {
    /// For connections to `address`; `None` for clear text.
    pub fn client(&self, address: &str, protocol: &str) -> Result<Option<Client>> {
        let own = pair(("--cert", &self.cert), ("--key", &self.key))?;
        let secure = ["https://", "grpcs://"].iter().any(|scheme| address.starts_with(scheme));
        if !secure && self.ca.is_none() {
            if own.is_some() {
                bail!("--cert is for TLS; write https:// in the address, or add --ca");
            }
            return Ok(None);
        }
        Ok(Some(Client::load(self.ca.clone(), own, protocol)?))
    }
}

type Flag<'a> = (&'a str, &'a Option<PathBuf>);

/// Both files, or none.
pub fn pair((cert_flag, cert): Flag<'_>, (key_flag, key): Flag<'_>) -> Result<Option<Identity>> {
    match (cert, key) {
        (Some(cert), Some(key)) => Ok(Some(Identity { cert: cert.clone(), key: key.clone() })),
        (None, None) => Ok(None),
        (Some(_), None) => bail!("{cert_flag} needs the certificate's key; add {key_flag}"),
        (None, Some(_)) => bail!("{key_flag} needs a certificate; add {cert_flag}"),
    }
}

/// A port in clear text.
pub struct Clear<'a> {
    /// Says where it listens.
    pub flag: &'a str,
    pub address: SocketAddr,
    /// What would give it TLS.
    pub remedy: &'a str,
}

impl Clear<'_> {
    /// Refuses it where other machines reach it, unless that is wanted, which is then told.
    pub fn check(&self, insecure: bool) -> Result<()> {
        let Self { flag, address, remedy } = self;
        if address.ip().to_canonical().is_loopback() {
            return Ok(());
        }
        if !insecure {
            bail!(
                "{flag} {address} is reached from other machines, and in clear text: give it a \
                 certificate with {remedy}, or say with --insecure that the network is trusted"
            );
        }
        tracing::warn!(
            %address,
            "{flag} is in clear text, for --insecure: whoever reaches it may use it and read along"
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_is_open_in_clear_text_by_itself() {
        let check = |address: &str, insecure| {
            let address = address.parse().unwrap();
            let clear = Clear { flag: "--http", address, remedy: "--tls-cert" };
            clear.check(insecure).map_err(|error| error.to_string())
        };
        for address in ["127.0.0.1:0", "127.9.9.9:80", "[::1]:80", "[::ffff:127.0.0.1]:80"] {
            assert_eq!(check(address, false), Ok(()), "{address}");
        }
        for address in ["0.0.0.0:80", "10.0.0.7:80", "[::]:80", "[::ffff:10.0.0.7]:80"] {
            let error = check(address, false).unwrap_err();
            assert!(error.contains("--tls-cert") && error.contains("--insecure"), "{error}");
            assert_eq!(check(address, true), Ok(()), "{address}");
        }
    }

    #[test]
    fn half_of_an_identity_is_refused_with_the_other_half() {
        let file = Some(PathBuf::from("x"));
        let told = |cert, key| pair(("--a", cert), ("--b", key)).unwrap_err().to_string();
        assert!(told(&file, &None).contains("add --b"));
        assert!(told(&None, &file).contains("add --a"));
        assert!(pair(("--a", &None), ("--b", &None)).unwrap().is_none());
    }
}
