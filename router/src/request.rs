//! From what a client said, by either API, to token ids and checked parameters.

use crate::{
    RouterError, RouterState, languages,
    opening::Patience,
    resume::Resume,
    sampling::{self, Sampling},
    trace::Trace,
    version::{Capacity, Model},
};
use engine::check_ids;
use proto::v1;
use serde_json::{Map, Value};
use std::sync::Arc;
use text::{Chat, EncoderKind, Language, Message, TextError};
use tokio::time::timeout_at;

/// Roles that a conversation may name.
const ROLES: [&str; 4] = ["system", "user", "assistant", "tool"];
/// Up to here text is tokenised inline, which keeps streams waiting for less than 0.1 ms; longer
/// text on a blocking thread.
const INLINE_BYTES_MAX: usize = 4096;
/// The same where the reference encodes.
const SLOW_INLINE_BYTES_MAX: usize = 256;
/// What a template writes for each message, and JSON for each value, beside the text itself.
const MESSAGE_BYTES: usize = 64;
const VALUE_BYTES: usize = 8;

/// How a text becomes ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reading {
    /// Names of special tokens are those tokens; else they are only text.
    pub parse_special: bool,
    /// With what the model wants around a text, e.g. BOS.
    pub add_special: bool,
}

impl Default for Reading {
    fn default() -> Self {
        Self { parse_special: true, add_special: true }
    }
}

/// What is to be continued.
#[derive(Debug)]
pub(crate) enum Prompt {
    Text(String, Reading),
    Ids(Vec<u32>),
    Chat(Box<Chat>),
}

impl Prompt {
    /// About how much there is to render and to encode.
    fn bytes(&self) -> usize {
        match self {
            Self::Text(text, _) => text.len(),
            Self::Ids(ids) => ids.len(),
            Self::Chat(chat) => {
                let message = |message: &Message| {
                    let calls = message.tool_calls.as_ref().map_or(0, value_bytes);
                    let text = message.role.len() + message.content.as_str().len();
                    MESSAGE_BYTES + text + calls + map_bytes(&message.extra)
                };
                chat.messages.iter().map(message).sum::<usize>()
                    + chat.tools.as_ref().map_or(0, value_bytes)
                    + map_bytes(&chat.args)
            }
        }
    }

    /// The parameter that a client gave it by.
    fn param(&self) -> &'static str {
        match self {
            Self::Text(..) | Self::Ids(_) => "prompt",
            Self::Chat(_) => "messages",
        }
    }
}

/// A request as either API understood it. At least one prompt.
#[derive(Debug)]
pub(crate) struct Input {
    pub model: String,
    pub prompts: Vec<Prompt>,
    pub sampling: v1::Sampling,
    /// While every worker is full, the lowest goes first.
    pub priority: i32,
    pub resume: Option<Resume>,
    pub trace: Trace,
}

/// One prompt in the model's language.
#[derive(Debug)]
pub(crate) struct Encoded {
    pub ids: Vec<u32>,
    /// What `echo` gives back.
    pub text: String,
    /// Room for new tokens, as asked for or up to the context. 0 only where that was asked for.
    pub max_tokens: u32,
}

/// A request that can run.
pub(crate) struct Prepared {
    pub model: Arc<Model>,
    /// The name that the answer carries: as asked for, else the model's own.
    pub name: String,
    pub language: Arc<Language>,
    pub sampling: Sampling,
    pub prompts: Vec<Encoded>,
    pub priority: i32,
    pub resume: Option<Resume>,
    pub trace: Trace,
}

/// Finds the model, encodes the prompts, checks every value.
pub(crate) async fn prepare(shared: &RouterState, input: Input) -> Result<Prepared, RouterError> {
    let (model, language, capacity) = spoken(shared, &input.model).await?;
    input.trace.facts.model(&model.name);
    let special = |text: &str| language.special_token(text);
    let sampling =
        sampling::resolve(input.sampling, language.defaults(), capacity.vocab_size, special)?;
    let mut prompts = Vec::with_capacity(input.prompts.len());
    for prompt in input.prompts {
        let param = prompt.param();
        let (ids, text) = encode(shared, &language, prompt, sampling.echo).await?;
        if ids.is_empty() {
            let empty = format!("{param}: the prompt has no tokens; give at least one");
            return Err(RouterError::invalid(param, empty));
        }
        check_ids(param, &ids, capacity.vocab_size)?;
        let max_tokens = room(param, ids.len(), sampling.max_tokens, capacity.context_max)?;
        prompts.push(Encoded { ids, text, max_tokens });
    }
    let name = if input.model.is_empty() { model.name.clone() } else { input.model };
    let Input { priority, resume, trace, .. } = input;
    if let Some(resume) = &resume {
        let choices = prompts.len().saturating_mul(sampling.n as usize);
        resume.check(&model.fingerprint, choices, sampling.echo)?;
    }
    Ok(Prepared { model, name, language, sampling, prompts, priority, resume, trace })
}

