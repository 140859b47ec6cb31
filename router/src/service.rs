//! `lockstep.v1.Inference` over gRPC, with health and reflection beside it.

use crate::{
    RouterError, RouterState,
    choice::Chunk,
    generate::{Answering, Generation},
    request::{self, Input, Prompt, Reading},
    resume::{Cursor, Resume},
    time_limit::TimeLimit,
    trace::Trace,
};
use futures_util::{Stream, stream::unfold};
use http::HeaderMap;
use proto::v1::{
    ChatRequest, DetokenizeRequest, DetokenizeResponse, GenerateRequest, GenerateResponse,
    ListModelsRequest, ListModelsResponse, Message as WireMessage, TokenizeRequest,
    TokenizeResponse, generate_request, inference_server::Inference,
};
use serde_json::{Map, Value};
use std::{pin::Pin, sync::Arc};
use text::{Chat, Content, FinishReason, Message};
use tonic::{Code, Request, Response, Status};

type AnswerStream = Pin<Box<dyn Stream<Item = Result<GenerateResponse, Status>> + Send>>;

/// The service's door.
pub(crate) struct Service {
    pub shared: Arc<RouterState>,
}

/// What a client is told, with advice on when to try again.
fn status(error: &RouterError) -> Status {
    let code = match error {
        RouterError::Invalid { .. } | RouterError::ContextExceeded { .. } => Code::InvalidArgument,
        RouterError::ModelNotFound { .. } => Code::NotFound,
        RouterError::Overloaded { .. } => Code::ResourceExhausted,
        RouterError::Timeout { .. } => Code::DeadlineExceeded,
        RouterError::Unavailable(_) => Code::Unavailable,
        _ => Code::Internal,
    };
    let mut status = Status::new(code, error.to_string());
    if let RouterError::Overloaded { retry_after, .. } = error {
        let milliseconds = u64::try_from(retry_after.as_millis()).unwrap_or(u64::MAX);
        for name in ["grpc-retry-pushback-ms", "retry-after-ms"] {
            status.metadata_mut().insert(name, milliseconds.into());
        }
    }
    status
}

impl Service {
    fn refuse(&self, error: &RouterError) -> Status {
        self.shared.count_refusal(error);
        status(error)
    }

    /// An answer of one message.
    async fn respond<T>(
        &self,
        work: impl Future<Output = Result<T, RouterError>>,
    ) -> Result<Response<T>, Status> {
        work.await.map(Response::new).map_err(|error| self.refuse(&error))
    }

    async fn answer(
        &self,
        trace: Trace,
        (headers, include_progress): (HeaderMap, bool),
        input: impl FnOnce(Trace) -> Result<Input, RouterError>,
    ) -> Result<Response<AnswerStream>, Status> {
        let start = async {
            let time = TimeLimit::from_grpc(&headers, &self.shared.upstream.deadlines)?;
            let permit = self.shared.permit(1)?;
            let resume = Resume::from_http(&headers)?;
            let input = Input { resume, ..input(trace)? };
            Answering::begin(self.shared.clone(), input, permit, time).await
        };
        let answering = start.await.map_err(|error| self.refuse(&error))?;
        let shared = self.shared.clone();
        let messages = Messages { shared, answering, include_progress, cursor: None, ended: false };
        Ok(Response::new(Box::pin(unfold(messages, |mut messages| async {
            let next = messages.next().await?;
            Some((next, messages))
        }))))
    }
}

/// One answer's stream of messages.
struct Messages {
    shared: Arc<RouterState>,
    answering: Answering,
    include_progress: bool,
    /// How far the client is once it has the next message, where it may want to go on with it.
    cursor: Option<Cursor>,
    ended: bool,
}

impl Messages {
    /// `None` after every choice's finish, or an error.
    async fn next(&mut self) -> Option<Result<GenerateResponse, Status>> {
        if self.ended {
            return None;
        }
        loop {
            let generation = match self.answering.started().await {
                Ok(generation) => generation,
                Err(error) => {
                    self.shared.count_refusal(&error);
                    return Some(Err(self.fail(&error)));
                }
            };
            if self.cursor.is_none() && generation.resume.is_some() {
                self.cursor = Some(Cursor::new(&generation.fingerprint, generation.choices));
            }
            match generation.next().await? {
                Ok(chunk) if chunk.progress.is_some() && !self.include_progress => {}
                Ok(chunk) => {
                    let (choice, ended) = (chunk.choice as usize, chunk.finish.is_some());
                    let cursor = self.cursor.as_mut().map(|cursor| {
                        cursor.advance(choice, chunk.sampled, ended);
                        cursor.to_string()
                    });
                    // The client has all of it already.
                    let known = generation.last().is_some_and(|last| last.place(choice).ended);
                    if !known || generation.ended() {
                        return Some(Ok(words(chunk, cursor, generation)));
                    }
                }
                Err(error) => return Some(Err(self.fail(&error))),
            }
        }
    }

    fn fail(&mut self, error: &RouterError) -> Status {
        self.ended = true;
        status(error)
    }
}

fn words(chunk: Chunk, cursor: Option<String>, generation: &Generation) -> GenerateResponse {
    GenerateResponse {
        choice: chunk.choice,
        text: chunk.text,
        tokens: chunk.tokens.into_iter().map(|token| token.info).collect(),
        finish_reason: chunk.finish.map_or("", FinishReason::as_str).to_owned(),
        usage: generation.ended().then(|| generation.usage()),
        request_id: generation.request_id.clone(),
        progress: chunk.progress,
        cursor: cursor.unwrap_or_default(),
    }
}

