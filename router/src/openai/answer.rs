//! Answers in OpenAI's words: whole ones, chunks of streams, logprobs.

use crate::{
    choice::{Chunk, Token},
    generate::Generation,
};
use proto::v1::{Progress, TokenInfo, Usage};
use serde_json::{Map, Value, json};
use std::time::{SystemTime, UNIX_EPOCH};
use text::{FinishReason, Language};

/// Which of the two routes an answer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    Chat,
    Completions,
}

/// What all parts of one answer share.
pub(crate) struct AnswerHead {
    route: Route,
    id: String,
    created: u64,
    model: String,
    logprobs: bool,
    /// What every chunk of a stream begins with, as JSON, up to its choices.
    beginning: String,
}

/// One choice, complete or in part.
#[derive(Default)]
pub(crate) struct Part {
    pub text: String,
    pub tokens: Vec<Token>,
    pub finish: Option<FinishReason>,
}

impl Part {
    pub fn add(&mut self, chunk: Chunk) {
        self.text += &chunk.text;
        self.tokens.extend(chunk.tokens);
        self.finish = chunk.finish;
    }
}

impl AnswerHead {
    pub fn new(route: Route, generation: &Generation, logprobs: bool) -> Self {
        let (prefix, object) = match route {
            Route::Chat => ("chatcmpl", "chat.completion.chunk"),
            Route::Completions => ("cmpl", "text_completion"),
        };
        let id = format!("{prefix}-{}", generation.request_id);
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let model = generation.model.clone();
        let beginning = format!(
            r#"{{"id":{},"object":"{object}","created":{created},"model":{},"choices":["#,
            text(&id),
            text(&model)
        );
        Self { route, id, created, model, logprobs, beginning }
    }

    /// The answer as one object, choices in order.
    pub fn whole(&self, parts: Vec<Part>, usage: Usage, language: &Language) -> Value {
        let choices: Vec<Value> = parts
            .into_iter()
            .enumerate()
            .map(|(index, part)| {
                let logprobs = self.logprobs(&part, language);
                let finish = part.finish.map(FinishReason::as_str);
                match self.route {
                    Route::Chat => json!({
                        "index": index,
                        "message": {"role": "assistant", "content": part.text, "refusal": null},
                        "logprobs": logprobs,
                        "finish_reason": finish,
                    }),
                    Route::Completions => json!({
                        "index": index,
                        "text": part.text,
                        "logprobs": logprobs,
                        "finish_reason": finish,
                    }),
                }
            })
            .collect();
        let object = if self.route == Route::Chat { "chat.completion" } else { "text_completion" };
        json!({"id": self.id, "object": object, "created": self.created, "model": self.model,
            "choices": choices, "usage": self::usage(usage)})
    }

