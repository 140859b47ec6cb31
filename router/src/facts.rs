//! What is known of a request so far: for its log line, its counts, and what it waits for.

use proto::v1::Progress;
use std::{
    fmt::Display,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// Workers named in a line; a request of many choices may meet more.
const WORKERS_MAX: usize = 8;

/// What is known of a request so far; whoever learns something notes it.
#[derive(Debug, Default)]
pub(crate) struct Facts(Mutex<Known>);

/// Times count from the request's arrival.
#[derive(Clone, Debug, Default)]
pub(crate) struct Known {
    pub model: Option<String>,
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub completion_tokens: u64,
    /// Each choice's reason, in order of their ends.
    pub finishes: Vec<&'static str>,
    /// Between the choices' start and the moment when workers had taken all.
    pub queued: Option<Duration>,
    /// When workers had taken all choices.
    pub taken: Option<Instant>,
    pub first_token: Option<Instant>,
    /// As a worker last told it of a choice without tokens.
    progress: Option<Progress>,
    pub workers: Vec<String>,
    /// After the answer began.
    pub failure: Option<(&'static str, String)>,
}

impl Facts {
    pub fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The model exists: its name may be a label.
    pub fn model(&self, name: &str) {
        self.known().model = Some(name.to_owned());
    }

    pub fn prompt_tokens(&self, count: u32) {
        self.known().prompt_tokens = count.into();
    }

    /// Workers have taken every choice, after so long.
    pub fn queued(&self, after: Duration) {
        let mut known = self.known();
        known.queued = Some(after);
        known.taken = Some(Instant::now());
    }

    /// A worker took a choice, at first or after a break.
    pub fn worker(&self, address: &str) {
        let mut known = self.known();
        if known.workers.len() < WORKERS_MAX && !known.workers.iter().any(|one| one == address) {
            known.workers.push(address.to_owned());
        }
    }

    pub fn tokens(&self, sampled: u32, cached: u32) {
        let mut known = self.known();
        known.completion_tokens += u64::from(sampled);
        known.cached_tokens += u64::from(cached);
        if sampled > 0 {
            known.first_token.get_or_insert_with(Instant::now);
        }
    }

    /// How far a choice has come towards its next token.
    pub fn progress(&self, progress: Progress) {
        self.known().progress = Some(progress);
    }

    pub fn has_begun(&self) -> bool {
        self.known().first_token.is_some()
    }

    /// What the request waits for now, for people.
    pub fn waits_for(&self) -> String {
        let known = self.known();
        match (known.taken, known.first_token, &known.progress) {
            (None, ..) => "for a worker that takes it".to_owned(),
            (_, Some(_), _) => format!("for more after {} tokens", known.completion_tokens),
            (_, None, Some(Progress { running: false, waiting_ahead, .. })) => {
                format!("for a place in its worker's batch, {waiting_ahead} ahead of it")
            }
            (_, None, Some(Progress { prefilled, prompt, .. })) => {
                format!("for its first token, {prefilled} of {prompt} prompt tokens computed")
            }
            (_, None, None) => "for its first token".to_owned(),
        }
    }

    /// A choice ended.
    pub fn finish(&self, reason: &'static str) {
        self.known().finishes.push(reason);
    }

    /// The answer broke off after its beginning: `code` stands for the status that was sent.
    pub fn failed(&self, code: &'static str, error: &impl Display) {
        self.known().failure = Some((code, error.to_string()));
    }
}
