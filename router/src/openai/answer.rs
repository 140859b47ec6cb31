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
        let prefix = if route == Route::Chat { "chatcmpl" } else { "cmpl" };
        Self {
            route,
            id: format!("{prefix}-{}", generation.request_id),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            model: generation.model.clone(),
            logprobs,
        }
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
        let mut answer = self.frame(object, Value::Array(choices));
        answer["usage"] = self::usage(usage);
        answer
    }

    /// The chunk that opens a choice of a chat: who speaks.
    pub fn opening(&self, choice: usize, usage: Option<Value>) -> Value {
        let delta = json!({"role": "assistant", "content": "", "refusal": null});
        let choice =
            json!({"index": choice, "delta": delta, "logprobs": null, "finish_reason": null});
        self.piece(Value::Array(vec![choice]), usage)
    }

    /// One chunk of a stream; `None` where it would say nothing.
    pub fn chunk(&self, chunk: Chunk, usage: Option<Value>, language: &Language) -> Option<Value> {
        let index = chunk.choice;
        let mut part = Part::default();
        part.add(chunk);
        let says_tokens = self.logprobs && part.tokens.iter().any(|token| !token.end);
        if part.text.is_empty() && part.finish.is_none() && !says_tokens {
            return None;
        }
        let logprobs = if says_tokens { self.logprobs(&part, language) } else { Value::Null };
        let finish = part.finish.map(FinishReason::as_str);
        let choice = match self.route {
            Route::Chat => {
                let delta = match part.text.is_empty() && finish.is_some() {
                    true => json!({}),
                    false => json!({"content": part.text}),
                };
                json!({"index": index, "delta": delta, "logprobs": logprobs,
                    "finish_reason": finish})
            }
            Route::Completions => json!({"index": index, "text": part.text,
                "logprobs": logprobs, "finish_reason": finish}),
        };
        Some(self.piece(Value::Array(vec![choice]), usage))
    }

    /// The chunk after the last: no choice, only the usage.
    pub fn closing(&self, usage: Usage) -> Value {
        self.piece(Value::Array(Vec::new()), Some(self::usage(usage)))
    }

    /// A chunk without choices: how far one has come towards its next token.
    pub fn progress(&self, choice: u32, progress: Progress, usage: Option<Value>) -> Value {
        let Progress { waiting_ahead, prefilled, prompt, running } = progress;
        let mut chunk = self.piece(Value::Array(Vec::new()), usage);
        chunk["progress"] = json!({"index": choice, "running": running,
            "waiting_ahead": waiting_ahead, "prefilled_tokens": prefilled,
            "prompt_tokens": prompt});
        chunk
    }

    fn piece(&self, choices: Value, usage: Option<Value>) -> Value {
        let object =
            if self.route == Route::Chat { "chat.completion.chunk" } else { "text_completion" };
        let mut piece = self.frame(object, choices);
        if let Some(usage) = usage {
            piece["usage"] = usage;
        }
        piece
    }

    fn frame(&self, object: &str, choices: Value) -> Value {
        json!({"id": self.id, "object": object, "created": self.created, "model": self.model,
            "choices": choices})
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
