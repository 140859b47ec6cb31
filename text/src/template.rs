//! Chat templates, rendered as Hugging Face renders them.
//!
//! A template's work is bounded; it sees only the conversation. The conversation is shown as
//! Hugging Face shows it: null content is none, and the arguments of a tool call are an object.
//! Some templates were written for less: they join arguments as text, or content that may be none.
//! Where such a template fails, it is shown text instead.

mod context;
mod environment;
mod filters;

use std::collections::BTreeMap;

use minijinja::{Environment, Error, ErrorKind};

use crate::chat::Chat;
use crate::error::TextError;
use crate::marker::private;
pub use context::Arguments;
use context::View;
use environment::Raised;

const NAME: &str = "chat";

/// For models whose vocabulary has ChatML's tokens and whose files have no template.
pub const CHATML: &str = "\
{%- if tools %}{{ raise_exception('tools need a chat template of the model') }}{% endif -%}
{%- for message in messages -%}
{%- if message.role not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('unknown role ' ~ message.role) -}}
{%- endif -%}
{%- if message.tool_calls %}{{ raise_exception('tool calls need a chat template of the model') }}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
";

/// Applied to every text of a conversation before a template sees it.
pub type Mark<'a> = &'a dyn Fn(&str) -> String;

/// One compiled template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Private-use characters that it contains.
    private: Vec<char>,
    /// `bos_token`, `eos_token` … as templates know them.
    tokens: BTreeMap<String, String>,
}

impl ChatTemplate {
    /// Compiles `source`; `tokens` become variables.
    pub fn compile(source: &str, tokens: BTreeMap<String, String>) -> Result<Self, TextError> {
        let mut environment = environment::new().map_err(|error| template_error(&error))?;
        // Line ends are Python's.
        let unix = source.replace("\r\n", "\n").replace('\r', "\n");
        environment
            .add_template_owned(NAME, without_generation_tags(&unix))
            .map_err(|error| template_error(&error))?;
        Ok(Self { environment, private: private(source).collect(), tokens })
    }

    pub fn private(&self) -> &[char] {
        &self.private
    }

    /// The conversation as the model reads it.
    ///
    /// # Errors
    /// `Input` for arguments of a tool call that are no JSON, `Refused` in the template's own
    /// words, `Template` where it fails.
    pub fn render(&self, chat: &Chat, mark: Mark<'_>) -> Result<String, TextError> {
        let mut failed = None;
        for view in View::of(chat) {
            let context = context::value(chat, &self.tokens, view, mark)?;
            let template = self.environment.get_template(NAME).map_err(|e| template_error(&e))?;
            match template.render(context) {
                Ok(text) => return Ok(text),
                Err(error) if raised(&error).is_none() && error.kind() != ErrorKind::OutOfFuel => {
                    failed.get_or_insert(error);
                }
                Err(error) => return Err(template_error(&error)),
            }
        }
        // The first view is the one that the template's author should have expected.
        Err(failed.map_or_else(
            || TextError::Template("nothing to render".to_owned()),
            |error| template_error(&error),
        ))
    }
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
    match raised(error) {
        Some(message) => TextError::Refused(message),
        None => TextError::Template(error.to_string()),
    }
}

/// What the template said with `raise_exception`.
fn raised(error: &Error) -> Option<String> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(at) = cause {
        if let Some(Raised(message)) = at.downcast_ref() {
            return Some(message.clone());
        }
        cause = at.source();
    }
    None
}

#[cfg(test)]
mod tests;
