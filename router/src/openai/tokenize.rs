//! `/tokenize`, `/detokenize` and `/version`, in vLLM's shapes.

use super::{answer, chat::conversation, completions::reading, fields::Fields, read_body};
use crate::{
    RouterError, RouterState,
    request::{self, Prompt, Tokens},
};
use axum::{
    Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};
use std::sync::Arc;

pub(super) async fn version() -> Response {
    Json(json!({"version": env!("CARGO_PKG_VERSION")})).into_response()
}

pub(super) async fn tokenize(State(shared): State<Arc<RouterState>>, request: Request) -> Response {
    respond(&shared, ids(&shared, request).await)
}

pub(super) async fn detokenize(
    State(shared): State<Arc<RouterState>>,
    request: Request,
) -> Response {
    respond(&shared, text(&shared, request).await)
}

fn respond(shared: &RouterState, result: Result<Value, RouterError>) -> Response {
    match result {
        Ok(body) => Json(body).into_response(),
        Err(failure) => {
            shared.count_refusal(&failure);
            failure.into_response()
        }
    }
}

async fn ids(shared: &RouterState, request: Request) -> Result<Value, RouterError> {
    let mut fields = Fields::parse(&read_body(shared, request).await?)?;
    let model = fields.string("model")?.unwrap_or_default();
    let names = fields.boolean("return_token_strs")?.unwrap_or(false);
    let prompt = match fields.string("prompt")? {
        Some(text) => Prompt::Text(text, reading(&mut fields)?),
        None if fields.has("messages") => {
            // The template puts them.
            fields.only("add_special_tokens", &[json!(false)])?;
            Prompt::Chat(Box::new(conversation(&mut fields)?))
        }
        None => {
            let message = "prompt is missing; give text as prompt, or messages";
            return Err(RouterError::invalid("prompt", message));
        }
    };
    fields.ignore("mm_processor_kwargs");
    fields.unsupported("chat_template")?;
    fields.finish()?;
    let Tokens { ids, language, context_max } = request::tokenize(shared, &model, prompt).await?;
    let names: Option<Vec<String>> =
        names.then(|| ids.iter().map(|&id| answer::name(&language, id)).collect());
    Ok(json!({
        "count": ids.len(), "max_model_len": context_max, "tokens": ids, "token_strs": names,
    }))
}

async fn text(shared: &RouterState, request: Request) -> Result<Value, RouterError> {
    let mut fields = Fields::parse(&read_body(shared, request).await?)?;
    let model = fields.string("model")?.unwrap_or_default();
    if !fields.has("tokens") {
        return Err(RouterError::invalid("tokens", "tokens is missing; give an array of ids"));
    }
    let ids = fields.uints("tokens")?;
    fields.finish()?;
    let prompt = request::detokenize(shared, &model, "tokens", ids).await?;
    Ok(json!({"prompt": prompt}))
}