    /// The chunk that opens a choice of a chat: who speaks.
    pub fn opening(&self, choice: usize, usage: Option<Value>) -> String {
        let delta = r#"{"role":"assistant","content":"","refusal":null}"#;
        let choice =
            format!(r#"{{"index":{choice},"delta":{delta},"logprobs":null,"finish_reason":null}}"#);
        self.piece(&choice, None, usage)
    }

    /// One chunk of a stream, as JSON; `None` where it would say nothing.
    pub fn chunk(&self, chunk: Chunk, usage: Option<Value>, language: &Language) -> Option<String> {
        let index = chunk.choice;
        let mut part = Part::default();
        part.add(chunk);
        let says_tokens = self.logprobs && part.tokens.iter().any(|token| !token.end);
        if part.text.is_empty() && part.finish.is_none() && !says_tokens {
            return None;
        }
        let logprobs = if says_tokens { self.logprobs(&part, language) } else { Value::Null };
        let finish = part.finish.map_or_else(|| "null".to_owned(), |finish| text(finish.as_str()));
        let said = match self.route {
            Route::Chat if part.text.is_empty() && part.finish.is_some() => {
                r#""delta":{}"#.to_owned()
            }
            Route::Chat => format!(r#""delta":{{"content":{}}}"#, text(&part.text)),
            Route::Completions => format!(r#""text":{}"#, text(&part.text)),
        };
        let choice =
            format!(r#"{{"index":{index},{said},"logprobs":{logprobs},"finish_reason":{finish}}}"#);
        Some(self.piece(&choice, None, usage))
    }

    /// The chunk after the last: no choice, only the usage.
    pub fn closing(&self, usage: Usage) -> String {
        self.piece("", None, Some(self::usage(usage)))
    }

    /// A chunk without choices: how far one has come towards its next token.
    pub fn progress(&self, choice: u32, progress: Progress, usage: Option<Value>) -> String {
        let Progress { waiting_ahead, prefilled, prompt, running } = progress;
        let progress = json!({"index": choice, "running": running,
            "waiting_ahead": waiting_ahead, "prefilled_tokens": prefilled,
            "prompt_tokens": prompt});
        self.piece("", Some(&progress), usage)
    }

    /// A chunk around its choices. Only these are written anew for each token: as trees of values
    /// chunks took a third of the time that a stream takes.
    fn piece(&self, choices: &str, progress: Option<&Value>, usage: Option<Value>) -> String {
        let mut piece = String::with_capacity(self.beginning.len() + choices.len() + 2);
        piece.push_str(&self.beginning);
        piece.push_str(choices);
        piece.push(']');
        for (name, value) in [("usage", usage.as_ref()), ("progress", progress)] {
            if let Some(value) = value {
                piece += &format!(r#","{name}":{value}"#);
            }
        }
        piece.push('}');
        piece
    }

    fn logprobs(&self, part: &Part, language: &Language) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        let tokens = part.tokens.iter().filter(|token| !token.end);
        match self.route {
            Route::Chat => chat_logprobs(tokens, language),
            Route::Completions => text_logprobs(tokens, language),
        }
    }
}

/// As JSON.
fn text(text: &str) -> String {
    Value::from(text).to_string()
}

pub(super) fn usage(usage: Usage) -> Value {
    let total = u64::from(usage.prompt_tokens) + u64::from(usage.completion_tokens);
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": total,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    })
}

fn chat_logprobs<'a>(tokens: impl Iterator<Item = &'a Token>, language: &Language) -> Value {
    let named = |id, logprob: Option<f32>| {
        let piece = language.piece(id);
        json!({"token": String::from_utf8_lossy(&piece), "logprob": logprob, "bytes": piece})
    };
    let content: Vec<Value> = tokens
        .map(|token| {
            let top = token.info.top.iter().map(|top| named(top.id, Some(top.logprob)));
            let top: Vec<Value> = top.collect();
            let mut entry = named(token.info.id, token.info.logprob);
            entry["top_logprobs"] = Value::Array(top);
            entry
        })
        .collect();
    json!({"content": content, "refusal": null})
}

fn text_logprobs<'a>(tokens: impl Iterator<Item = &'a Token>, language: &Language) -> Value {
    let (mut names, mut logprobs) = (Vec::new(), Vec::new());
    let (mut tops, mut offsets) = (Vec::new(), Vec::new());
    for token in tokens {
        names.push(name(language, token.info.id));
        logprobs.push(token.info.logprob);
        tops.push(token.info.logprob.map(|logprob| top_map(&token.info, logprob, language)));
        offsets.push(token.offset);
    }
    json!({"tokens": names, "token_logprobs": logprobs, "top_logprobs": tops,
        "text_offset": offsets})
}

/// The likeliest, and the token itself where it is none of them: one more than asked for, as
/// OpenAI documents it. Of two ids with the same name the likelier one stays.
fn top_map(token: &TokenInfo, logprob: f32, language: &Language) -> Value {
    let mut map = Map::new();
    for entry in &token.top {
        map.entry(name(language, entry.id)).or_insert_with(|| json!(entry.logprob));
    }
    map.entry(name(language, token.id)).or_insert_with(|| json!(logprob));
    Value::Object(map)
}

/// A token's text, or its bytes spelled out where they are only part of a character.
pub(super) fn name(language: &Language, id: u32) -> String {
    let piece = language.piece(id);
    String::from_utf8(piece).unwrap_or_else(|error| {
        let bytes = error.as_bytes().iter().map(|byte| format!("\\x{byte:02x}"));
        format!("bytes:{}", bytes.collect::<String>())
    })
}
