//! A conversation as the variables of a template.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use minijinja::Value;
use minijinja::value::{Enumerator, Object};
use serde_json::{Map, Value as Json};

use super::Mark;
use crate::chat::{Chat, Content, Message};
use crate::error::TextError;
use crate::python::json::{JsonStyle, dumps};

/// How a template is shown what not every template can take.
#[derive(Clone, Copy, Debug, Default)]
pub struct View {
    /// The arguments of tool calls as JSON text instead of an object.
    arguments_as_text: bool,
    /// Content that is null or left out as empty text.
    missing_as_text: bool,
}

impl View {
    /// What to show, best first; those that differ for this conversation.
    pub fn of(chat: &Chat) -> Vec<Self> {
        let calls = chat.messages.iter().any(|message| message.tool_calls.is_some());
        let missing = |message: &Message| !matches!(message.content, Content::Text(_));
        let missing = chat.messages.iter().any(missing);
        let mut views = vec![Self::default()];
        if calls {
            views.push(Self { arguments_as_text: true, missing_as_text: false });
        }
        if missing {
            views.push(Self { arguments_as_text: false, missing_as_text: true });
        }
        if calls && missing {
            views.push(Self { arguments_as_text: true, missing_as_text: true });
        }
        views
    }
}

/// The arguments of a tool call: a dictionary that reads as JSON where it is joined to text.
#[derive(Debug)]
pub struct Arguments {
    entries: Value,
    json: String,
}

impl Object for Arguments {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.entries.as_object()?.get_value(key)
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        match self.entries.try_iter() {
            Ok(keys) => Enumerator::Values(keys.collect()),
            Err(_) => Enumerator::Empty,
        }
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.json)
    }
}

/// Every variable of one rendering; `tokens` are the model's.
pub fn value(
    chat: &Chat,
    tokens: &BTreeMap<String, String>,
    view: View,
    mark: Mark<'_>,
) -> Result<Value, TextError> {
    let mut variables: BTreeMap<&str, Value> = BTreeMap::new();
    variables.extend(tokens.iter().map(|(name, token)| (&name[..], token[..].into())));
    variables.extend(chat.args.iter().map(|(name, json)| (&name[..], shown(json, mark))));
    let messages = chat.messages.iter().enumerate();
    let messages = messages.map(|(at, one)| message(at, one, view, mark));
    variables.insert("messages", messages.collect::<Result<Vec<_>, _>>()?.into());
    let tools = chat.tools.as_ref().map_or_else(|| Value::from(()), |tools| shown(tools, mark));
    variables.insert("tools", tools);
    variables.insert("documents", ().into());
    variables.insert("add_generation_prompt", chat.add_generation_prompt.into());
    Ok(Value::from_pairs(variables))
}

fn message(at: usize, message: &Message, view: View, mark: Mark<'_>) -> Result<Value, TextError> {
    // Names of fields are the caller's code, not a user's text.
    let mut fields: Vec<(&str, Value)> = vec![("role", mark(&message.role).into())];
    match &message.content {
        Content::Absent | Content::Null if view.missing_as_text => {
            fields.push(("content", "".into()));
        }
        Content::Absent => {}
        Content::Null => fields.push(("content", ().into())),
        Content::Text(text) => fields.push(("content", mark(text).into())),
    }
    if let Some(calls) = &message.tool_calls {
        fields.push(("tool_calls", tool_calls(at, calls, view, mark)?));
    }
    for (name, json) in &message.extra {
        if !fields.iter().any(|(known, _)| known == name) {
            fields.push((name, shown(json, mark)));
        }
    }
    Ok(Value::from_pairs(fields))
}

fn tool_calls(at: usize, calls: &Json, view: View, mark: Mark<'_>) -> Result<Value, TextError> {
    let Json::Array(calls) = calls else { return Ok(shown(calls, mark)) };
    let call = |(number, call): (usize, &Json)| -> Result<Value, TextError> {
        let (Json::Object(fields), Some(Json::Object(function))) = (call, call.get("function"))
        else {
            return Ok(shown(call, mark));
        };
        let place = || format!("messages[{at}].tool_calls[{number}].function.arguments");
        let given = arguments(function, place)?;
        let mut shown_function: Vec<(String, Value)> = entries(function, mark);
        let value = if view.arguments_as_text { given.text(mark) } else { given.object(mark) };
        match shown_function.iter_mut().find(|(name, _)| name == "arguments") {
            Some((_, shown)) => *shown = value,
            None => shown_function.push(("arguments".to_owned(), value)),
        }
        let mut shown_call = entries(fields, mark);
        for (name, shown) in &mut shown_call {
            if name == "function" {
                *shown = Value::from_pairs(std::mem::take(&mut shown_function));
            }
        }
        Ok(Value::from_pairs(shown_call))
    };
    let calls = calls.iter().enumerate().map(call);
    Ok(calls.collect::<Result<Vec<_>, _>>()?.into())
}

/// The arguments of one call, read once.
struct Given {
    parsed: Json,
    /// As the client wrote them.
    text: String,
}

/// Clients send arguments as JSON text, some as the object itself; nothing at all is no arguments.
fn arguments(
    function: &Map<String, Json>,
    place: impl FnOnce() -> String,
) -> Result<Given, TextError> {
    let empty = || Given { parsed: Json::Object(Map::new()), text: "{}".to_owned() };
    match function.get("arguments") {
        None | Some(Json::Null) => Ok(empty()),
        Some(Json::String(text)) if text.trim().is_empty() => Ok(empty()),
        Some(Json::String(text)) => match serde_json::from_str(text) {
            Ok(Json::Null) => Ok(empty()),
            Ok(parsed) => Ok(Given { parsed, text: text.clone() }),
            Err(error) => Err(TextError::Input(format!(
                "{} is not JSON: {error}; give an object as JSON text",
                place()
            ))),
        },
        Some(other) => {
            Ok(Given { parsed: other.clone(), text: dumps(other, &JsonStyle::default()) })
        }
    }
}

impl Given {
    fn text(&self, mark: Mark<'_>) -> Value {
        mark(&self.text).into()
    }

    fn object(&self, mark: Mark<'_>) -> Value {
        let entries = shown(&self.parsed, mark);
        match self.parsed {
            Json::Object(_) => Value::from_object(Arguments { entries, json: mark(&self.text) }),
            _ => entries,
        }
    }
}

/// JSON with every text of it marked, names of fields too.
fn shown(json: &Json, mark: Mark<'_>) -> Value {
    match json {
        Json::Null => ().into(),
        Json::Bool(flag) => (*flag).into(),
        Json::Number(number) => {
            let unsigned = number.as_u64().map(Value::from);
            let whole = unsigned.or_else(|| number.as_i64().map(Value::from));
            whole.unwrap_or_else(|| number.as_f64().unwrap_or(f64::NAN).into())
        }
        Json::String(text) => mark(text).into(),
        Json::Array(items) => items.iter().map(|item| shown(item, mark)).collect(),
        Json::Object(fields) => Value::from_pairs(entries(fields, mark)),
    }
}

fn entries(fields: &Map<String, Json>, mark: Mark<'_>) -> Vec<(String, Value)> {
    fields.iter().map(|(name, json)| (mark(name), shown(json, mark))).collect()
}
