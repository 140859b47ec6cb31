//! OpenAI's HTTP API, and `/health` and `/metrics` beside it.

mod answer;
mod chat;
mod completions;
mod error;
mod fields;
mod harmless;
mod params;
mod sse;
mod tokenize;

use crate::{
    RouterError, RouterState,
    generate::{self, Answering},
    record::{Door, recorded},
    request::{Input, Prompt},
    resume::Resume,
    time_limit::TimeLimit,
    trace::Trace,
};
use answer::{AnswerHead, Part, Route};
use axum::{
    Json, Router,
    extract::{Path, Request, State},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};
use http_body_util::{BodyExt, Limited};
use params::Delivery;
use proto::v1::Sampling;
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::time::timeout;
use tower_http::{
    CompressionLevel,
    compression::{
        CompressionLayer, Predicate,
        predicate::{NotForContentType, SizeAbove},
    },
    cors::CorsLayer,
    decompression::RequestDecompressionLayer,
};

/// Answers up to this size fit one packet as they are.
const COMPRESSED_BYTES_MIN: u64 = 1400;

/// A request's body, understood.
#[derive(Debug)]
pub(crate) struct Body {
    model: String,
    prompts: Vec<Prompt>,
    sampling: Sampling,
    priority: i32,
    delivery: Delivery,
    /// Parameters without effect.
    ignored: Vec<String>,
}

/// Every route, to which bodies come unpacked and from which answers go packed as the client says.
pub(crate) fn routes(shared: Arc<RouterState>, cors: CorsLayer) -> Router {
    // Of an event stream each event has to leave at once.
    let worthwhile = SizeAbove::new(COMPRESSED_BYTES_MIN).and(NotForContentType::SSE);
    let compression =
        CompressionLayer::new().quality(CompressionLevel::Fastest).compress_when(worthwhile);
    let metrics_of = shared.metrics.clone();
    let routes = Router::new()
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(text_completions))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/version", get(tokenize::version))
        .route("/health", get(health))
        .route("/status", get(status))
        .route("/metrics", get(metrics))
        .method_not_allowed_fallback(async |request: Request| {
            RouterError::MethodNotAllowed(request.method().to_string())
        })
        .fallback(async |request: Request| {
            let path: String = request.uri().path().chars().take(100).collect();
            RouterError::RouteNotFound(format!("{} {path}", request.method()))
        })
        .with_state(shared)
        // What it does not know is refused where the body is read.
        .layer(RequestDecompressionLayer::new().pass_through_unaccepted(true))
        .layer(compression)
        .layer(cors);
    recorded(routes, &metrics_of, Door::Http)
}

async fn chat_completions(State(shared): State<Arc<RouterState>>, request: Request) -> Response {
    complete(shared, request, Route::Chat).await
}

async fn text_completions(State(shared): State<Arc<RouterState>>, request: Request) -> Response {
    complete(shared, request, Route::Completions).await
}

async fn complete(shared: Arc<RouterState>, request: Request, route: Route) -> Response {
    let trace = Trace::of(request.extensions());
    let facts = trace.facts.clone();
    match run(&shared, request, route, trace).await {
        Ok(Ready::Stream { answering, logprobs, delivery }) => {
            sse::Events::new(shared, facts, route, answering, (logprobs, delivery)).respond()
        }
        Ok(Ready::Whole(body)) => Json(body).into_response(),
        Err(failure) => {
            shared.count_refusal(&failure);
            failure.into_response()
        }
    }
}

/// What is ready to be sent.
enum Ready {
    Whole(Value),
    Stream { answering: Answering, logprobs: bool, delivery: Delivery },
}

