//! Around the gRPC services: compression as the client has it, and codes that clients understand.

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::Response,
};
use http::{HeaderMap, HeaderName};
use tonic::{Code, Status, codec::CompressionEncoding};

const ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");
const ACCEPT_ENCODING: HeaderName = HeaderName::from_static("grpc-accept-encoding");

/// What requests may be compressed with, and answers.
pub(crate) const ENCODINGS: [CompressionEncoding; 3] =
    [CompressionEncoding::Gzip, CompressionEncoding::Deflate, CompressionEncoding::Zstd];

/// Passes a call on and mends its answer. `body_bytes_max` is the limit of a request's message.
pub(crate) async fn adapt(
    State(body_bytes_max): State<usize>,
    mut request: Request,
    next: Next,
) -> Response {
    answer_alike(request.headers_mut());
    let response = next.run(request).await;
    // tonic's code for a message over the limit says that an argument is out of range.
    match Status::from_header_map(response.headers()).map(|status| status.code()) {
        Some(Code::OutOfRange) => {
            let message = format!(
                "the message exceeds {body_bytes_max} bytes; shorten it or raise the router's \
                 body limit"
            );
            Status::resource_exhausted(message).into_http()
        }
        _ => response,
    }
}

/// Answers a compressed request in its own encoding, and others plainly: clients announce all that
/// they know, but messages of a few tokens only grow.
fn answer_alike(headers: &mut HeaderMap) {
    let own = headers.get(&ENCODING).cloned();
    let accepted = headers.remove(&ACCEPT_ENCODING);
    let Some((own, accepted)) = own.zip(accepted) else { return };
    let mut names = accepted.as_bytes().split(|&byte| byte == b',').map(<[u8]>::trim_ascii);
    if names.any(|name| name == own.as_bytes()) {
        headers.insert(ACCEPT_ENCODING, own);
    }
}
