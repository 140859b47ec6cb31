//! rustls' configurations: one provider, two versions of TLS, no session that outlives a
//! certificate.

use std::sync::Arc;

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::{Resumption, WebPkiServerVerifier, danger::ServerCertVerifier},
    crypto::{CryptoProvider, ring},
    server::{NoServerSessionStorage, WebPkiClientVerifier, danger::ClientCertVerifier},
    sign::{CertifiedKey, SingleCertAndKey},
};

use crate::{
    TlsError,
    files::{Ca, Pair, Read},
    peer::ClusterPeer,
};

/// Both sides of the connections within a cluster.
pub(crate) struct Cluster {
    pub server: Arc<ServerConfig>,
    pub client: Arc<ClientConfig>,
}

pub(crate) fn cluster(pair: &Pair, ca: &Ca, files: &Read) -> Result<Cluster, TlsError> {
    let provider = provider();
    let roots = Arc::new(ca.roots(files)?);
    let certified = Arc::new(pair.certified(files, &provider)?);
    let peer = ClusterPeer::new(client_verifier(roots.clone(), &provider));
    let server = serving(Arc::new(peer), certified.clone(), &provider);
    let client = dialing(server_verifier(roots, &provider), Some(certified), &provider);
    Ok(Cluster { server: Arc::new(server), client: Arc::new(client) })
}

pub(crate) fn server(
    pair: &Pair,
    client_ca: Option<&Ca>,
    files: &Read,
) -> Result<Arc<ServerConfig>, TlsError> {
    let provider = provider();
    let certified = Arc::new(pair.certified(files, &provider)?);
    let verifier = match client_ca {
        Some(ca) => client_verifier(Arc::new(ca.roots(files)?), &provider),
        None => WebPkiClientVerifier::no_client_auth(),
    };
    Ok(Arc::new(serving(verifier, certified, &provider)))
}

pub(crate) fn client(
    ca: Option<&Ca>,
    pair: Option<&Pair>,
    files: &Read,
) -> Result<Arc<ClientConfig>, TlsError> {
    let provider = provider();
    let roots = match ca {
        Some(ca) => ca.roots(files)?,
        None => webpki_roots::TLS_SERVER_ROOTS.iter().cloned().collect(),
    };
    let certified = pair.map(|pair| pair.certified(files, &provider)).transpose()?.map(Arc::new);
    let verifier = server_verifier(Arc::new(roots), &provider);
    Ok(Arc::new(dialing(verifier, certified, &provider)))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn client_verifier(
    roots: Arc<RootCertStore>,
    provider: &Arc<CryptoProvider>,
) -> Arc<dyn ClientCertVerifier> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone()).build();
    verifier.expect("there are roots, and nothing was said of revocations")
}

fn server_verifier(
    roots: Arc<RootCertStore>,
    provider: &Arc<CryptoProvider>,
) -> Arc<dyn ServerCertVerifier> {
    let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider.clone()).build();
    verifier.expect("there are roots, and nothing was said of revocations")
}

fn serving(
    verifier: Arc<dyn ClientCertVerifier>,
    certified: Arc<CertifiedKey>,
    provider: &Arc<CryptoProvider>,
) -> ServerConfig {
    let asks = verifier.offer_client_auth();
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .expect("ring has the ciphers of TLS 1.2 and 1.3")
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
    if asks {
        // A session that is taken up again shows no certificate: it may have expired.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
    }
    config
}

fn dialing(
    verifier: Arc<dyn ServerCertVerifier>,
    certified: Option<Arc<CertifiedKey>>,
    provider: &Arc<CryptoProvider>,
) -> ClientConfig {
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .expect("ring has the ciphers of TLS 1.2 and 1.3")
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match certified {
        Some(own) => builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(own))),
        None => builder.with_no_client_auth(),
    };
    config.resumption = Resumption::disabled();
    config
}
