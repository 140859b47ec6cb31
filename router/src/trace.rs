//! What follows a request from end to end: its id, and the W3C trace context it came with.

use crate::{RouterError, facts::Facts};
use http::{Extensions, HeaderMap, HeaderName, HeaderValue};
use std::sync::Arc;
use tonic::metadata::{AsciiMetadataValue, MetadataMap};

/// Names a request in answers, logs and on the worker.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const REQUEST_ID_BYTES_MAX: usize = 128;
const TRACESTATE_BYTES_MAX: usize = 512;

/// Identity of one request, and what is known of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trace {
    pub request_id: String,
    traceparent: Option<String>,
    tracestate: Option<String>,
    pub facts: Arc<Facts>,
}

impl Trace {
    /// Takes a usable `x-request-id` as it is, or draws one; passes on a well-formed trace context.
    pub fn from_headers(headers: &HeaderMap) -> Result<Self, RouterError> {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let request_id = match text("x-request-id").filter(|id| is_request_id(id)) {
            Some(id) => id.to_owned(),
            None => draw_id()?,
        };
        let traceparent = text("traceparent").filter(|value| is_traceparent(value));
        let tracestate = text("tracestate")
            .filter(|value| traceparent.is_some() && value.len() <= TRACESTATE_BYTES_MAX);
        Ok(Self {
            request_id,
            traceparent: traceparent.map(str::to_owned),
            tracestate: tracestate.map(str::to_owned),
            facts: Arc::default(),
        })
    }

    /// That of a request which came through the recorded routes.
    pub fn of(extensions: &Extensions) -> Self {
        extensions.get::<Self>().cloned().unwrap_or_default()
    }

    /// The id as a header's value.
    pub fn header(&self) -> HeaderValue {
        HeaderValue::from_str(&self.request_id).unwrap_or(HeaderValue::from_static("invalid"))
    }

    /// Writes it into the call to a worker.
    pub fn write(&self, metadata: &mut MetadataMap) {
        let mut insert = |name: &'static str, value: &str| {
            if let Ok(value) = AsciiMetadataValue::try_from(value) {
                metadata.insert(name, value);
            }
        };
        insert("x-request-id", &self.request_id);
        if let Some(value) = &self.traceparent {
            insert("traceparent", value);
        }
        if let Some(value) = &self.tracestate {
            insert("tracestate", value);
        }
    }
}

fn is_request_id(id: &str) -> bool {
    (1..=REQUEST_ID_BYTES_MAX).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic())
}

/// version-trace_id-parent_id-flags, in lower-case hexadecimal; ids of zeros are invalid.
fn is_traceparent(value: &str) -> bool {
    let parts: Vec<&str> = value.split('-').collect();
    let hex = |s: &str| s.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    parts.len() >= 4
        && value.len() <= 256
        && [2, 32, 16, 2].iter().zip(&parts).all(|(&len, part)| part.len() == len && hex(part))
        && parts[0] != "ff"
        && (parts[0] != "00" || parts.len() == 4)
        && !parts[1..3].iter().any(|id| id.bytes().all(|b| b == b'0'))
}

/// 128 random bits in hexadecimal.
fn draw_id() -> Result<String, RouterError> {
    Ok(format!("{:016x}{:016x}", random()?, random()?))
}

/// 64 random bits.
pub(crate) fn random() -> Result<u64, RouterError> {
    getrandom::u64().map_err(|error| RouterError::Random(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_usable_id_and_trace_context_are_passed_on() {
        let mut headers = HeaderMap::new();
        headers.insert("x-request-id", HeaderValue::from_static("abc-1"));
        headers.insert("traceparent", HeaderValue::from_static(PARENT));
        headers.insert("tracestate", HeaderValue::from_static("a=b"));
        let mut metadata = MetadataMap::new();
        Trace::from_headers(&headers).unwrap().write(&mut metadata);
        assert_eq!(metadata.get("x-request-id").unwrap(), "abc-1");
        assert_eq!(metadata.get("traceparent").unwrap(), PARENT);
        assert_eq!(metadata.get("tracestate").unwrap(), "a=b");
    }

    #[test]
    fn an_unusable_id_is_replaced_and_a_broken_context_dropped() {
        let mut headers = HeaderMap::new();
        headers.insert("x-request-id", HeaderValue::from_static("two words"));
        headers.insert("traceparent", HeaderValue::from_static("00-0-0-0"));
        headers.insert("tracestate", HeaderValue::from_static("a=b"));
        let trace = Trace::from_headers(&headers).unwrap();
        assert_eq!(trace.request_id.len(), 32);
        assert!(trace.traceparent.is_none() && trace.tracestate.is_none());
        assert_ne!(trace.request_id, Trace::from_headers(&headers).unwrap().request_id);
    }

    #[test]
    fn traceparents_are_checked() {
        assert!(is_traceparent(PARENT));
        assert!(is_traceparent(&format!("01{}-later", &PARENT[2..])));
        assert!(!is_traceparent(&format!("{PARENT}-later")));
        assert!(!is_traceparent(&PARENT.to_uppercase()));
        assert!(!is_traceparent(
            &PARENT.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32))
        ));
        assert!(!is_traceparent(&PARENT.replace("00-", "ff-")));
    }
}
