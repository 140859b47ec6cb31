//! What a failed handshake means, and what to do about it.

use std::{fmt, io};

use rustls::{AlertDescription, CertificateError, Error, InvalidMessage, PeerIncompatible};

/// What a client that speaks TLS begins with: a handshake record.
pub const TLS_FIRST_BYTE: u8 = 0x16;

/// Why there is no connection. A fixed list: labels of metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The other side does not speak TLS, or does where this side does not.
    PlainText,
    /// It showed no certificate.
    NoCertificate,
    /// Its certificate does not lead to a CA that is trusted here.
    UnknownCa,
    /// Its certificate is not valid any more, or not yet.
    Expired,
    /// Its certificate is for somebody else.
    WrongName,
    /// It knows neither TLS 1.2 nor 1.3.
    OldVersion,
    /// It refused what this side showed.
    Refused,
    /// It took too long.
    Deadline,
    /// It left meanwhile.
    Closed,
    Other,
}

impl Reason {
    pub const ALL: [Self; 10] = [
        Self::PlainText,
        Self::NoCertificate,
        Self::UnknownCa,
        Self::Expired,
        Self::WrongName,
        Self::OldVersion,
        Self::Refused,
        Self::Deadline,
        Self::Closed,
        Self::Other,
    ];

    /// As metrics and log lines have it.
    pub fn label(self) -> &'static str {
        match self {
            Self::PlainText => "plain_text",
            Self::NoCertificate => "no_certificate",
            Self::UnknownCa => "unknown_ca",
            Self::Expired => "expired",
            Self::WrongName => "wrong_name",
            Self::OldVersion => "old_version",
            Self::Refused => "refused",
            Self::Deadline => "deadline",
            Self::Closed => "closed",
            Self::Other => "other",
        }
    }
}

/// Why there is no connection, in words that say who should do what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub reason: Reason,
    text: String,
}

impl Fault {
    pub fn new(reason: Reason, text: impl Into<String>) -> Self {
        Self { reason, text: text.into() }
    }

    /// `None` for what has nothing to do with TLS.
    pub fn of(error: &io::Error) -> Option<Self> {
        let mut inner = error.get_ref().map(|inner| inner as &(dyn std::error::Error + 'static));
        while let Some(found) = inner {
            if let Some(error) = found.downcast_ref::<Error>() {
                return Some(Self::from(error));
            }
            inner = found.source();
        }
        None
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Fault {}

impl From<&Error> for Fault {
    fn from(error: &Error) -> Self {
        match error {
            Error::NoCertificatesPresented => Self::new(
                Reason::NoCertificate,
                "it showed no certificate; give it one of the CA that this side trusts \
                 (`lockstep certs issue`)",
            ),
            Error::InvalidCertificate(error) => of_certificate(error),
            Error::AlertReceived(alert) => of_alert(*alert),
            Error::PeerIncompatible(
                PeerIncompatible::Tls12NotOffered
                | PeerIncompatible::Tls12NotOfferedOrEnabled
                | PeerIncompatible::ServerDoesNotSupportTls12Or13
                | PeerIncompatible::SupportedVersionsExtensionRequired
                // What comes with TLS 1.2.
                | PeerIncompatible::SignatureAlgorithmsExtensionRequired
                | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig,
            ) => Self::new(
                Reason::OldVersion,
                "it speaks neither TLS 1.2 nor 1.3; use a newer version of it",
            ),
            Error::InvalidMessage(
                InvalidMessage::InvalidContentType
                | InvalidMessage::MessageTooLarge
                | InvalidMessage::UnknownProtocolVersion,
            ) => Self::new(
                Reason::PlainText,
                "it does not speak TLS; turn TLS on there, or name the port that has it",
            ),
            other => Self::new(Reason::Other, other.to_string()),
        }
    }
}

fn of_certificate(error: &CertificateError) -> Fault {
    use CertificateError as E;
    match error {
        E::UnknownIssuer | E::BadSignature => Fault::new(
            Reason::UnknownCa,
            "its certificate is not of a CA that is trusted here; issue both with one CA, or add \
             its CA to the file of those trusted here",
        ),
        E::Expired | E::ExpiredContext { .. } => Fault::new(
            Reason::Expired,
            "its certificate has expired; replace the file there, it is read again without a \
             restart",
        ),
        E::NotValidYet | E::NotValidYetContext { .. } => Fault::new(
            Reason::Expired,
            "its certificate is not valid yet; compare the clocks of both machines",
        ),
        E::NotValidForNameContext { expected, presented } => {
            let expected = expected.to_str();
            let presented = presented.join(", ");
            Fault::new(
                Reason::WrongName,
                format!(
                    "its certificate is for {presented}, not for {expected}; issue one with \
                     `lockstep certs issue` and --san {expected}"
                ),
            )
        }
        E::NotValidForName => {
            Fault::new(Reason::WrongName, "its certificate is for another name; issue one for it")
        }
        other => Fault::new(Reason::Other, format!("its certificate is not usable: {other}")),
    }
}

/// What the other side says against this one.
fn of_alert(alert: AlertDescription) -> Fault {
    use AlertDescription as A;
    let text = match alert {
        // Another CA of the same name, of an old key.
        A::UnknownCA | A::DecryptError => {
            "it does not trust the CA of this side's certificate; issue both with one CA, or add \
             this one to the CAs trusted there"
        }
        A::CertificateExpired => {
            "it says that this side's certificate has expired; replace the file, it is read again \
             without a restart"
        }
        A::CertificateRequired => {
            "it asks for a certificate and this side showed none; give this side one of the CA \
             that is trusted there"
        }
        A::BadCertificate | A::CertificateUnknown | A::UnsupportedCertificate => {
            "it refuses this side's certificate, or wants one and was shown none; its log says why"
        }
        A::ProtocolVersion => {
            let text = "it speaks neither TLS 1.2 nor 1.3; use a newer version of it";
            return Fault::new(Reason::OldVersion, text);
        }
        other => {
            return Fault::new(Reason::Refused, format!("it ended the handshake: {other:?}"));
        }
    };
    Fault::new(Reason::Refused, text)
}
