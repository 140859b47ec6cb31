//! What became of each request: one log line and its counts, the same on both doors.
//!
//! A layer around a door's routes names the request, hands its `Facts` to whoever serves it, and
//! writes once the answer's last byte is gone, or the client is.

use crate::{
    metrics::{Ended, Metrics},
    trace::{REQUEST_ID, Trace},
};
use axum::{
    body::Body,
    extract::{MatchedPath, Request, State},
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
};
use http::HeaderMap;
use hyper::body::{Body as HttpBody, Bytes, Frame, SizeHint};
use std::{
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::time::Instant;
use tonic::{Code, Status};

/// The label of what is no route, so that callers cannot make labels.
const UNKNOWN: &str = "unknown";
/// Of an error, in characters.
const ERROR_MAX: usize = 500;

/// Which language a door speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Door {
    Http,
    Grpc,
}

/// The peer of the connection that a request came by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Client(pub SocketAddr);

/// The error behind an answer, for the log.
#[derive(Clone, Debug)]
pub(crate) struct Told(pub String);

/// Records what comes by these routes.
pub(crate) fn recorded(routes: axum::Router, metrics: &Arc<Metrics>, door: Door) -> axum::Router {
    routes.layer(from_fn_with_state((metrics.clone(), door), record))
}

async fn record(
    State((metrics, door)): State<(Arc<Metrics>, Door)>,
    mut request: Request,
    next: Next,
) -> Response {
    let trace = match Trace::from_headers(request.headers()) {
        Ok(trace) => trace,
        Err(failure) => return failure.into_response(),
    };
    let mut entry = Entry::new(metrics, door, &request, trace.clone());
    let id = trace.header();
    request.extensions_mut().insert(trace);
    let mut response = next.run(request).await;
    response.headers_mut().insert(REQUEST_ID, id);
    entry.answer(&response);
    response.map(|body| Body::new(Recorded { body, entry }))
}

/// How far an answer came.
#[derive(Debug)]
enum Fate {
    /// Nothing was sent, or not all of it.
    Open,
    Ended,
}

/// One request; its line is written when this is dropped.
struct Entry {
    metrics: Arc<Metrics>,
    door: Door,
    route: String,
    client: Option<SocketAddr>,
    trace: Trace,
    started: Instant,
    /// Status or code, once it is known.
    code: Option<String>,
    error: Option<String>,
    fate: Fate,
}

impl Entry {
    fn new(metrics: Arc<Metrics>, door: Door, request: &Request, trace: Trace) -> Self {
        let extensions = request.extensions();
        let route = match door {
            Door::Http => extensions
                .get::<MatchedPath>()
                .map_or(UNKNOWN.to_owned(), |path| path.as_str().replace("{*", "{")),
            Door::Grpc => method(request.uri().path()).to_owned(),
        };
        let client = extensions.get::<Client>().map(|client| client.0);
        Self {
            metrics,
            door,
            route,
            client,
            trace,
            started: Instant::now(),
            code: None,
            error: None,
            fate: Fate::Open,
        }
    }

    /// The answer begins.
    fn answer(&mut self, response: &Response) {
        if let Some(Told(error)) = response.extensions().get() {
            self.error = Some(error.clone());
        }
        match self.door {
            Door::Http => self.code = Some(response.status().as_str().to_owned()),
            // Where there is no body, the end is here already.
            Door::Grpc => self.trailers(response.headers()),
        }
        if HttpBody::is_end_stream(response.body()) {
            self.fate = Fate::Ended;
        }
    }

    fn trailers(&mut self, trailers: &HeaderMap) {
        if let (Door::Grpc, Some(status)) = (self.door, Status::from_header_map(trailers)) {
            self.code = Some(code_name(status.code()).to_owned());
            if status.code() == Code::Unimplemented {
                self.route = UNKNOWN.to_owned();
            }
            if status.code() != Code::Ok {
                self.error = Some(status.message().to_owned());
            }
            self.fate = Fate::Ended;
        }
    }

