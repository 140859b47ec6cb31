//! Addresses as people type them, and whether another machine can use them.

use std::net::IpAddr;

use anyhow::{Context, Result, bail};
use hyper::Uri;

/// `http://HOST:PORT` or `https://HOST:PORT`; without a scheme it is HTTP.
pub fn http(text: &str) -> Result<String, String> {
    with_scheme(text, &["http", "https"])
}

/// The same, or `grpc` and `grpcs` in their place.
pub fn http_or_grpc(text: &str) -> Result<String, String> {
    with_scheme(text, &["http", "https", "grpc", "grpcs"])
}

fn with_scheme(text: &str, schemes: &[&str]) -> Result<String, String> {
    let whole = match text.contains("://") {
        true => text.to_owned(),
        false => format!("http://{text}"),
    };
    let wanted = schemes.iter().map(|scheme| format!("{scheme}://HOST:PORT"));
    let wanted = wanted.collect::<Vec<_>>().join(" or ");
    let wrong = |why: &str| Err(format!("{text:?} {why}; write {wanted}"));
    let Ok(uri) = whole.parse::<Uri>() else { return wrong("is no address") };
    let scheme = uri.scheme_str().unwrap_or_default();
    if !schemes.contains(&scheme) {
        return wrong("has another scheme");
    }
    if !matches!(uri.path_and_query().map(|path| path.as_str()), None | Some("" | "/")) {
        return wrong("has a path");
    }
    match (uri.host(), uri.port_u16()) {
        (None | Some(""), _) => wrong("names no host"),
        (Some(_), None) => wrong("names no port"),
        (Some(host), Some(port)) => Ok(format!("{scheme}://{host}:{port}")),
    }
}

/// A worker's address as it is reached.
pub fn secured(address: &str, secure: bool) -> String {
    match address.strip_prefix("http://") {
        Some(bare) if secure => format!("https://{bare}"),
        _ => address.to_owned(),
    }
}

/// Whether only programs of the same machine reach an address, with or without a scheme.
fn is_loopback(address: &str) -> bool {
    let bare = address.split_once("://").map_or(address, |(_, bare)| bare);
    let host = bare.rsplit_once(':').map_or(bare, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
}

/// This machine's address towards the first etcd member that is elsewhere; `None` where none is.
pub fn route(etcd: &[String]) -> Result<Option<IpAddr>> {
    let Some(member) = etcd.iter().find(|member| !is_loopback(member)) else { return Ok(None) };
    let bare = member.split_once("://").map_or(&**member, |(_, bare)| bare);
    let found = cluster::route_to(bare).with_context(|| format!("no way to etcd at {member}"))?;
    Ok(Some(found))
}

/// Refuses a worker that says an address which routers of other machines cannot use, where the
/// cluster's etcd is on another machine. `flag` is the one that says where it listens.
pub fn check_reachable(flag: &str, address: &str, etcd: &[String]) -> Result<()> {
    let elsewhere = etcd.iter().find(|member| !is_loopback(member));
    match elsewhere {
        Some(member) if is_loopback(address) => bail!(
            "etcd is at {member}, but routers on other machines cannot reach this worker at \
             {address}; give this machine's own address with {flag} HOST:PORT"
        ),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;

    #[test]
    fn the_scheme_may_be_left_out() {
        for (text, wanted) in [
            ("http://10.0.0.7:7001", "http://10.0.0.7:7001"),
            ("10.0.0.7:7001", "http://10.0.0.7:7001"),
            ("localhost:8001/", "http://localhost:8001"),
            ("[::1]:8001", "http://[::1]:8001"),
            ("worker-0.pool:80", "http://worker-0.pool:80"),
        ] {
            assert_eq!(http(text).as_deref(), Ok(wanted), "{text}");
        }
        assert_eq!(http("https://a:1").as_deref(), Ok("https://a:1"));
        assert_eq!(http_or_grpc("grpc://a:1").as_deref(), Ok("grpc://a:1"));
        assert_eq!(http_or_grpc("grpcs://a:1").as_deref(), Ok("grpcs://a:1"));
        assert_eq!(http_or_grpc("a:1").as_deref(), Ok("http://a:1"));
    }

    #[test]
    fn what_is_no_address_is_refused_with_the_form() {
        for (text, word) in [
            ("", "no address"),
            ("10.0.0.7", "no port"),
            ("http://10.0.0.7", "no port"),
            (":7001", "write"),
            ("grpc://a:1", "scheme"),
            ("http://a:1/v1", "path"),
            ("a b:1", "no address"),
            ("a:70000", "port"),
        ] {
            let error = http(text).unwrap_err();
            assert!(error.contains(word) && error.contains("http://HOST:PORT"), "{text}: {error}");
        }
    }

    #[test]
    fn the_route_to_etcd_tells_this_machines_address() {
        let route = |etcd: &[&str]| {
            route(&etcd.iter().map(|&member| member.to_owned()).collect::<Vec<_>>())
        };
        assert_eq!(route(&[]).unwrap(), None);
        assert_eq!(route(&["http://127.0.0.1:2379", "localhost:1"]).unwrap(), None);
        // Any address of this machine's own leads back to itself.
        let own = UdpSocket::bind("0.0.0.0:0").unwrap();
        if own.connect("192.0.2.1:9").is_ok() {
            let own = own.local_addr().unwrap().ip();
            assert_eq!(route(&["http://127.0.0.1:1", "192.0.2.1:2379"]).unwrap(), Some(own));
        }
        let error = format!("{:#}", route(&["http://no-such-host.invalid:2379"]).unwrap_err());
        assert!(error.contains("no-such-host.invalid"), "{error}");
    }

    #[test]
    fn a_worker_is_not_hidden_from_a_cluster_on_other_machines() {
        let check = |address: &str, etcd: &str| {
            let etcd: Vec<String> = etcd.split(',').map(str::to_owned).collect();
            check_reachable("--listen", address, &etcd)
        };
        assert!(check("http://127.0.0.1:7001", "http://127.0.0.1:2379").is_ok());
        assert!(check("http://127.0.0.1:7001", "localhost:2379,[::1]:2379").is_ok());
        assert!(check("http://10.0.0.7:7001", "http://10.0.0.5:2379").is_ok());
        for address in ["http://127.0.0.1:7001", "http://localhost:7001", "http://[::1]:7001"] {
            let error = check(address, "127.0.0.1:2379,http://10.0.0.5:2379").unwrap_err();
            let error = error.to_string();
            assert!(error.contains("--listen") && error.contains("10.0.0.5"), "{error}");
        }
    }
}
