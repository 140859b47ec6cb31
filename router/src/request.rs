//! From what a client said, by either API, to token ids and checked parameters.

use crate::{
    RouterError, Shared, languages,
    sampling::{self, Sampling, SamplingInput},
    targets::{Capacity, Model},
    trace::Trace,
};
use std::sync::Arc;
use text::{Chat, Language, TextError};
use tokio::time::{Instant, timeout_at};

/// Roles that a conversation may name.
const ROLES: [&str; 4] = ["system", "user", "assistant", "tool"];
/// Up to here text is tokenised where it stands; beyond on a thread of its own.
const INLINE_BYTES_MAX: usize = 4096;

/// What is to be continued.
#[derive(Debug)]
pub(crate) enum Prompt {
    Text(String),
    Ids(Vec<u32>),
    Chat(Box<Chat>),
}

impl Prompt {
    fn bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Ids(_) => 0,
            Self::Chat(chat) => {
                chat.messages.iter().map(|m| m.content.as_str().len()).sum::<usize>()
                    + chat.tools.as_ref().map_or(0, |tools| tools.to_string().len())
            }
        }
    }

    /// The parameter that a client gave it by.
    fn param(&self) -> &'static str {
        match self {
            Self::Text(_) | Self::Ids(_) => "prompt",
            Self::Chat(_) => "messages",
        }
    }
}

/// A request as either API understood it. At least one prompt.
#[derive(Debug)]
pub(crate) struct Input {
    pub model: String,
    pub prompts: Vec<Prompt>,
    pub sampling: SamplingInput,
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
    pub language: Arc<Language>,
    pub sampling: Sampling,
    pub prompts: Vec<Encoded>,
    pub trace: Trace,
}

/// Finds the model, encodes the prompts, checks every value.
pub(crate) async fn prepare(shared: &Shared, input: Input) -> Result<Prepared, RouterError> {
    let (model, capacity) = find_model(shared, &input.model).await?;
    let targets = &shared.upstream.targets;
    let language = languages::language(targets, &model, &shared.upstream.deadlines).await?;
    let mut sampling = sampling::resolve(input.sampling, language.defaults(), capacity.vocab_size)?;
    if !sampling.seed_given {
        sampling.params.seed = crate::trace::random()?;
    }
    let mut prompts = Vec::with_capacity(input.prompts.len());
    for prompt in input.prompts {
        let param = prompt.param();
        let (ids, text) = encode(shared, &language, prompt, sampling.echo).await?;
        if ids.is_empty() {
            let empty = format!("{param}: the prompt has no tokens; give at least one");
            return Err(RouterError::invalid(param, empty));
        }
        sampling::in_vocabulary(param, &ids, capacity.vocab_size)?;
        let max_tokens = room(ids.len(), sampling.max_tokens, capacity.context_max)?;
        prompts.push(Encoded { ids, text, max_tokens });
    }
    Ok(Prepared { model, language, sampling, prompts, trace: input.trace })
}

/// The model and what its ready workers can do; waits a little where there are none.
pub(crate) async fn find_model(
    shared: &Shared,
    name: &str,
) -> Result<(Arc<Model>, Capacity), RouterError> {
    if name.is_empty() {
        return Err(RouterError::invalid("model", "model is missing; name one of /v1/models"));
    }
    let mut targets = shared.upstream.targets.clone();
    let deadline = Instant::now() + shared.upstream.deadlines.ready;
    loop {
        let now = targets.now();
        if let Some(model) = now.models.get(name) {
            if let Some(capacity) = now.capacity(name) {
                return Ok((model.clone(), capacity));
            }
        } else if !now.models.is_empty() {
            let served = now.models.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            return Err(RouterError::ModelNotFound { model: name.to_owned(), served });
        }
        if timeout_at(deadline, targets.changed()).await.is_err() {
            return Err(RouterError::Unavailable(match now.models.is_empty() {
                true => "no worker has joined yet".to_owned(),
                false => now.shortage(name),
            }));
        }
    }
}

/// New tokens that a prompt leaves room for.
fn room(prompt: usize, asked: Option<u32>, context: usize) -> Result<u32, RouterError> {
    let free = context.saturating_sub(prompt);
    match asked {
        // Even where no token is wanted a worker samples one.
        Some(asked) if (asked.max(1) as usize) <= free => Ok(asked),
        None if free > 0 => Ok(u32::try_from(free).unwrap_or(u32::MAX)),
        asked => {
            let new = asked.unwrap_or(1).max(1) as usize;
            Err(RouterError::ContextExceeded { prompt, new, context })
        }
    }
}

/// The prompt's ids, and its text where it will be echoed.
async fn encode(
    shared: &Shared,
    language: &Arc<Language>,
    prompt: Prompt,
    echo: bool,
) -> Result<(Vec<u32>, String), RouterError> {
    let bytes = prompt.bytes();
    let language = language.clone();
    on_tokenizer_thread(shared, bytes, move || encode_now(&language, prompt, echo)).await
}

/// Runs work on `bytes` of text: here where they are few, else on one of a few threads.
pub(crate) async fn on_tokenizer_thread<T: Send + 'static>(
    shared: &Shared,
    bytes: usize,
    work: impl FnOnce() -> Result<T, RouterError> + Send + 'static,
) -> Result<T, RouterError> {
    if bytes <= INLINE_BYTES_MAX {
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

fn encode_now(
    language: &Language,
    prompt: Prompt,
    echo: bool,
) -> Result<(Vec<u32>, String), RouterError> {
    let param = prompt.param();
    let refuse = |error| text_error(param, error);
    match prompt {
        Prompt::Text(text) => {
            let ids = language.encode(&text).map_err(refuse)?;
            Ok((ids, if echo { text } else { String::new() }))
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
pub(crate) fn text_error(param: &str, error: TextError) -> RouterError {
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

    #[test]
    fn room_is_what_was_asked_for_or_what_the_context_leaves() {
        assert_eq!(room(10, None, 16).unwrap(), 6);
        assert_eq!(room(10, Some(6), 16).unwrap(), 6);
        assert_eq!(room(10, Some(0), 16).unwrap(), 0);
        for (prompt, asked) in [(10, Some(7)), (16, None), (17, None), (16, Some(0))] {
            let error = room(prompt, asked, 16).unwrap_err();
            assert!(matches!(error, RouterError::ContextExceeded { context: 16, .. }));
        }
    }
}