    /// Probes come every few seconds, for as long as the router lives.
    fn is_probe(&self) -> bool {
        ["/health", "/metrics", "Health", "Reflection"].contains(&self.route.as_str())
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let known = self.trace.facts.known().clone();
        let gone = matches!(self.fate, Fate::Open) && known.failure.is_none();
        let code = match (&known.failure, gone, self.door) {
            (Some((code, _)), ..) => (*code).to_owned(),
            (None, true, Door::Http) => "499".to_owned(),
            (None, true, Door::Grpc) => "CANCELLED".to_owned(),
            (None, false, _) => self.code.take().unwrap_or_else(|| "UNKNOWN".to_owned()),
        };
        let error = known.failure.as_ref().map(|(_, error)| error).or(self.error.as_ref());
        let error: Option<String> = error.map(|error| error.chars().take(ERROR_MAX).collect());
        self.metrics.ended(&Ended {
            route: &self.route,
            code: &code,
            known: &known,
            started: self.started,
            whole: !gone && error.is_none(),
        });
        let message = match (gone, error.is_some()) {
            (true, _) => "client went away",
            (false, true) if is_refusal(&code) => "request refused",
            (false, true) => "request failed",
            (false, false) => "request ended",
        };
        let client = self.client.map(|client| client.to_string());
        let since_start = |at: Instant| milliseconds(at.duration_since(self.started));
        let served = known.taken.is_some();
        let finish = (!known.finishes.is_empty()).then(|| finishes(&known.finishes));
        let workers = (!known.workers.is_empty()).then(|| known.workers.join(","));
        macro_rules! line {
            ($level:ident) => {
                tracing::$level!(
                    request_id = self.trace.request_id,
                    client,
                    route = self.route,
                    model = known.model,
                    status = code,
                    finish,
                    milliseconds = milliseconds(self.started.elapsed()),
                    first_token_milliseconds = known.first_token.map(since_start),
                    queue_milliseconds = known.queued.map(milliseconds),
                    prompt_tokens = (known.prompt_tokens > 0).then_some(known.prompt_tokens),
                    cached_tokens = served.then_some(known.cached_tokens),
                    completion_tokens = served.then_some(known.completion_tokens),
                    workers,
                    error,
                    "{message}"
                )
            };
        }
        match self.is_probe() {
            true => line!(debug),
            false => line!(info),
        }
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Whether the client, or how much there is to do, is the reason.
fn is_refusal(code: &str) -> bool {
    let named = ["INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED"];
    code.starts_with('4') || named.contains(&code)
}

/// `stop`, or with several choices `stop:3,length:1`.
fn finishes(all: &[&'static str]) -> String {
    if let [only] = all {
        return (*only).to_owned();
    }
    let mut seen: Vec<(&str, usize)> = Vec::new();
    for &reason in all {
        match seen.iter_mut().find(|(known, _)| *known == reason) {
            Some((_, count)) => *count += 1,
            None => seen.push((reason, 1)),
        }
    }
    seen.iter().map(|(reason, count)| format!("{reason}:{count}")).collect::<Vec<_>>().join(",")
}

/// The method of a gRPC path; of other services only the service.
fn method(path: &str) -> &str {
    let inference = path.strip_prefix('/').and_then(|path| path.split_once('/'));
    match inference {
        Some((proto::v1::inference_server::SERVICE_NAME, method)) => method,
        Some(("grpc.health.v1.Health", _)) => "Health",
        Some((service, _)) if service.starts_with("grpc.reflection.") => "Reflection",
        _ => UNKNOWN,
    }
}

fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// An answer's body, watched for its end.
struct Recorded {
    body: Body,
    entry: Entry,
}

impl HttpBody for Recorded {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                if let Some(trailers) = frame.trailers_ref() {
                    self.entry.trailers(trailers);
                }
                if self.body.is_end_stream() {
                    self.entry.fate = Fate::Ended;
                }
            }
            Some(Err(error)) => {
                self.entry.error = Some(error.to_string());
                self.entry.fate = Fate::Ended;
            }
            None => self.entry.fate = Fate::Ended,
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_callers_make_no_labels() {
        assert_eq!(method("/lockstep.v1.Inference/Chat"), "Chat");
        assert_eq!(method("/grpc.health.v1.Health/Check"), "Health");
        assert_eq!(
            method("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"),
            "Reflection"
        );
        for path in ["/", "", "/other.Service/Chat", "/x"] {
            assert_eq!(method(path), UNKNOWN, "{path}");
        }
    }

    #[test]
    fn reasons_are_counted_where_there_are_several() {
        assert_eq!(finishes(&["stop"]), "stop");
        assert_eq!(finishes(&["stop", "length", "stop"]), "stop:2,length:1");
    }
}