/// The model of a name, or the only one for an empty name, and what its ready workers can do; waits
/// where there are none, longer while one loads.
async fn find_model(
    shared: &RouterState,
    asked: &str,
) -> Result<(Arc<Model>, Capacity), RouterError> {
    let targets = &shared.upstream.targets;
    let mut changes = targets.changes();
    let mut patience = Patience::new(false);
    loop {
        let now = targets.now();
        let name = shared.aliases.model(&now, asked)?;
        let serving = now.serving(name);
        if let Some(version) = serving {
            if let Some(capacity) = version.capacity() {
                return Ok((version.model.clone(), capacity));
            }
        } else if now.names().next().is_some() {
            let served = shared.aliases.names(&now);
            return Err(RouterError::ModelNotFound { model: name.to_owned(), served });
        }
        let until = patience.until(serving, &shared.upstream.deadlines);
        if timeout_at(until, changes.next()).await.is_err() {
            return Err(RouterError::Unavailable(match serving {
                None => "no worker has joined yet".to_owned(),
                Some(version) => version.shortage(),
            }));
        }
    }
}

/// New tokens that a prompt leaves room for.
fn room(
    from: &'static str,
    prompt: usize,
    asked: Option<u32>,
    context: usize,
) -> Result<u32, RouterError> {
    let free = context.saturating_sub(prompt);
    match asked {
        // Even where no token is wanted a worker samples one.
        Some(asked) if (asked.max(1) as usize) <= free => Ok(asked),
        None if free > 0 => Ok(u32::try_from(free).unwrap_or(u32::MAX)),
        asked => {
            let new = asked.unwrap_or(1).max(1) as usize;
            Err(RouterError::ContextExceeded { from, prompt, new, context })
        }
    }
}

/// The prompt's ids, and its text where it will be echoed.
async fn encode(
    shared: &RouterState,
    language: &Arc<Language>,
    prompt: Prompt,
    echo: bool,
) -> Result<(Vec<u32>, String), RouterError> {
    let inline_max = match language.encoder() {
        Some(EncoderKind::Reference) => SLOW_INLINE_BYTES_MAX,
        Some(EncoderKind::Own) | None => INLINE_BYTES_MAX,
    };
    let is_small = prompt.bytes() <= inline_max;
    let language = language.clone();
    on_tokenizer_thread(shared, is_small, move || encode_now(&language, prompt, echo)).await
}

/// A text's ids, and who gave them.
pub(crate) struct Tokens {
    pub ids: Vec<u32>,
    pub language: Arc<Language>,
    pub context_max: usize,
}

/// Encodes one prompt for whoever wants its ids.
pub(crate) async fn tokenize(
    shared: &RouterState,
    model: &str,
    prompt: Prompt,
) -> Result<Tokens, RouterError> {
    let _permit = shared.permit(1)?;
    let (_, language, capacity) = spoken(shared, model).await?;
    let (ids, _) = encode(shared, &language, prompt, false).await?;
    Ok(Tokens { ids, language, context_max: capacity.context_max })
}

/// The text that ids stand for, special tokens included; `param` brought them.
pub(crate) async fn detokenize(
    shared: &RouterState,
    model: &str,
    param: &'static str,
    ids: Vec<u32>,
) -> Result<String, RouterError> {
    let _permit = shared.permit(1)?;
    let (_, language, capacity) = spoken(shared, model).await?;
    check_ids(param, &ids, capacity.vocab_size)?;
    let is_small = ids.len() <= INLINE_BYTES_MAX;
    on_tokenizer_thread(shared, is_small, move || {
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| language.piece(id)).collect();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    })
    .await
}

/// The model, how it speaks, and what its ready workers can do.
async fn spoken(
    shared: &RouterState,
    name: &str,
) -> Result<(Arc<Model>, Arc<Language>, Capacity), RouterError> {
    let (model, capacity) = find_model(shared, name).await?;
    let upstream = &shared.upstream;
    let language = languages::language(&upstream.targets, &model, &upstream.deadlines).await?;
    Ok((model, language, capacity))
}

/// Runs work on text: here where there is little, else on one of a few threads.
async fn on_tokenizer_thread<T: Send + 'static>(
    shared: &RouterState,
    is_small: bool,
    work: impl FnOnce() -> Result<T, RouterError> + Send + 'static,
) -> Result<T, RouterError> {
    if is_small {
        return work();
    }
    let internal =
        |error: &dyn std::fmt::Display| RouterError::Internal(format!("tokenizer: {error}"));
    let permit = shared.tokenizers.clone().acquire_owned().await.map_err(|e| internal(&e))?;
    let running = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        work()
    });
    running.await.map_err(|error| internal(&error))?
}

