//! An answer as a stream of server-sent events, `[DONE]` last. An error after the stream began is
//! an event in OpenAI's error shape, with nothing behind it. While there is nothing to say,
//! comments keep the connection open, also before any worker has taken the request.

use super::{
    answer::{self, AnswerHead, Route},
    error,
    params::{Delivery, UsageChunks},
};
use crate::{
    RouterError, RouterState,
    choice::Chunk,
    facts::Facts,
    generate::{Answering, Generation},
    resume::Cursor,
};
use axum::response::{
    IntoResponse, Response, Sse,
    sse::{Event, KeepAlive},
};
use futures_util::stream::unfold;
use serde_json::Value;
use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

/// Between two comments of a silent stream. Proxies and clients cut silent connections after as
/// little as ten seconds.
const KEEP_ALIVE: Duration = Duration::from_secs(3);
/// The comment's text.
const WAITING: &str = "waiting";

/// A stream of events being made.
pub(crate) struct Events {
    shared: Arc<RouterState>,
    facts: Arc<Facts>,
    route: Route,
    logprobs: bool,
    delivery: Delivery,
    answering: Answering,
    /// Once the generation has started.
    answer: Option<AnswerHead>,
    /// How far the client is once it has the next event, where it may want to go on with it.
    cursor: Option<Cursor>,
    ready: VecDeque<Event>,
    ended: bool,
}

impl UsageChunks {
    /// What a chunk with choices says under `usage`; `None` where it has no such field.
    fn now(self, generation: &Generation) -> Option<Value> {
        match self {
            Self::None => None,
            Self::Last => Some(Value::Null),
            Self::Every => Some(answer::usage(generation.usage())),
        }
    }
}

impl Events {
    pub fn new(
        shared: Arc<RouterState>,
        facts: Arc<Facts>,
        route: Route,
        answering: Answering,
        (logprobs, delivery): (bool, Delivery),
    ) -> Self {
        let mut ready = VecDeque::new();
        if let Answering::Starting(_) = answering {
            ready.push_back(Event::default().comment(WAITING));
        }
        let (answer, cursor, ended) = (None, None, false);
        Self { shared, facts, route, logprobs, delivery, answering, answer, cursor, ready, ended }
    }

    /// Streams the answer. Dropping the response cancels the generation.
    pub fn respond(self) -> Response {
        let stream = unfold(self, |mut events| async {
            let event = events.next().await?;
            Some((Ok::<_, Infallible>(event), events))
        });
        let comments = KeepAlive::new().interval(KEEP_ALIVE).text(WAITING);
        Sse::new(stream).keep_alive(comments).into_response()
    }

    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.ended {
                return None;
            }
            if let Err(failure) = self.advance().await {
                self.facts.failed(error::label(&failure), &failure);
                self.ended = true;
                self.ready.push_back(event(error::body(&failure).to_string()));
            }
        }
    }

    /// Makes the next events.
    async fn advance(&mut self) -> Result<(), RouterError> {
        let shared = &self.shared;
        let started = self.answering.started().await;
        let generation = started.inspect_err(|failure| shared.count_refusal(failure))?;
        let usage = self.delivery.usage;
        let answer = match &self.answer {
            Some(answer) => answer,
            None => {
                let answer = AnswerHead::new(self.route, generation, self.logprobs);
                let fresh = || Cursor::new(&generation.fingerprint, generation.choices);
                self.cursor = generation.resume.as_ref().map(|_| fresh());
                if self.route == Route::Chat && generation.last().is_none() {
                    let choices = 0..generation.choices;
                    let openings =
                        choices.map(|choice| answer.opening(choice, usage.now(generation)));
                    self.ready.extend(openings.map(event));
                }
                self.answer.insert(answer)
            }
        };
        if !self.ready.is_empty() {
            return Ok(());
        }
        match generation.next().await.transpose()? {
            Some(Chunk { choice, progress: Some(progress), .. }) => {
                if self.delivery.include_progress {
                    let chunk = answer.progress(choice, progress, usage.now(generation));
                    self.ready.push_back(event(chunk));
                }
            }
            Some(chunk) => {
                let (choice, ended) = (chunk.choice as usize, chunk.finish.is_some());
                if let Some(cursor) = &mut self.cursor {
                    cursor.advance(choice, chunk.sampled, ended);
                }
                if generation.last().is_some_and(|last| last.place(choice).ended) {
                    return Ok(()); // The client has all of it.
                }
                let chunk = answer.chunk(chunk, usage.now(generation), &generation.language);
                let named = |chunk: String| match &self.cursor {
                    Some(cursor) => Event::default().id(cursor.to_string()).data(chunk),
                    None => event(chunk),
                };
                self.ready.extend(chunk.map(named));
            }
            None => {
                self.ended = true;
                if usage != UsageChunks::None {
                    self.ready.push_back(event(answer.closing(generation.usage())));
                }
                self.ready.push_back(Event::default().data("[DONE]"));
            }
        }
        Ok(())
    }
}

fn event(json: String) -> Event {
    Event::default().data(json)
}
