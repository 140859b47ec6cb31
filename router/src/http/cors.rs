//! Which web pages may call this server from a browser (Cross-Origin Resource Sharing): pages of
//! this machine, and the origins that the configuration names.

use crate::RouterError;
use http::{HeaderName, HeaderValue, Method, header, request::Parts};
use std::time::Duration;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

/// Any origin.
const ANY: &str = "*";
/// Names of this machine in an origin.
const LOOPBACK: [&str; 3] = ["localhost", "127.0.0.1", "[::1]"];
/// How long a browser may remember a preflight's answer.
const MAX_AGE: Duration = Duration::from_secs(600);
const EXPOSED: [HeaderName; 2] = [HeaderName::from_static("x-request-id"), header::RETRY_AFTER];

/// Answers preflights, and names the allowed origin on every answer.
///
/// Errors: `Origin` for what is no origin.
pub(crate) fn layer(origins: &[String]) -> Result<CorsLayer, RouterError> {
    if let Some(wrong) = origins.iter().find(|origin| !is_origin(origin)) {
        return Err(RouterError::Origin(wrong.clone()));
    }
    let allowed = match origins.iter().any(|origin| origin == ANY) {
        true => AllowOrigin::any(),
        false => {
            let origins = origins.to_vec();
            AllowOrigin::predicate(move |origin: &HeaderValue, _: &Parts| {
                let Ok(origin) = origin.to_str() else { return false };
                is_loopback(origin) || origins.iter().any(|allowed| allowed == origin)
            })
        }
    };
    Ok(CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(EXPOSED)
        .max_age(MAX_AGE))
}

/// `*`, or scheme://host[:port] as browsers write it.
fn is_origin(text: &str) -> bool {
    let fits = |c: char| c.is_ascii_graphic() && !c.is_ascii_uppercase() && !"/?#*@,".contains(c);
    let parts = text.split_once("://");
    text == ANY
        || parts.is_some_and(|(scheme, host)| {
            !scheme.is_empty() && !host.is_empty() && (scheme.chars().chain(host.chars())).all(fits)
        })
}

/// A page that this machine serves, on any port.
fn is_loopback(origin: &str) -> bool {
    let host = origin.strip_prefix("http://").or(origin.strip_prefix("https://"));
    let after = host.and_then(|host| LOOPBACK.iter().find_map(|name| host.strip_prefix(name)));
    after.is_some_and(|port| {
        let digits = port.strip_prefix(':');
        port.is_empty() || digits.is_some_and(|port| port.parse::<u16>().is_ok())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_those_of_browsers() {
        for origin in [
            "*",
            "https://chat.example",
            "http://10.0.0.1:3000",
            "app://obsidian.md",
            "http://[::1]:80",
        ] {
            assert!(layer(&[origin.to_owned()]).is_ok(), "{origin}");
        }
        for wrong in [
            "",
            "chat.example",
            "https://chat.example/",
            "https://*.example",
            "https://",
            "https://A.b",
        ] {
            let error = layer(&["*".to_owned(), wrong.to_owned()]).expect_err(wrong).to_string();
            assert!(error.contains(wrong) && error.contains("scheme://host"), "{error}");
        }
    }

    #[test]
    fn pages_of_this_machine_are_known_by_name() {
        for origin in [
            "http://localhost",
            "https://localhost:5173",
            "http://127.0.0.1:80",
            "http://[::1]:3000",
        ] {
            assert!(is_loopback(origin), "{origin}");
        }
        for other in [
            "http://localhost.example",
            "http://localhost:80.example",
            "http://127.0.0.1.nip.io",
            "ftp://localhost",
            "null",
            "http://localhost:",
            "http://localhost:99999",
        ] {
            assert!(!is_loopback(other), "{other}");
        }
    }
}