fn value_bytes(value: &Value) -> usize {
    VALUE_BYTES
        + match value {
            Value::String(text) => text.len(),
            Value::Array(items) => items.iter().map(value_bytes).sum(),
            Value::Object(map) => map_bytes(map),
            Value::Null | Value::Bool(_) | Value::Number(_) => 0,
        }
}

fn map_bytes(map: &Map<String, Value>) -> usize {
    map.iter().map(|(key, value)| key.len() + value_bytes(value)).sum()
}

fn encode_now(
    language: &Language,
    prompt: Prompt,
    echo: bool,
) -> Result<(Vec<u32>, String), RouterError> {
    let param = prompt.param();
    let refuse = |error| text_error(param, error);
    match prompt {
        Prompt::Text(text, reading) => {
            let ids = match (reading.parse_special, reading.add_special) {
                (true, true) => language.encode(&text),
                (true, false) => language.encode_bare(&text),
                (false, true) => language.encode_literal(&text),
                (false, false) => language.encode_ordinary(&text),
            };
            Ok((ids.map_err(refuse)?, if echo { text } else { String::new() }))
        }
        Prompt::Ids(ids) => {
            let mut text = String::new();
            if echo {
                let mut decoder = language.decoder();
                ids.iter().for_each(|&id| text += &decoder.push(id));
                text += &decoder.finish();
            }
            Ok((ids, text))
        }
        Prompt::Chat(chat) => {
            check_roles(&chat)?;
            Ok((language.encode_chat(&chat).map_err(refuse)?, String::new()))
        }
    }
}

fn check_roles(chat: &Chat) -> Result<(), RouterError> {
    if chat.messages.is_empty() {
        return Err(RouterError::invalid("messages", "messages is empty; give at least one"));
    }
    for (at, message) in chat.messages.iter().enumerate() {
        if !ROLES.contains(&message.role.as_str()) {
            let (role, known) = (&message.role, ROLES.join(", "));
            let unknown = format!("messages[{at}].role: unknown role '{role}'; known: {known}");
            return Err(RouterError::invalid(format!("messages[{at}].role"), unknown));
        }
    }
    Ok(())
}

/// The client's fault, unless the model's own files are.
fn text_error(param: &str, error: TextError) -> RouterError {
    match error {
        TextError::Tokenizer(_) | TextError::File { .. } => {
            RouterError::Internal(error.to_string())
        }
        _ => RouterError::invalid(param, error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn room_is_what_was_asked_for_or_what_the_context_leaves() {
        assert_eq!(room("prompt", 10, None, 16).unwrap(), 6);
        assert_eq!(room("prompt", 10, Some(6), 16).unwrap(), 6);
        assert_eq!(room("prompt", 10, Some(0), 16).unwrap(), 0);
        for (prompt, asked) in [(10, Some(7)), (16, None), (17, None), (16, Some(0))] {
            let error = room("messages", prompt, asked, 16).unwrap_err();
            assert!(matches!(error, RouterError::ContextExceeded { context: 16, .. }));
            let said = error.to_string();
            assert!(
                said.starts_with("This model's maximum context length is 16 tokens. "),
                "{said}"
            );
            assert_eq!(said.contains("max_tokens"), prompt < 16, "{said}");
        }
    }

    /// What is rendered and encoded beside the messages' text is not small either.
    #[test]
    fn nothing_large_counts_as_small() {
        let large = "x".repeat(INLINE_BYTES_MAX);
        let call = json!([{"function": {"name": "f", "arguments": {"a": [large]}}}]);
        type Change<'a> = &'a dyn Fn(&mut Chat, &mut Message);
        let with = |change: Change<'_>| {
            let (mut chat, mut message) = (Chat::default(), Message::new("assistant", "x"));
            change(&mut chat, &mut message);
            chat.messages.push(message);
            Prompt::Chat(Box::new(chat)).bytes()
        };
        assert!(with(&|_, _| {}) < 100);
        let cases: [Change<'_>; 6] = [
            &|_, message| message.content = large.clone().into(),
            &|_, message| message.tool_calls = Some(call.clone()),
            &|_, message| drop(message.extra.insert("thinking".into(), json!(large))),
            &|chat, _| chat.tools = Some(call.clone()),
            &|chat, _| drop(chat.args.insert("a".into(), json!({large.clone(): 1}))),
            &|chat, _| chat.messages = vec![Message::new("user", ""); 64],
        ];
        for (at, case) in cases.iter().enumerate() {
            assert!(with(case) > INLINE_BYTES_MAX, "case {at}");
        }
    }
}
