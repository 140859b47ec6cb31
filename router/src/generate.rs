//! One request's choices side by side: the stream of chunks that both APIs put in words.
//!
//! A start may take long: no worker is ready but one loads, or all are full. A client of a stream
//! gets its response's head after a moment all the same, and waits on an open stream.

use crate::{
    RouterError, RouterState,
    choice::{Choice, Chunk, Echo},
    facts::Facts,
    metrics::Tokens,
    queue::Standing,
    raised,
    request::{self, Encoded, Input, Prepared},
    resume::{Cursor, Resume},
    sampling::{choice_seed, wire},
    time_limit::TimeLimit,
    upstream::UpstreamStream,
};
use engine::plan::SamplingParams;
use futures_util::{
    Stream, StreamExt,
    future::try_join_all,
    stream::{SelectAll, unfold},
};
use proto::v1::{RunRequest, Usage};
use std::{pin::Pin, sync::Arc, time::Duration};
use text::{Language, Reader};
use tokio::{
    sync::{OwnedSemaphorePermit, watch},
    time::{Instant, timeout},
};
use tracing::{Instrument, Span};

/// For a start that decides the response's status; a later one, good or bad, is told in the stream.
const HEAD_AFTER: Duration = Duration::from_secs(1);

type Starting = Pin<Box<dyn Future<Output = Result<Generation, RouterError>> + Send>>;
/// Comes when the request's time is over.
type Over = Pin<Box<dyn Future<Output = RouterError> + Send>>;
type Chunks = Pin<Box<dyn Stream<Item = Result<Chunk, RouterError>> + Send>>;

/// A request being answered. Dropping it cancels what still runs.
pub(crate) struct Generation {
    pub language: Arc<Language>,
    pub model: String,
    pub fingerprint: String,
    pub request_id: String,
    /// Where the client may want to go on on another router, or does.
    pub resume: Option<Resume>,
    pub choices: usize,
    /// Of one prompt.
    n: u32,
    chunks: SelectAll<Chunks>,
    usage: Usage,
    stop: watch::Receiver<bool>,
    open: usize,
    over: Over,
    record: Record,
}

/// A generation, or the wait for its start. Dropping it ends either.
pub(crate) enum Answering {
    Starting(Starting),
    Running(Box<Generation>),
}

impl Answering {
    /// Prepares and starts a request, and waits a moment for that. Errors within the moment.
    pub async fn begin(
        shared: Arc<RouterState>,
        input: Input,
        permit: OwnedSemaphorePermit,
        time: TimeLimit,
    ) -> Result<Self, RouterError> {
        let patience = HEAD_AFTER.min(time.total / 2);
        let mut starting: Starting = Box::pin(begin(shared, input, permit, time));
        match timeout(patience, &mut starting).await {
            Ok(started) => Ok(Self::Running(Box::new(started?))),
            Err(_) => Ok(Self::Starting(starting)),
        }
    }

    /// Waits for the start. Nothing follows an error.
    pub async fn started(&mut self) -> Result<&mut Generation, RouterError> {
        if let Self::Starting(starting) = self {
            *self = Self::Running(Box::new(starting.await?));
        }
        match self {
            Self::Running(generation) => Ok(generation),
            Self::Starting(_) => Err(RouterError::Internal("a start did not end".into())),
        }
    }
}

/// From what the client said to choices on workers, within its time limit and the router's life.
pub(crate) async fn begin(
    shared: Arc<RouterState>,
    input: Input,
    permit: OwnedSemaphorePermit,
    time: TimeLimit,
) -> Result<Generation, RouterError> {
    let mut stop = shared.stop.subscribe();
    let facts = input.trace.facts.clone();
    let start = async {
        let prepared = request::prepare(&shared, input).await?;
        start(&shared, prepared, permit, time).await
    };
    tokio::select! {
        started = start => started,
        error = time.over(facts) => Err(error),
        () = raised(&mut stop) => Err(stopping()),
    }
}

fn stopping() -> RouterError {
    RouterError::Unavailable("the router stops".to_owned())
}