/// A field that holds JSON; empty is absent.
fn json<T: serde::de::DeserializeOwned>(
    name: &str,
    kind: &str,
    text: &str,
) -> Result<Option<T>, RouterError> {
    if text.is_empty() {
        return Ok(None);
    }
    let wrong = |error| RouterError::invalid(name, format!("{name} is not a JSON {kind}: {error}"));
    serde_json::from_str(text).map(Some).map_err(wrong)
}

fn message(at: usize, wire: WireMessage) -> Result<Message, RouterError> {
    let name = format!("messages[{at}].tool_calls_json");
    let calls: Option<Vec<Value>> = json(&name, "array", &wire.tool_calls_json)?;
    let tool_calls = calls.filter(|calls| !calls.is_empty()).map(Value::Array);
    if tool_calls.is_some() && wire.role != "assistant" {
        let message = format!("{name} is only for messages of the assistant");
        return Err(RouterError::invalid(name, message));
    }
    // The wire has no null: a message that only calls tools has no text.
    let content = match tool_calls {
        Some(_) if wire.content.is_empty() => Content::Null,
        _ => Content::Text(wire.content),
    };
    Ok(Message { role: wire.role, content, tool_calls, extra: Map::new() })
}

fn chat(wire: ChatRequest, trace: Trace) -> Result<Input, RouterError> {
    let sampling = wire.sampling.unwrap_or_default();
    if sampling.echo {
        return Err(RouterError::invalid("echo", "echo is supported by Generate only"));
    }
    let messages = wire.messages.into_iter().enumerate();
    let tools: Option<Vec<Value>> = json("tools_json", "array", &wire.tools_json)?;
    let args = json("template_args_json", "object", &wire.template_args_json)?;
    let chat = Chat {
        messages: messages.map(|(at, wire)| message(at, wire)).collect::<Result<_, _>>()?,
        tools: tools.filter(|tools| !tools.is_empty()).map(Value::Array),
        args: args.unwrap_or_default(),
        add_generation_prompt: !wire.continue_final_message,
        continue_final_message: wire.continue_final_message,
    };
    let prompts = vec![Prompt::Chat(Box::new(chat))];
    let (priority, resume) = (wire.priority, None);
    Ok(Input { model: wire.model, prompts, sampling, priority, resume, trace })
}

#[tonic::async_trait]
impl Inference for Service {
    type GenerateStream = AnswerStream;
    type ChatStream = AnswerStream;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<AnswerStream>, Status> {
        let (metadata, extensions, wire) = request.into_parts();
        let asked = (metadata.into_headers(), wire.include_progress);
        self.answer(Trace::of(&extensions), asked, |trace| {
            let prompt = match wire.prompt {
                Some(generate_request::Prompt::Text(text)) => {
                    let parse_special = wire.parse_special.unwrap_or(true);
                    Prompt::Text(text, Reading { parse_special, ..Reading::default() })
                }
                Some(generate_request::Prompt::Ids(ids)) => Prompt::Ids(ids.ids),
                None => {
                    let message = "prompt is missing; give text or ids";
                    return Err(RouterError::invalid("prompt", message));
                }
            };
            let sampling = wire.sampling.unwrap_or_default();
            let (priority, resume, prompts) = (wire.priority, None, vec![prompt]);
            Ok(Input { model: wire.model, prompts, sampling, priority, resume, trace })
        })
        .await
    }

    async fn chat(&self, request: Request<ChatRequest>) -> Result<Response<AnswerStream>, Status> {
        let (metadata, extensions, wire) = request.into_parts();
        let asked = (metadata.into_headers(), wire.include_progress);
        self.answer(Trace::of(&extensions), asked, |trace| chat(wire, trace)).await
    }

    async fn tokenize(
        &self,
        request: Request<TokenizeRequest>,
    ) -> Result<Response<TokenizeResponse>, Status> {
        self.respond(tokenize(&self.shared, request.into_inner())).await
    }

    async fn detokenize(
        &self,
        request: Request<DetokenizeRequest>,
    ) -> Result<Response<DetokenizeResponse>, Status> {
        self.respond(detokenize(&self.shared, request.into_inner())).await
    }

    async fn list_models(
        &self,
        _: Request<ListModelsRequest>,
    ) -> Result<Response<ListModelsResponse>, Status> {
        Ok(Response::new(ListModelsResponse { models: self.shared.served() }))
    }
}

async fn tokenize(
    shared: &RouterState,
    wire: TokenizeRequest,
) -> Result<TokenizeResponse, RouterError> {
    let parse_special = wire.parse_special.unwrap_or(true);
    let reading = Reading { parse_special, add_special: wire.add_special_tokens };
    let prompt = Prompt::Text(wire.text, reading);
    let request::Tokens { ids, language, context_max } =
        request::tokenize(shared, &wire.model, prompt).await?;
    let pieces = ids.iter().map(|&id| language.piece(id).into()).collect();
    let context_max = u32::try_from(context_max).unwrap_or(u32::MAX);
    Ok(TokenizeResponse { ids, pieces, context_max })
}

async fn detokenize(
    shared: &RouterState,
    wire: DetokenizeRequest,
) -> Result<DetokenizeResponse, RouterError> {
    let text = request::detokenize(shared, &wire.model, "ids", wire.ids).await?;
    Ok(DetokenizeResponse { text })
}
