//! `lockstep.v1.Inference` over gRPC, with health and reflection beside it.

use crate::{
    RouterError, Shared,
    choice::{Chunk, FinishReason},
    generate::{self, Generation},
    languages,
    metrics::Outcome,
    request::{self, Input, Prompt},
    sampling::SamplingInput,
    trace::Trace,
};
use futures_util::{Stream, stream::unfold};
use proto::v1::{
    ChatRequest, GenerateRequest, GenerateResponse, ListModelsRequest, ListModelsResponse,
    Message as WireMessage, Sampling as WireSampling, TokenizeRequest, TokenizeResponse,
    generate_request, inference_server::Inference,
};
use serde_json::{Map, Value};
use std::{pin::Pin, sync::Arc};
use text::{Chat, Content, Message};
use tonic::{Code, Request, Response, Status};

type Answer = Pin<Box<dyn Stream<Item = Result<GenerateResponse, Status>> + Send>>;

/// The service's door.
pub(crate) struct Service {
    pub shared: Arc<Shared>,
}

/// What a client is told, with advice on when to try again.
fn status(error: &RouterError) -> Status {
    let code = match error {
        RouterError::Invalid { .. } | RouterError::ContextExceeded { .. } => Code::InvalidArgument,
        RouterError::ModelNotFound { .. } => Code::NotFound,
        RouterError::Overloaded { .. } => Code::ResourceExhausted,
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

/// A code as a metric's label.
fn label(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::NotFound => "NOT_FOUND",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::Unavailable => "UNAVAILABLE",
        _ => "INTERNAL",
    }
}

impl Service {
    fn outcome(&self, route: &'static str) -> Outcome {
        Outcome::new(&self.shared.metrics, route, "CANCELLED")
    }

    fn refuse(&self, outcome: &mut Outcome, error: &RouterError) -> Status {
        let status = status(error);
        outcome.set(label(status.code()));
        self.shared.count_refusal(error);
        status
    }

    async fn answer(
        &self,
        route: &'static str,
        trace: Result<Trace, RouterError>,
        input: impl FnOnce(Trace) -> Result<Input, RouterError>,
    ) -> Result<Response<Answer>, Status> {
        let mut outcome = self.outcome(route);
        let start = async {
            let permit = self.shared.permit(1)?;
            let prepared = request::prepare(&self.shared, input(trace?)?).await?;
            generate::start(&self.shared, prepared, permit).await
        };
        let generation = start.await.map_err(|error| self.refuse(&mut outcome, &error))?;
        let id = generation.request_id.parse();
        let stream: Answer = Box::pin(unfold((generation, outcome), answer_next));
        let mut response = Response::new(stream);
        if let Ok(id) = id {
            response.metadata_mut().insert("x-request-id", id);
        }
        Ok(response)
    }
}

type State = (Generation, Outcome);

async fn answer_next(
    (mut generation, mut outcome): State,
) -> Option<(Result<GenerateResponse, Status>, State)> {
    let next = match generation.next().await? {
        Ok(chunk) => {
            if generation.ended() {
                outcome.set(label(Code::Ok));
            }
            Ok(words(chunk, &generation))
        }
        Err(error) => {
            let status = status(&error);
            outcome.set(label(status.code()));
            Err(status)
        }
    };
    Some((next, (generation, outcome)))
}

fn words(chunk: Chunk, generation: &Generation) -> GenerateResponse {
    GenerateResponse {
        choice: chunk.choice,
        text: chunk.text,
        tokens: chunk.tokens.into_iter().map(|token| token.info).collect(),
        finish_reason: chunk.finish.map_or("", FinishReason::as_str).to_owned(),
        usage: generation.ended().then(|| generation.usage()),
        request_id: generation.request_id.clone(),
    }
}

fn sampling(wire: Option<WireSampling>) -> SamplingInput {
    let wire = wire.unwrap_or_default();
    SamplingInput {
        max_tokens: wire.max_tokens,
        temperature: wire.temperature,
        top_p: wire.top_p,
        top_k: wire.top_k,
        min_p: wire.min_p,
        repetition_penalty: wire.repetition_penalty,
        presence_penalty: wire.presence_penalty,
        frequency_penalty: wire.frequency_penalty,
        seed: wire.seed,
        stop: wire.stop,
        stop_token_ids: wire.stop_token_ids,
        n: wire.n,
        logprobs: wire.logprobs,
        echo: wire.echo,
        ignore_eos: wire.ignore_eos,
        logit_bias: wire.logit_bias.into_iter().collect(),
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
    let sampling = sampling(wire.sampling);
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
        add_generation_prompt: true,
    };
    let prompts = vec![Prompt::Chat(Box::new(chat))];
    Ok(Input { model: wire.model, prompts, sampling, trace })
}

#[tonic::async_trait]
impl Inference for Service {
    type GenerateStream = Answer;
    type ChatStream = Answer;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Answer>, Status> {
        let (metadata, _, wire) = request.into_parts();
        let trace = Trace::from_headers(&metadata.into_headers());
        self.answer("Generate", trace, |trace| {
            let prompt = match wire.prompt {
                Some(generate_request::Prompt::Text(text)) => Prompt::Text(text),
                Some(generate_request::Prompt::Ids(ids)) => Prompt::Ids(ids.ids),
                None => {
                    let message = "prompt is missing; give text or ids";
                    return Err(RouterError::invalid("prompt", message));
                }
            };
            let sampling = sampling(wire.sampling);
            Ok(Input { model: wire.model, prompts: vec![prompt], sampling, trace })
        })
        .await
    }

    async fn chat(&self, request: Request<ChatRequest>) -> Result<Response<Answer>, Status> {
        let (metadata, _, wire) = request.into_parts();
        let trace = Trace::from_headers(&metadata.into_headers());
        self.answer("Chat", trace, |trace| chat(wire, trace)).await
    }

    async fn tokenize(
        &self,
        request: Request<TokenizeRequest>,
    ) -> Result<Response<TokenizeResponse>, Status> {
        let wire = request.into_inner();
        let mut outcome = self.outcome("Tokenize");
        match tokenize(&self.shared, wire).await {
            Ok(response) => {
                outcome.set(label(Code::Ok));
                Ok(Response::new(response))
            }
            Err(error) => Err(self.refuse(&mut outcome, &error)),
        }
    }

    async fn list_models(
        &self,
        _: Request<ListModelsRequest>,
    ) -> Result<Response<ListModelsResponse>, Status> {
        self.outcome("ListModels").set(label(Code::Ok));
        Ok(Response::new(ListModelsResponse { models: self.shared.served() }))
    }
}

async fn tokenize(shared: &Shared, wire: TokenizeRequest) -> Result<TokenizeResponse, RouterError> {
    let _permit = shared.permit(1)?;
    let (model, capacity) = request::find_model(shared, &wire.model).await?;
    let upstream = &shared.upstream;
    let language = languages::language(&upstream.targets, &model, &upstream.deadlines).await?;
    let context_max = u32::try_from(capacity.context_max).unwrap_or(u32::MAX);
    request::on_tokenizer_thread(shared, wire.text.len(), move || {
        let ids = match wire.add_special_tokens {
            true => language.encode(&wire.text),
            false => language.encode_bare(&wire.text),
        };
        let ids = ids.map_err(|error| request::text_error("text", error))?;
        let pieces = ids.iter().map(|&id| language.piece(id).into()).collect();
        Ok(TokenizeResponse { ids, pieces, context_max })
    })
    .await
}
