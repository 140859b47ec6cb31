#![forbid(unsafe_code)]
//! TLS configurations out of PEM files, kept up to date while the files change.
//!
//! Files, certificates and what a failed handshake means; no sockets. TLS 1.2 and 1.3 with ring.
//! Files are read again every 2 s: new connections use what they hold by then, and those that are
//! open go on. What cannot be used is told once, and what was there before stays in use.
//!
//! Processes of one cluster trust each other by one CA and one name, `lockstep`, whatever their
//! addresses are: those change, and a certificate is a process's, not a machine's. Clients of
//! routers check the names of hosts, as everywhere.

mod certificate;
mod config;
mod fault;
mod files;
mod kept;
mod peer;

use std::{fmt, path::PathBuf, sync::Arc};

use rustls::{ClientConfig, ServerConfig, pki_types::ServerName};

pub use certificate::Certificate;
pub use fault::{Fault, Reason, TLS_FIRST_BYTE};
pub use rustls;

use files::{Ca, Pair};
use kept::Kept;

/// The name that every process of a cluster has in its certificate, and asks others for.
pub const CLUSTER_NAME: &str = "lockstep";

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read {}: {source}", .path.display())]
    Read { path: PathBuf, source: std::io::Error },
    /// It holds something else, or not all of it.
    #[error("{}: {reason}", .path.display())]
    Content { path: PathBuf, reason: String },
}

/// A certificate and its key, in PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The certificate, and those between it and the CA.
    pub cert: PathBuf,
    pub key: PathBuf,
}

/// What a process of a cluster shows to the others, and whom it trusts.
#[derive(Clone)]
pub struct Cluster {
    kept: Arc<Kept<config::Cluster>>,
    identity: Identity,
    ca: PathBuf,
}

impl Cluster {
    /// Reads the files, and follows them for as long as the value or one made of it lives.
    ///
    /// # Errors
    /// A file that cannot be read or used.
    pub fn load(identity: Identity, ca: PathBuf) -> Result<Self, TlsError> {
        let (pair, ca_file) = (Pair::new(identity.clone()), Ca::new(ca.clone()));
        let files = vec![identity.cert.clone(), identity.key.clone(), ca.clone()];
        let build = move |files: &files::Read| config::cluster(&pair, &ca_file, files);
        Ok(Self { kept: Kept::load(files, build)?, identity, ca })
    }

    /// For a port to which only processes of the cluster come, by these protocols.
    pub fn server(&self, protocols: &[&str]) -> Server {
        let kept = self.kept.clone();
        Server::new(protocols, move || kept.current().server.clone())
    }

    /// For connections to such a port.
    pub fn client(&self, protocol: &str) -> Client {
        let kept = self.kept.clone();
        let config = move || kept.current().client.clone();
        Client { config: Arc::new(config), protocol: protocol.into(), name: Some(CLUSTER_NAME) }
    }

    /// The files, for a further process of this machine.
    pub fn files(&self) -> (&Identity, &PathBuf) {
        (&self.identity, &self.ca)
    }
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster").field("identity", &self.identity).field("ca", &self.ca).finish()
    }
}

/// What a port needs to speak TLS.
#[derive(Clone)]
pub struct Server {
    config: Arc<dyn Fn() -> Arc<ServerConfig> + Send + Sync>,
    protocols: Vec<Vec<u8>>,
}

impl Server {
    /// For a port with this certificate. With `client_ca`, clients must have a certificate of it.
    ///
    /// # Errors
    /// As [`Cluster::load`].
    pub fn load(identity: Identity, client_ca: Option<PathBuf>) -> Result<Self, TlsError> {
        let (pair, ca) = (Pair::new(identity.clone()), client_ca.clone().map(Ca::new));
        let files = [identity.cert, identity.key].into_iter().chain(client_ca).collect();
        let build = move |files: &files::Read| config::server(&pair, ca.as_ref(), files);
        let kept = Kept::load(files, build)?;
        Ok(Self::new(&[], move || Arc::clone(&*kept.current())))
    }

    fn new(
        protocols: &[&str],
        config: impl Fn() -> Arc<ServerConfig> + Send + Sync + 'static,
    ) -> Self {
        let protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
        Self { config: Arc::new(config), protocols }
    }

    /// The same certificate, for a port with these protocols, the preferred one first.
    pub fn speaking(&self, protocols: &[&str]) -> Self {
        let protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
        Self { config: self.config.clone(), protocols }
    }

    /// For a connection that begins now.
    pub fn config(&self) -> Arc<ServerConfig> {
        let mut config = (*(self.config)()).clone();
        config.alpn_protocols = self.protocols.clone();
        Arc::new(config)
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Server")
    }
}

/// What a connection needs to speak TLS.
#[derive(Clone)]
pub struct Client {
    config: Arc<dyn Fn() -> Arc<ClientConfig> + Send + Sync>,
    protocol: Vec<u8>,
    /// What the other side must be called, whatever its address.
    name: Option<&'static str>,
}

impl Client {
    /// For servers with a certificate of `ca`, or of a public CA; with an identity where they ask
    /// for one.
    ///
    /// # Errors
    /// As [`Cluster::load`].
    pub fn load(
        ca: Option<PathBuf>,
        identity: Option<Identity>,
        protocol: &str,
    ) -> Result<Self, TlsError> {
        let own = identity.iter().flat_map(|pair| [pair.cert.clone(), pair.key.clone()]);
        let files = own.chain(ca.clone()).collect();
        let (pair, ca) = (identity.map(Pair::new), ca.map(Ca::new));
        let build = move |files: &files::Read| config::client(ca.as_ref(), pair.as_ref(), files);
        let kept = Kept::load(files, build)?;
        let config = move || Arc::clone(&*kept.current());
        Ok(Self { config: Arc::new(config), protocol: protocol.into(), name: None })
    }

    /// For a connection that begins now.
    pub fn config(&self) -> Arc<ClientConfig> {
        let mut config = (*(self.config)()).clone();
        config.alpn_protocols = vec![self.protocol.clone()];
        Arc::new(config)
    }

    /// What the certificate of a server at `host`, a name or an address, must be for.
    ///
    /// # Errors
    /// `Other`: `host` is neither.
    pub fn name(&self, host: &str) -> Result<ServerName<'static>, Fault> {
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let name = self.name.unwrap_or(bare).to_owned();
        ServerName::try_from(name).map_err(|_| {
            Fault::new(Reason::Other, format!("{host:?} is no name that a certificate can have"))
        })
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Client({:?})", self.name)
    }
}

#[cfg(test)]
mod tests;
