//! OpenAI's HTTP API, and `/health` and `/metrics` beside it.

mod answer;
mod chat;
mod completions;
mod error;
mod fields;
mod params;
mod sse;

use crate::{
    RouterError, Shared,
    generate::{self, Answering},
    metrics::Outcome,
    request::{Input, Prompt},
    sampling::SamplingInput,
    time_limit::TimeLimit,
    trace::{REQUEST_ID, Trace},
};
use answer::{Answer, Part, Route};
use axum::{
    Json, Router,
    body::Body as HttpBody,
    extract::{Path, Request, State},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};
use http_body_util::{BodyExt, Limited};
use params::Delivery;
use serde_json::{Value, json};
use std::{fmt::Display, sync::Arc};
use tokio::time::timeout;

/// A body beyond the limit is still read, up to this many times the limit, so that the client
/// gets to read the refusal instead of a broken connection.
const DISCARD_FACTOR: usize = 16;

/// A request's body, understood.
#[derive(Debug)]
pub(crate) struct Body {
    model: String,
    prompts: Vec<Prompt>,
    sampling: SamplingInput,
    delivery: Delivery,
}

/// Every route.
pub(crate) fn routes(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(text_completions))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .method_not_allowed_fallback(async |request: Request| {
            RouterError::MethodNotAllowed(request.method().to_string())
        })
        .fallback(async |request: Request| {
            let path: String = request.uri().path().chars().take(100).collect();
            RouterError::RouteNotFound(format!("{} {path}", request.method()))
        })
        .with_state(shared)
}

async fn chat_completions(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    complete(shared, request, Route::Chat).await
}

async fn text_completions(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    complete(shared, request, Route::Completions).await
}

async fn complete(shared: Arc<Shared>, request: Request, route: Route) -> Response {
    let mut outcome = Outcome::new(&shared.metrics, route.path(), "499");
    let trace = match Trace::from_headers(request.headers()) {
        Ok(trace) => trace,
        Err(failure) => {
            outcome.set(error::label(&failure));
            return failure.into_response();
        }
    };
    let id = trace.header();
    let mut response = match run(&shared, request, route, trace).await {
        Ok(Ready::Stream { answering, logprobs, delivery }) => {
            let events = sse::Events::new(shared, route, answering, (logprobs, delivery), outcome);
            events.respond()
        }
        Ok(Ready::Whole(body)) => {
            outcome.set("200");
            Json(body).into_response()
        }
        Err(failure) => {
            outcome.set(error::label(&failure));
            shared.count_refusal(&failure);
            failure.into_response()
        }
    };
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// What is ready to be sent.
enum Ready {
    Whole(Value),
    Stream { answering: Answering, logprobs: bool, delivery: Delivery },
}

async fn run(
    shared: &Arc<Shared>,
    request: Request,
    route: Route,
    trace: Trace,
) -> Result<Ready, RouterError> {
    let time = TimeLimit::from_http(request.headers())?;
    let permit = shared.permit(1)?;
    let body = read_body(shared, request).await?;
    let body = match route {
        Route::Chat => chat::parse(&body)?,
        Route::Completions => completions::parse(&body)?,
    };
    let logprobs = body.sampling.logprobs.is_some();
    let Body { model, prompts, sampling, delivery } = body;
    let input = Input { model, prompts, sampling, trace };
    if delivery.stream {
        let answering = Answering::begin(shared.clone(), input, permit, time).await?;
        return Ok(Ready::Stream { answering, logprobs, delivery });
    }
    let mut generation = generate::begin(shared.clone(), input, permit, time).await?;
    let answer = Answer::new(route, &generation, logprobs);
    let mut parts: Vec<Part> = (0..generation.choices).map(|_| Part::default()).collect();
    while let Some(chunk) = generation.next().await {
        let chunk = chunk?;
        let part = parts.get_mut(chunk.choice as usize);
        part.ok_or_else(|| RouterError::Internal("a choice out of range".into()))?.add(chunk);
    }
    Ok(Ready::Whole(answer.whole(parts, generation.usage(), &generation.language)))
}

async fn read_body(shared: &Shared, request: Request) -> Result<Bytes, RouterError> {
    let limit = shared.upstream.limits.body_bytes_max;
    let deadline = shared.upstream.deadlines.body;
    let announced = content_length(request.headers());
    let body = request.into_body();
    let read = async {
        if announced.is_some_and(|length| length > limit as u64) {
            discard(body, limit.saturating_mul(DISCARD_FACTOR)).await;
            return Err(RouterError::TooLarge { limit });
        }
        match Limited::new(body, limit).collect().await {
            Ok(collected) => Ok(collected.to_bytes()),
            Err(error) if error.is::<http_body_util::LengthLimitError>() => {
                Err(RouterError::TooLarge { limit })
            }
            Err(error) => {
                let message = format!("the body broke off: {error}");
                Err(RouterError::Invalid { param: None, message })
            }
        }
    };
    timeout(deadline, read).await.unwrap_or(Err(RouterError::BodyDeadline(deadline)))
}

fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

async fn discard(mut body: HttpBody, most: usize) {
    let mut left = most;
    while let Some(Ok(frame)) = body.frame().await {
        let length = frame.data_ref().map_or(0, Bytes::len);
        if length > left {
            return;
        }
        left -= length;
    }
}

async fn models(State(shared): State<Arc<Shared>>) -> Response {
    let mut outcome = Outcome::new(&shared.metrics, "/v1/models", "499");
    outcome.set("200");
    let models: Vec<Value> = shared.served().into_iter().map(|m| describe(&m)).collect();
    Json(json!({"object": "list", "data": models})).into_response()
}

async fn model(State(shared): State<Arc<Shared>>, Path(id): Path<String>) -> Response {
    let mut outcome = Outcome::new(&shared.metrics, "/v1/models/{id}", "499");
    let served = shared.served();
    match served.iter().find(|model| model.id == id) {
        Some(model) => {
            outcome.set("200");
            Json(describe(model)).into_response()
        }
        None => {
            outcome.set("404");
            let names: Vec<&str> = served.iter().map(|model| model.id.as_str()).collect();
            RouterError::ModelNotFound { model: id, served: names.join(", ") }.into_response()
        }
    }
}

fn describe(model: &proto::v1::Model) -> Value {
    json!({"id": model.id, "object": "model", "created": model.created, "owned_by": "lockstep",
        "max_model_len": model.context_max})
}

/// 200 while requests can be answered: a worker is ready and the router does not drain.
async fn health(State(shared): State<Arc<Shared>>) -> Response {
    let models: Vec<String> = shared.served().into_iter().map(|model| model.id).collect();
    let (status, word) = match (shared.drains(), models.is_empty()) {
        (true, _) => (StatusCode::SERVICE_UNAVAILABLE, "draining"),
        (false, true) => (StatusCode::SERVICE_UNAVAILABLE, "no ready worker"),
        (false, false) => (StatusCode::OK, "ok"),
    };
    (status, Json(json!({"status": word, "models": models}))).into_response()
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    let internal = |error: &dyn Display| RouterError::Internal(format!("metrics: {error}"));
    match shared.metrics.encode() {
        Ok(text) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => internal(&error).into_response(),
    }
}
