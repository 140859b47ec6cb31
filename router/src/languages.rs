//! How each model speaks: its tokenizer and template, fetched once from any of its workers.

use crate::{RouterError, config::Deadlines, link::Link, targets::Targets, version::Model};
use proto::v1::DescribeModelRequest;
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use text::{EncoderKind, Files, Language};
use tokio::time::timeout;
use tonic::Status;

/// Bytes of all files together that a model may need to be spoken.
const FILES_BYTES_MAX: usize = 256 << 20;

/// Room for one model's language: empty until first needed.
#[derive(Default)]
pub(crate) struct LanguageSlot {
    loaded: Mutex<Option<Arc<Language>>>,
    /// Held while somebody fetches, so that the others wait for that instead of fetching too.
    fetching: tokio::sync::Mutex<()>,
}

impl LanguageSlot {
    /// The model left: its tokenizer takes memory, and can be fetched again.
    pub fn forget(&self) {
        *self.loaded.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn get(&self) -> Option<Arc<Language>> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, language: &Arc<Language>) {
        *self.loaded.lock().unwrap_or_else(PoisonError::into_inner) = Some(language.clone());
    }
}

/// The model's language, fetched on first use. Errors: `Unavailable` when no ready worker hands
/// out its files in time, `Internal` when they are unusable.
pub(crate) async fn language(
    targets: &Targets,
    model: &Model,
    deadlines: &Deadlines,
) -> Result<Arc<Language>, RouterError> {
    if let Some(language) = model.language.get() {
        return Ok(language);
    }
    let limit = deadlines.describe;
    timeout(limit, first_language(targets, model, deadlines)).await.unwrap_or_else(|_| {
        let late = format!("the tokenizer of '{}' did not come within {limit:?}", model.name);
        Err(RouterError::Unavailable(late))
    })
}

async fn first_language(
    targets: &Targets,
    model: &Model,
    deadlines: &Deadlines,
) -> Result<Arc<Language>, RouterError> {
    let _fetching = model.language.fetching.lock().await;
    if let Some(language) = model.language.get() {
        return Ok(language);
    }
    let now = targets.now();
    let links: Vec<Arc<Link>> =
        now.version(model).into_iter().flat_map(|version| version.ready().cloned()).collect();
    let mut last = format!("no ready worker of '{}'", model.name);
    for link in links {
        let files = match fetch(&link, deadlines.silence).await {
            Ok(files) => files,
            Err(reason) => {
                last = format!("{}: {reason}", link.id());
                continue;
            }
        };
        let name = model.name.clone();
        let language = tokio::task::spawn_blocking(move || Language::load(&files))
            .await
            .map_err(|error| RouterError::Internal(format!("tokenizer of '{name}': {error}")))?
            .map_err(|error| RouterError::Internal(format!("files of '{name}': {error}")))?;
        for warning in language.warnings() {
            tracing::warn!(model = name, warning);
        }
        let language = Arc::new(language);
        model.language.set(&language);
        let vocabulary = language.vocab_size();
        let encoder = language.encoder().map_or("none", EncoderKind::as_str);
        tracing::info!(model = name, vocabulary, encoder, "language loaded");
        return Ok(language);
    }
    tracing::warn!(model = model.name, reason = last, "language not loaded");
    Err(RouterError::Unavailable(format!("the tokenizer of '{}': {last}", model.name)))
}

/// The files of a worker that is never silent for longer than `silence`.
async fn fetch(link: &Link, silence: Duration) -> Result<Files, String> {
    let mut client = link.client();
    let called = within(silence, client.describe_model(DescribeModelRequest {})).await?;
    let mut stream = called.into_inner();
    let mut files = Files::new();
    let mut total = 0usize;
    while let Some(part) = within(silence, stream.message()).await? {
        total = total.saturating_add(part.data.len());
        if total > FILES_BYTES_MAX {
            return Err(format!("files exceed {FILES_BYTES_MAX} bytes"));
        }
        files.entry(part.name).or_default().extend_from_slice(&part.data);
    }
    Ok(files)
}

async fn within<T>(
    silence: Duration,
    call: impl Future<Output = Result<T, Status>>,
) -> Result<T, String> {
    match timeout(silence, call).await {
        Ok(answer) => answer.map_err(|status| status.message().to_owned()),
        Err(_) => Err(format!("silent for {silence:?} while sending its tokenizer files")),
    }
}
