//! The body of `/v1/chat/completions`.

use super::{
    Body,
    fields::{Fields, wrong},
    harmless::harmless,
    params::{Limit, delivery, max_tokens, sampling},
};
use crate::{RouterError, request::Prompt};
use engine::LOGPROBS_MAX;
use proto::v1::Sampling;
use serde_json::{Value, json};
use text::{Chat, Content, Message};

/// Reads the body strictly.
pub(crate) fn parse(body: &[u8]) -> Result<Body, RouterError> {
    let mut fields = Fields::parse(body)?;
    let model = fields.string("model")?.unwrap_or_default();
    let chat = conversation(&mut fields)?;
    let max_tokens = max_tokens(&mut fields)?.and_then(|limit| match limit {
        Limit::Tokens(count) => Some(count),
        Limit::Fitting => None,
    });
    let logprobs = logprobs(&mut fields)?;
    let sampling = Sampling { max_tokens, logprobs, ..sampling(&mut fields)? };
    let delivery = delivery(&mut fields)?;
    let priority = fields.int("priority")?.unwrap_or(0);
    for name in ["echo", "add_special_tokens", "parse_special"] {
        fields.only(name, &[json!(false)])?;
    }
    harmless(&mut fields)?;
    let ignored = fields.finish()?;
    let prompts = vec![Prompt::Chat(Box::new(chat))];
    Ok(Body { model, prompts, sampling, priority, delivery, ignored })
}

/// Messages, tools and what else the template sees.
pub(super) fn conversation(fields: &mut Fields) -> Result<Chat, RouterError> {
    let messages = fields.array("messages")?.ok_or_else(|| {
        RouterError::invalid("messages", "messages is missing; give an array of messages")
    })?;
    let messages = messages
        .into_iter()
        .enumerate()
        .map(|(at, value)| message(&format!("messages[{at}]"), value))
        .collect::<Result<_, _>>()?;
    let continue_final_message = fields.boolean("continue_final_message")?.unwrap_or(false);
    let add_generation_prompt = fields.boolean("add_generation_prompt")?;
    if continue_final_message && add_generation_prompt == Some(true) {
        let message = "continue_final_message and add_generation_prompt exclude each other; give \
                       one of them";
        return Err(RouterError::invalid("continue_final_message", message));
    }
    Ok(Chat {
        messages,
        tools: tools(fields)?,
        args: fields.object("chat_template_kwargs")?.unwrap_or_default(),
        add_generation_prompt: add_generation_prompt.unwrap_or(!continue_final_message),
        continue_final_message,
    })
}

fn logprobs(fields: &mut Fields) -> Result<Option<u32>, RouterError> {
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.uint("top_logprobs")?;
    match (wanted, top) {
        (_, Some(top)) if top > LOGPROBS_MAX => Err(RouterError::invalid(
            "top_logprobs",
            format!("top_logprobs must be in [0, {LOGPROBS_MAX}], not {top}"),
        )),
        (false, Some(1..)) => Err(RouterError::invalid(
            "top_logprobs",
            "top_logprobs is allowed only with logprobs: true",
        )),
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, _) => Ok(None),
    }
}

/// The definitions for the template. Calls are not parsed out of the answer, so none can be forced.
fn tools(fields: &mut Fields) -> Result<Option<Value>, RouterError> {
    let tools = fields.array("tools")?.filter(|tools| !tools.is_empty());
    for (at, tool) in tools.iter().flatten().enumerate() {
        let name = tool.pointer("/function/name").and_then(Value::as_str);
        if tool.get("type") != Some(&json!("function")) || name.is_none() {
            let at = format!("tools[{at}]");
            return Err(wrong(&at, "a function with a name", tool));
        }
    }
    if fields.boolean("parallel_tool_calls")? == Some(false) && tools.is_some() {
        let message = "parallel_tool_calls is supported only as true";
        return Err(RouterError::invalid("parallel_tool_calls", message));
    }
    let choice = fields.take("tool_choice");
    match choice.as_ref().map(|choice| choice.as_str()) {
        None | Some(Some("auto")) => Ok(tools.map(Value::Array)),
        Some(Some("none")) => Ok(None),
        Some(_) => Err(RouterError::invalid(
            "tool_choice",
            "tool_choice is supported only as \"auto\" or \"none\"",
        )),
    }
}

fn message(at: &str, value: Value) -> Result<Message, RouterError> {
    let mut fields = Fields::nested(at, value)?;
    let role = fields.string("role")?.ok_or_else(|| {
        RouterError::invalid(fields.name("role"), format!("{at}.role is missing"))
    })?;
    let tool_calls = match fields.array("tool_calls")?.filter(|calls| !calls.is_empty()) {
        Some(_) if role != "assistant" => {
            let name = fields.name("tool_calls");
            let message = format!("{name} is only for messages of the assistant");
            return Err(RouterError::invalid(name, message));
        }
        calls => calls.map(Value::Array),
    };
    let null = fields.is_null("content");
    let content = match fields.take("content") {
        Some(content) => Content::Text(self::content(&fields.name("content"), content)?),
        None if role == "assistant" && null => Content::Null,
        None if role == "assistant" => Content::Absent,
        None => {
            let name = fields.name("content");
            return Err(RouterError::invalid(name.clone(), format!("{name} is missing")));
        }
    };
    for name in ["audio", "function_call"] {
        fields.unsupported(name)?;
    }
    for name in ["annotations", "refusal"] {
        fields.ignore(name);
    }
    // Templates see whatever else a message has, as Hugging Face shows it to them.
    let mut extra = fields.rest();
    extra.retain(|_, value| !value.is_null());
    // OpenAI's newer name for the same role.
    let role = if role == "developer" { "system".to_owned() } else { role };
    Ok(Message { role, content, tool_calls, extra })
}

/// A string, or text parts, which are joined.
fn content(name: &str, value: Value) -> Result<String, RouterError> {
    let parts = match value {
        Value::String(text) => return Ok(text),
        Value::Array(parts) => parts,
        other => return Err(wrong(name, "a string or an array of text parts", &other)),
    };
    let mut text = String::new();
    for (at, part) in parts.into_iter().enumerate() {
        let name = format!("{name}[{at}]");
        let mut part = Fields::nested(&name, part)?;
        let kind = part.string("type")?.unwrap_or_default();
        if kind != "text" {
            let message = format!("{name}.type '{kind}' is not supported; only text is");
            return Err(RouterError::invalid(format!("{name}.type"), message));
        }
        let piece = part.string("text")?;
        text += &piece.ok_or_else(|| {
            RouterError::invalid(format!("{name}.text"), format!("{name}.text is missing"))
        })?;
    }
    Ok(text)
}