/// Counts a request while it lives.
struct Record {
    shared: Arc<RouterState>,
    facts: Arc<Facts>,
    tokens: Tokens,
    choices: i64,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Record {
    fn drop(&mut self) {
        self.shared.metrics.in_flight.dec_by(self.choices);
    }
}

/// Starts every choice of a request, each on a worker that took it. `permit` stands for the
/// request's first choice; the others take theirs here.
async fn start(
    shared: &Arc<RouterState>,
    prepared: Prepared,
    mut permit: OwnedSemaphorePermit,
    time: TimeLimit,
) -> Result<Generation, RouterError> {
    let count = prepared.prompts.len().saturating_mul(prepared.sampling.n as usize);
    let max = shared.upstream.limits.in_flight_max;
    if count > max {
        let many = format!("{count} choices at once; this router holds at most {max}");
        return Err(RouterError::invalid("n", many));
    }
    permit.merge(shared.permit(count.saturating_sub(1))?);
    let span = tracing::info_span!(
        "generate",
        request_id = prepared.trace.request_id,
        model = prepared.model.name
    );
    let prompt_tokens = prepared.prompts.iter().map(|prompt| prompt.ids.len()).sum::<usize>();
    let prompt_tokens = u32::try_from(prompt_tokens).unwrap_or(u32::MAX);
    shared.metrics.in_flight.inc_by(count as i64);
    let facts = prepared.trace.facts.clone();
    facts.prompt_tokens(prompt_tokens);
    let tokens = shared.metrics.tokens(&prepared.model.name);
    tokens.prompt.inc_by(prompt_tokens.into());
    let record = Record {
        shared: shared.clone(),
        facts: facts.clone(),
        tokens,
        choices: count as i64,
        _permit: permit,
    };
    let standing = Standing { priority: prepared.priority, until: time.first_token_until() };
    let mut choices = choices(shared, &prepared, standing)?;
    let started = Instant::now();
    try_join_all(choices.iter_mut().map(Choice::open)).instrument(span.clone()).await?;
    facts.queued(started.elapsed());
    let chunks = choices.into_iter().map(|choice| chunks(choice, span.clone())).collect();
    Ok(Generation {
        language: prepared.language,
        model: prepared.name.clone(),
        fingerprint: prepared.model.fingerprint.clone(),
        resume: prepared.resume,
        request_id: prepared.trace.request_id,
        choices: count,
        n: prepared.sampling.n,
        chunks,
        usage: Usage { prompt_tokens, completion_tokens: 0, cached_tokens: 0 },
        stop: shared.stop.subscribe(),
        open: count,
        over: Box::pin(time.over(facts)),
        record,
    })
}

/// Choice `i` of prompt `p` has the index p · n + i, and draws of its own.
fn choices(
    shared: &Arc<RouterState>,
    prepared: &Prepared,
    standing: Standing,
) -> Result<Vec<Choice>, RouterError> {
    let (n, resume) = (prepared.sampling.n, prepared.resume.as_ref());
    let known = |index| {
        let last = resume.and_then(|resume| resume.last.as_ref());
        last.map_or(0, |last| last.place(index as usize).tokens)
    };
    let mut choices = Vec::new();
    for (at, prompt) in prepared.prompts.iter().enumerate() {
        for turn in 0..n {
            let index = at as u32 * n + turn;
            let seed = match prepared.sampling.seed.or(resume.map(|resume| resume.seed)) {
                Some(seed) => choice_seed(seed, index),
                None => crate::trace::random()?,
            };
            let echo = prepared.sampling.echo.then(|| echo(prepared, prompt));
            let stream = UpstreamStream::new(
                shared.upstream.clone(),
                prepared.model.clone(),
                prepared.trace.clone(),
                standing,
                run_request(prepared, prompt, seed),
            );
            choices.push(Choice::new(
                (index, known(index)),
                stream,
                Reader::new(prepared.language.decoder(), prepared.sampling.stops.clone()),
                echo,
                shared.metrics.waits(&prepared.model.name),
            ));
        }
    }
    Ok(choices)
}

fn echo(prepared: &Prepared, prompt: &Encoded) -> Echo {
    Echo {
        ids: prompt.ids.clone(),
        text: prompt.text.clone(),
        detokenizer: prepared.language.decoder(),
        scored: prepared.sampling.params.logprobs.is_some(),
        alone: prompt.max_tokens == 0,
    }
}

fn run_request(prepared: &Prepared, prompt: &Encoded, seed: u64) -> RunRequest {
    let sampling = &prepared.sampling;
    let params = SamplingParams { seed, ..sampling.params.clone() };
    let score_prompt = sampling.echo && params.logprobs.is_some();
    RunRequest {
        request_id: prepared.trace.request_id.clone(),
        prompt: prompt.ids.clone(),
        generated: Vec::new(),
        score_prompt,
        params: Some(wire(params, sampling.stops.min_tokens)),
        max_tokens: prompt.max_tokens.max(1),
        stop_ids: sampling.stop_ids.clone(),
    }
}

/// The choice's chunks up to its finish or its first error.
fn chunks(choice: Choice, span: Span) -> Chunks {
    Box::pin(unfold(Some(choice), move |choice| {
        let span = span.clone();
        async move {
            let mut choice = choice?;
            let next = choice.next().instrument(span).await;
            let more = matches!(&next, Ok(chunk) if chunk.finish.is_none());
            Some((next, more.then_some(choice)))
        }
    }))
}

impl Generation {
    /// What the client has of the answer already.
    pub fn last(&self) -> Option<&Cursor> {
        self.resume.as_ref()?.last.as_ref()
    }

    /// The next chunk of any choice; `None` after every choice's finish. Nothing follows an error.
    pub async fn next(&mut self) -> Option<Result<Chunk, RouterError>> {
        if self.open == 0 {
            return None;
        }
        let next = tokio::select! {
            next = self.chunks.next() => next?,
            error = &mut self.over => Err(error),
            () = raised(&mut self.stop) => Err(stopping()),
        };
        match &next {
            Ok(chunk) => self.count(chunk),
            Err(_) => self.open = 0,
        }
        Some(next)
    }

    fn count(&mut self, chunk: &Chunk) {
        self.usage.completion_tokens += chunk.sampled;
        let Record { facts, tokens, .. } = &self.record;
        if let Some(progress) = chunk.progress {
            facts.progress(progress);
        }
        tokens.completion.inc_by(chunk.sampled.into());
        tokens.cached.inc_by(chunk.cached_tokens.into());
        // The first choice speaks for its prompt.
        let mut cached = 0;
        if chunk.choice.is_multiple_of(self.n) {
            let before = self.usage.cached_tokens;
            let all = before.saturating_add(chunk.cached_tokens).min(self.usage.prompt_tokens);
            (self.usage.cached_tokens, cached) = (all, all - before);
        }
        facts.tokens(chunk.sampled, cached);
        if let Some(reason) = chunk.finish {
            facts.finish(reason.as_str());
            self.open -= 1;
        }
    }

    /// Tokens so far. Prompts count once, however many choices they have.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// Whether every choice has finished.
    pub fn ended(&self) -> bool {
        self.open == 0
    }
}
