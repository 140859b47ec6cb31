//! Chat templates, rendered as Hugging Face renders them.
//!
//! The environment offers what templates expect of it: trimmed blocks, loop controls, Python's
//! string methods and JSON spelling, `raise_exception`, `strftime_now`. A template's work is
//! bounded; it sees only the conversation.

use std::collections::BTreeMap;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value};
use minijinja_contrib::pycompat;
use serde_json::{Map, Value as Json};

use crate::chat::{Chat, Message};
use crate::error::TextError;
use crate::python::{JsonStyle, dumps};

/// Instructions that one rendering may take, about a second's worth.
const FUEL: u64 = 20_000_000;
const NAME: &str = "chat";

/// For models whose vocabulary has ChatML's tokens and whose files have no template.
pub const CHATML: &str = "\
{%- if tools %}{{ raise_exception('tools need a chat template of the model') }}{% endif -%}
{%- for message in messages -%}
{%- if message.role not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('unknown role ' ~ message.role) -}}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
";

/// What `raise_exception` carries to the caller.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

/// One compiled template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    /// `bos_token`, `eos_token` … as templates know them.
    tokens: BTreeMap<String, String>,
}

impl ChatTemplate {
    /// Compiles `source`; `tokens` become variables.
    pub fn compile(source: &str, tokens: BTreeMap<String, String>) -> Result<Self, TextError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| template_error(&error))?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(pycompat::unknown_method_callback);
        environment.set_formatter(|out, state, value| match value.kind() {
            ValueKind::Bool => Ok(out.write_str(if value.is_true() { "True" } else { "False" })?),
            ValueKind::None => Ok(out.write_str("None")?),
            _ => minijinja::escape_formatter(out, state, value),
        });
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(|error| template_error(&error))?;
        Ok(Self { environment, source: source.to_owned(), tokens })
    }

    pub fn source(&self) -> &str {
        &self.source
    }

    /// The conversation as the model reads it.
    pub fn render(&self, chat: &Chat) -> Result<String, TextError> {
        let mut context: Map<String, Json> = Map::new();
        context.extend(self.tokens.iter().map(|(name, token)| (name.clone(), token[..].into())));
        context.extend(chat.args.clone());
        context.insert("messages".into(), chat.messages.iter().map(message_value).collect());
        context.insert("tools".into(), chat.tools.clone().unwrap_or(Json::Null));
        context.insert("documents".into(), Json::Null);
        context.insert("add_generation_prompt".into(), chat.add_generation_prompt.into());
        let template = self.environment.get_template(NAME).map_err(|e| template_error(&e))?;
        template.render(Value::from(Serde(&context))).map_err(|error| template_error(&error))
    }
}

fn message_value(message: &Message) -> Json {
    let mut value = Map::new();
    value.insert("role".into(), message.role[..].into());
    value.insert("content".into(), message.content[..].into());
    if let Some(calls) = &message.tool_calls {
        value.insert("tool_calls".into(), calls.clone());
    }
    for (key, field) in &message.extra {
        value.entry(key.clone()).or_insert_with(|| field.clone());
    }
    Json::Object(value)
}

/// `{% generation %}` only marks text for training; as a block that always holds it does nothing.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(end) = rest[start..].find("%}").map(|len| start + len + 2) else { break };
        let tag = &rest[start..end];
        let word = tag[2..tag.len() - 2].trim_matches(['-', '+']).trim();
        out.push_str(&rest[..start]);
        match word {
            "generation" => out.push_str(&tag.replace(word, "if true")),
            "endgeneration" => out.push_str(&tag.replace(word, "endif")),
            _ => out.push_str(tag),
        }
        rest = &rest[end..];
    }
    out + rest
}

fn template_error(error: &Error) -> TextError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(at) = cause {
        if let Some(Raised(message)) = at.downcast_ref() {
            return TextError::Refused(message.clone());
        }
        cause = at.source();
    }
    TextError::Template(error.to_string())
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "raised").with_source(Raised(message)))
}

/// The time now in UTC, so that every router renders the same.
fn strftime_now(format: String) -> Result<String, Error> {
    let now = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC);
    jiff::fmt::strtime::format(&format, &now)
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))
}

fn to_json(value: Value, options: Kwargs) -> Result<Value, Error> {
    if value.is_undefined() {
        return Err(Error::new(ErrorKind::BadSerialization, "undefined has no JSON"));
    }
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let (item_separator, key_separator) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(other) => {
            let reason = format!("tojson takes 2 separators, not {}", other.len());
            return Err(Error::new(ErrorKind::InvalidOperation, reason));
        }
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let style = JsonStyle {
        ensure_ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        indent,
        item_separator,
        key_separator,
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    let json = serde_json::to_value(&value)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    Ok(Value::from_safe_string(dumps(&json, &style)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, chat: &Chat) -> Result<String, TextError> {
        ChatTemplate::compile(source, BTreeMap::new())?.render(chat)
    }

    #[test]
    fn templates_see_what_hugging_face_shows_them() {
        let mut chat = Chat { messages: vec![Message::new("user", " a,b ")], ..Chat::default() };
        chat.args.insert("flag".into(), true.into());
        let source = "{% for m in messages %}\n  {% generation %}\n\
            {{ m.content.strip().split(',')[-1] }}\
            {% endgeneration %}\n{% break %}{% endfor %}{{ flag }} {{ none }} {{ tools is none }}\
            {{ missing is defined }} {{ {'a': [1, 'é']} | tojson }} \
            {{ {'b': 1} | tojson(indent=1) }}";
        let expected = "bTrue None TrueFalse {\"a\": [1, \"é\"]} {\n \"b\": 1\n}";
        assert_eq!(render(source, &chat).unwrap(), expected);
        let year = render("{{ strftime_now('%Y') }}", &chat).unwrap();
        assert!(year.parse::<u32>().unwrap() > 2024);
    }

    #[test]
    fn a_refusal_is_in_the_templates_own_words() {
        let error = render("{{ raise_exception('no such role') }}", &Chat::default()).unwrap_err();
        assert!(matches!(&error, TextError::Refused(text) if text == "no such role"), "{error}");
        let chat = Chat { messages: vec![Message::new("wizard", "")], ..Chat::default() };
        let error = render(CHATML, &chat).unwrap_err();
        assert!(matches!(&error, TextError::Refused(text) if text.contains("wizard")), "{error}");
    }

    #[test]
    fn hostile_templates_end() {
        for source in [
            "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{{ 'a' * 1000000000000 }}",
            "{{ strftime_now('%Q%!') }}",
            "{{ messages | tojson(bogus=1) }}",
            "{% if",
            "{{ messages[7].role.strip() }}",
        ] {
            assert!(matches!(render(source, &Chat::default()), Err(TextError::Template(_))));
        }
    }
}
