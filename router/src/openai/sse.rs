//! An answer as a stream of server-sent events, `[DONE]` last. An error after the stream began is
//! an event in OpenAI's error shape, with nothing behind it.

use super::{
    answer::{self, Answer, Route},
    error,
    params::UsageChunks,
};
use crate::generate::Generation;
use axum::response::{
    IntoResponse, Response, Sse,
    sse::{Event, KeepAlive},
};
use futures_util::stream::unfold;
use serde_json::Value;
use std::{collections::VecDeque, convert::Infallible, time::Duration};

/// Proxies cut connections that are silent for about a minute; a prefill may take longer.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

struct Events {
    generation: Generation,
    answer: Answer,
    usage: UsageChunks,
    ready: VecDeque<Event>,
    ended: bool,
}

/// Streams the answer. Dropping the response cancels the generation.
pub(crate) fn respond(
    route: Route,
    generation: Generation,
    answer: Answer,
    usage: UsageChunks,
) -> Response {
    let mut events = Events { generation, answer, usage, ready: VecDeque::new(), ended: false };
    if route == Route::Chat {
        let openings = 0..events.generation.choices;
        let openings = openings.map(|choice| events.answer.opening(choice, events.usage()));
        events.ready = openings.map(event).collect();
    }
    let stream = unfold(events, |mut events| async {
        let event = events.next().await?;
        Some((Ok::<_, Infallible>(event), events))
    });
    Sse::new(stream).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
}

impl Events {
    /// What a chunk with choices says under `usage`; `None` where it has no such field.
    fn usage(&self) -> Option<Value> {
        match self.usage {
            UsageChunks::None => None,
            UsageChunks::Last => Some(Value::Null),
            UsageChunks::Every => Some(answer::usage(self.generation.usage())),
        }
    }

    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.ended {
                return None;
            }
            match self.generation.next().await {
                Some(Ok(chunk)) => {
                    let language = &self.generation.language;
                    let chunk = self.answer.chunk(chunk, self.usage(), language);
                    self.ready.extend(chunk.map(event));
                }
                Some(Err(failure)) => {
                    self.generation.facts().failed(error::label(&failure), &failure);
                    self.ended = true;
                    self.ready.push_back(event(error::body(&failure)));
                }
                None => {
                    self.ended = true;
                    if self.usage != UsageChunks::None {
                        let closing = self.answer.closing(self.generation.usage());
                        self.ready.push_back(event(closing));
                    }
                    self.ready.push_back(Event::default().data("[DONE]"));
                }
            }
        }
    }
}

fn event(value: Value) -> Event {
    Event::default().data(value.to_string())
}
