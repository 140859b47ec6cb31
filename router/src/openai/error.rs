//! Errors in the shape that OpenAI's clients read.

use crate::{RouterError, error::prompt_too_long, record::Told};
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde_json::{Value, json};

/// What an error is called on this API.
struct Words {
    status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
}

fn words(error: &RouterError) -> Words {
    let words = |status, kind, code| Words { status, kind, code };
    let invalid = "invalid_request_error";
    match error {
        RouterError::Invalid { .. } => words(StatusCode::BAD_REQUEST, invalid, None),
        RouterError::ContextExceeded { .. } => {
            words(StatusCode::BAD_REQUEST, invalid, Some("context_length_exceeded"))
        }
        RouterError::ModelNotFound { .. } => {
            words(StatusCode::NOT_FOUND, invalid, Some("model_not_found"))
        }
        RouterError::RouteNotFound(_) => words(StatusCode::NOT_FOUND, invalid, None),
        RouterError::MethodNotAllowed(_) => words(StatusCode::METHOD_NOT_ALLOWED, invalid, None),
        RouterError::TooLarge { .. } => {
            words(StatusCode::PAYLOAD_TOO_LARGE, invalid, Some("request_too_large"))
        }
        RouterError::Encoding(_) => words(StatusCode::UNSUPPORTED_MEDIA_TYPE, invalid, None),
        RouterError::BodyDeadline(_) => words(StatusCode::REQUEST_TIMEOUT, invalid, None),
        RouterError::Overloaded { .. } => {
            words(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("overloaded"))
        }
        RouterError::Unavailable(_) => {
            words(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable", Some("unavailable"))
        }
        _ => words(StatusCode::INTERNAL_SERVER_ERROR, "server_error", None),
    }
}

/// The status as a metric's label.
pub(crate) fn label(error: &RouterError) -> &'static str {
    match words(error).status.as_u16() {
        400 => "400",
        404 => "404",
        405 => "405",
        408 => "408",
        413 => "413",
        415 => "415",
        429 => "429",
        503 => "503",
        _ => "500",
    }
}

/// The body: `{"error": {message, type, param, code}}`.
pub(crate) fn body(error: &RouterError) -> Value {
    let param = match error {
        RouterError::Invalid { param, .. } => param.as_deref(),
        RouterError::ContextExceeded { from, prompt, context, .. } => {
            Some(if prompt_too_long(*prompt, *context) { from } else { "max_tokens" })
        }
        RouterError::ModelNotFound { .. } => Some("model"),
        _ => None,
    };
    let Words { kind, code, .. } = words(error);
    json!({"error": {
        "message": error.to_string(), "type": kind, "param": param, "code": code,
    }})
}

impl IntoResponse for RouterError {
    fn into_response(self) -> Response {
        let mut response = (words(&self).status, axum::Json(body(&self))).into_response();
        response.extensions_mut().insert(Told(self.to_string()));
        let seconds = match &self {
            Self::Overloaded { retry_after, .. } => retry_after.as_secs().max(1),
            Self::Unavailable(_) => 5,
            _ => return response,
        };
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        response
    }
}
