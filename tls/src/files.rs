//! PEM files, read without trusting them to be whole.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use rustls::{
    RootCertStore,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};

use crate::{Certificate, Identity, TlsError};

/// A longer file is none of certificates.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// What files held when they were read together.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Read(BTreeMap<PathBuf, Vec<u8>>);

impl Read {
    /// # Errors
    /// `Read` for a file that is not there, or is longer than 1 MiB.
    pub fn all(paths: &[PathBuf]) -> Result<Self, TlsError> {
        let read = |path: &PathBuf| match bytes(path) {
            Ok(bytes) => Ok((path.clone(), bytes)),
            Err(source) => Err(TlsError::Read { path: path.clone(), source }),
        };
        Ok(Self(paths.iter().map(read).collect::<Result<_, _>>()?))
    }

    fn of(&self, path: &Path) -> &[u8] {
        self.0.get(path).map_or(&[], Vec::as_slice)
    }

    /// Of the first file, for people.
    pub fn first(&self, paths: &[PathBuf]) -> Option<Certificate> {
        let bytes = self.of(paths.first()?);
        Certificate::from_pem(bytes).ok()?.into_iter().next()
    }
}

fn bytes(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "longer than 1 MiB"));
    }
    Ok(bytes)
}

fn content(path: &Path, reason: impl Into<String>) -> TlsError {
    TlsError::Content { path: path.into(), reason: reason.into() }
}

/// At least one.
fn certificates(path: &Path, files: &Read) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found = CertificateDer::pem_slice_iter(files.of(path)).collect::<Result<Vec<_>, _>>();
    match found {
        Ok(found) if found.is_empty() => Err(content(path, "holds no certificate in PEM")),
        Ok(found) => Ok(found),
        Err(error) => Err(content(path, format!("not whole, or no PEM: {error}"))),
    }
}

/// A certificate with its key.
pub(crate) struct Pair(Identity);

impl Pair {
    pub fn new(identity: Identity) -> Self {
        Self(identity)
    }

    /// # Errors
    /// A file that holds no certificate or no key, or two that do not belong together.
    pub fn certified(
        &self,
        files: &Read,
        provider: &CryptoProvider,
    ) -> Result<CertifiedKey, TlsError> {
        let Identity { cert, key } = &self.0;
        let chain = certificates(cert, files)?;
        let secret = PrivateKeyDer::from_pem_slice(files.of(key))
            .map_err(|error| content(key, format!("holds no private key in PEM: {error}")))?;
        CertifiedKey::from_der(chain, secret, provider).map_err(|error| {
            let of = cert.display();
            content(key, format!("not usable as the key of the certificate in {of}: {error}"))
        })
    }
}

/// Certificates that others' must lead to.
pub(crate) struct Ca(PathBuf);

impl Ca {
    pub fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// # Errors
    /// A file that holds no certificate of a CA.
    pub fn roots(&self, files: &Read) -> Result<RootCertStore, TlsError> {
        let mut roots = RootCertStore::empty();
        for found in certificates(&self.0, files)? {
            roots.add(found).map_err(|error| content(&self.0, error.to_string()))?;
        }
        Ok(roots)
    }
}