async fn run(
    shared: &Arc<RouterState>,
    request: Request,
    route: Route,
    trace: Trace,
) -> Result<Ready, RouterError> {
    let time = TimeLimit::from_http(request.headers(), &shared.upstream.deadlines)?;
    let resume = Resume::from_http(request.headers())?;
    let permit = shared.permit(1)?;
    let body = read_body(shared, request).await?;
    let body = match route {
        Route::Chat => chat::parse(&body)?,
        Route::Completions => completions::parse(&body)?,
    };
    let logprobs = body.sampling.logprobs.is_some();
    let Body { model, prompts, sampling, priority, delivery, ignored } = body;
    if !ignored.is_empty() {
        let (request_id, names) = (&trace.request_id, ignored.join(", "));
        tracing::debug!(request_id, names, "parameters without effect on the answer");
    }
    let input = Input { model, prompts, sampling, priority, resume, trace };
    if delivery.stream {
        let answering = Answering::begin(shared.clone(), input, permit, time).await?;
        return Ok(Ready::Stream { answering, logprobs, delivery });
    }
    let mut generation = generate::begin(shared.clone(), input, permit, time).await?;
    let answer = AnswerHead::new(route, &generation, logprobs);
    let mut parts: Vec<Part> = (0..generation.choices).map(|_| Part::default()).collect();
    while let Some(chunk) = generation.next().await {
        let chunk = chunk?;
        let part = parts.get_mut(chunk.choice as usize);
        part.ok_or_else(|| RouterError::Internal("a choice out of range".into()))?.add(chunk);
    }
    Ok(Ready::Whole(answer.whole(parts, generation.usage(), &generation.language)))
}

async fn read_body(shared: &RouterState, request: Request) -> Result<Bytes, RouterError> {
    let limit = shared.upstream.limits.body_bytes_max;
    let deadline = shared.upstream.deadlines.body;
    if let Some(encoding) = request.headers().get(header::CONTENT_ENCODING)
        && encoding != "identity"
    {
        return Err(RouterError::Encoding(String::from_utf8_lossy(encoding.as_bytes()).into()));
    }
    if content_length(request.headers()).is_some_and(|length| length > limit as u64) {
        return Err(RouterError::TooLarge { limit });
    }
    // Unpacked bytes count: a small body may be a large one.
    let read = Limited::new(request.into_body(), limit).collect();
    match timeout(deadline, read).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
            Err(RouterError::TooLarge { limit })
        }
        Ok(Err(error)) => {
            let message = format!("the body broke off: {error}");
            Err(RouterError::Invalid { param: None, message })
        }
        Err(_) => Err(RouterError::BodyDeadline(deadline)),
    }
}

fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

async fn models(State(shared): State<Arc<RouterState>>) -> Response {
    let models: Vec<Value> = shared.served().into_iter().map(|m| describe(&m)).collect();
    Json(json!({"object": "list", "data": models})).into_response()
}

async fn model(State(shared): State<Arc<RouterState>>, Path(id): Path<String>) -> Response {
    let served = shared.served();
    match served.iter().find(|model| model.id == id) {
        Some(model) => Json(describe(model)).into_response(),
        None => {
            let names: Vec<&str> = served.iter().map(|model| model.id.as_str()).collect();
            RouterError::ModelNotFound { model: id, served: names.join(", ") }.into_response()
        }
    }
}

fn describe(model: &proto::v1::Model) -> Value {
    let root = if model.root.is_empty() { &model.id } else { &model.root };
    json!({"id": model.id, "object": "model", "created": model.created, "owned_by": "lockstep",
        "root": root, "max_model_len": model.context_max})
}

/// 200 while requests can be answered: a worker is ready and the router does not end.
async fn health(State(shared): State<Arc<RouterState>>) -> Response {
    let models: Vec<String> = shared.served().into_iter().map(|model| model.id).collect();
    let (status, word) = match (shared.leaves(), models.is_empty()) {
        (true, _) => (StatusCode::SERVICE_UNAVAILABLE, "draining"),
        (false, true) => (StatusCode::SERVICE_UNAVAILABLE, "no ready worker"),
        (false, false) => (StatusCode::OK, "ok"),
    };
    (status, Json(json!({"status": word, "models": models}))).into_response()
}

async fn status(State(shared): State<Arc<RouterState>>) -> Response {
    Json(shared.status()).into_response()
}

async fn metrics(State(shared): State<Arc<RouterState>>, headers: HeaderMap) -> Response {
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok());
    match shared.metrics.exposition(accept) {
        Ok((kind, text)) => ([(header::CONTENT_TYPE, kind)], text).into_response(),
        Err(error) => RouterError::Internal(format!("metrics: {error}")).into_response(),
    }
}
