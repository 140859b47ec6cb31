//! What a certificate says, for people.

use std::{
    net::IpAddr,
    time::{SystemTime, UNIX_EPOCH},
};

use rustls::pki_types::{CertificateDer, pem::PemObject};
use x509_parser::{extensions::GeneralName, parse_x509_certificate, prelude::X509Certificate};

/// The facts of one certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// As `CN=worker-1`.
    pub subject: String,
    pub issuer: String,
    /// Names and addresses that it is for.
    pub names: Vec<String>,
    /// Whether it may issue others.
    pub is_ca: bool,
    /// The first and last moment of its validity, as RFC 2822 writes them.
    pub not_before: String,
    pub not_after: String,
    /// The last moment in Unix time.
    ends: i64,
}

impl Certificate {
    /// Every certificate of a PEM file.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn from_pem(bytes: &[u8]) -> Result<Vec<Self>, String> {
        let found = CertificateDer::pem_slice_iter(bytes)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| format!("not whole, or no PEM: {error}"))?;
        if found.is_empty() {
            return Err("holds no certificate in PEM".into());
        }
        found.iter().map(|der| Self::from_der(der)).collect()
    }

    fn from_der(der: &[u8]) -> Result<Self, String> {
        let (_, parsed): (_, X509Certificate<'_>) =
            parse_x509_certificate(der).map_err(|error| format!("no certificate: {error}"))?;
        let names = match parsed.subject_alternative_name() {
            Ok(Some(extension)) => extension.value.general_names.iter().map(name).collect(),
            Ok(None) => Vec::new(),
            Err(error) => return Err(format!("its names cannot be read: {error}")),
        };
        let validity = parsed.validity();
        Ok(Self {
            subject: parsed.subject().to_string(),
            issuer: parsed.issuer().to_string(),
            names,
            is_ca: parsed.is_ca(),
            not_before: validity.not_before.to_string(),
            not_after: validity.not_after.to_string(),
            ends: validity.not_after.timestamp(),
        })
    }

    /// Until it expires; negative once it has.
    pub fn seconds_left(&self) -> i64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.ends - i64::try_from(now.as_secs()).unwrap_or(i64::MAX)
    }
}

fn name(name: &GeneralName<'_>) -> String {
    match name {
        GeneralName::DNSName(name) => (*name).to_owned(),
        GeneralName::IPAddress(bytes) => {
            let four = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
            let any = four.or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from));
            any.map_or_else(|_| format!("{bytes:?}"), |address| address.to_string())
        }
        other => format!("{other}"),
    }
}
