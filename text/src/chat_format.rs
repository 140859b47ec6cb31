//! How a model is spoken to in turns: by a template of its own, by ChatML, or as the original Qwen.

use std::collections::BTreeMap;

use formats::gguf::Metadata;
use serde_json::Value;

use crate::chat::Chat;
use crate::error::TextError;
use crate::language::{Files, json};
use crate::template::{CHATML, ChatTemplate};
use crate::tokenizer::{Vocabulary, gguf};

/// The rules of a model's conversations.
#[derive(Debug)]
pub enum ChatFormat {
    Templates(Box<Templates>),
    /// The original Qwen's own rules.
    Qwen1,
    None,
}

/// Templates that do not compile are kept as the reason.
#[derive(Debug)]
pub struct Templates {
    plain: Result<ChatTemplate, String>,
    /// Some models have another template for conversations with tools.
    tools: Option<Result<ChatTemplate, String>>,
}

/// One template as it was found.
struct Source {
    file: &'static str,
    text: String,
}

impl ChatFormat {
    /// The model's own template wherever it is kept, else what its kind of vocabulary implies.
    pub fn load(
        files: &Files,
        metadata: Option<&Metadata>,
        vocabulary: Option<&Vocabulary>,
    ) -> Result<Self, TextError> {
        let config: Value = json(files, "tokenizer_config.json")?.unwrap_or_default();
        let tokens = match metadata {
            Some(metadata) => metadata_tokens(metadata, vocabulary)?,
            None => config_tokens(&config),
        };
        let (plain, tools) = sources(files, metadata, &config)?;
        let compile = |source: &Source| {
            let compiled = ChatTemplate::compile(&source.text, tokens.clone());
            compiled.map_err(|error| format!("{}: {error}", source.file))
        };
        let tools = tools.as_ref().map(compile);
        if let Some(source) = plain {
            let plain = compile(&source);
            return Ok(Self::Templates(Box::new(Templates { plain, tools })));
        }
        let is_chatml = vocabulary.is_some_and(|vocabulary| {
            ["<|im_start|>", "<|im_end|>"].iter().all(|name| vocabulary.specials.id(name).is_some())
        });
        Ok(match is_chatml {
            true if files.keys().any(|name| name.ends_with(".tiktoken")) => Self::Qwen1,
            true => {
                let plain = Ok(ChatTemplate::compile(CHATML, tokens.clone())?);
                Self::Templates(Box::new(Templates { plain, tools }))
            }
            false => Self::None,
        })
    }

    /// The template for a conversation; `None` for the original Qwen.
    pub fn template(&self, chat: &Chat) -> Result<Option<&ChatTemplate>, TextError> {
        let own = match self {
            Self::Templates(own) => own,
            Self::Qwen1 => return Ok(None),
            Self::None => return Err(TextError::NoTemplate),
        };
        let template = match &own.tools {
            Some(tools) if chat.tools.is_some() => tools,
            _ => &own.plain,
        };
        let broken = |reason: &String| TextError::BrokenTemplate(reason.clone());
        template.as_ref().map(Some).map_err(broken)
    }

    /// One sentence for each template that does not compile.
    pub fn warnings(&self) -> Vec<String> {
        let Self::Templates(own) = self else { return Vec::new() };
        let mut warnings = Vec::new();
        if let Err(reason) = &own.plain {
            warnings.push(format!("chat is refused, completions are served: {reason}"));
        }
        if let Some(Err(reason)) = &own.tools {
            warnings.push(format!("chat with tools is refused: {reason}"));
        }
        warnings
    }
}

/// The template, and the one for conversations with tools where there are two.
type Sources = (Option<Source>, Option<Source>);

/// Files of their own come before what the configuration holds, as at Hugging Face.
fn sources(
    files: &Files,
    metadata: Option<&Metadata>,
    config: &Value,
) -> Result<Sources, TextError> {
    let named = |name: &'static str| file_source(files, name);
    let plain = match named("chat_template.jinja")? {
        None => named("additional_chat_templates/default.jinja")?,
        found => found,
    };
    let tools = named("additional_chat_templates/tool_use.jinja")?;
    if plain.is_some() {
        return Ok((plain, tools));
    }
    let (plain, older_tools) = match metadata {
        Some(metadata) => metadata_sources(metadata)?,
        None => config_sources(files, config)?,
    };
    Ok((plain, tools.or(older_tools)))
}

fn metadata_sources(metadata: &Metadata) -> Result<Sources, TextError> {
    let file = "metadata.gguf";
    let source = |key: &str| -> Result<Option<Source>, TextError> {
        let text = metadata.string(key).map_err(|error| TextError::file(file, error))?;
        Ok(text.map(|text| Source { file, text: text.to_owned() }))
    };
    Ok((source("tokenizer.chat_template")?, source("tokenizer.chat_template.tool_use")?))
}

fn config_sources(files: &Files, config: &Value) -> Result<Sources, TextError> {
    let own: Value = json(files, "chat_template.json")?.unwrap_or_default();
    for (file, json) in [("chat_template.json", &own), ("tokenizer_config.json", config)] {
        let source = |text: &str| Source { file, text: text.to_owned() };
        match json.get("chat_template") {
            None | Some(Value::Null) => {}
            Some(Value::String(text)) => return Ok((Some(source(text)), None)),
            Some(Value::Array(named)) => {
                let find = |name: &str| {
                    let entry = named.iter().find(|entry| entry["name"] == name)?;
                    entry["template"].as_str().map(source)
                };
                return Ok((find("default"), find("tool_use")));
            }
            Some(_) => {
                return Err(TextError::file(file, "chat_template is neither text nor a list"));
            }
        }
    }
    Ok((None, None))
}

fn file_source(files: &Files, file: &'static str) -> Result<Option<Source>, TextError> {
    let Some(bytes) = files.get(file) else { return Ok(None) };
    let text = std::str::from_utf8(bytes).map_err(|error| TextError::file(file, error))?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    Ok(Some(Source { file, text: text.to_owned() }))
}

/// `bos_token` and its like, as tokenizer_config.json spells them: text, or an object around it.
fn config_tokens(config: &Value) -> BTreeMap<String, String> {
    let fields = config.as_object().into_iter().flatten();
    let tokens = fields.filter(|(name, _)| name.ends_with("_token"));
    let text = |value: &Value| value.as_str().or(value["content"].as_str()).map(str::to_owned);
    tokens.filter_map(|(name, value)| Some((name.clone(), text(value)?))).collect()
}

fn metadata_tokens(
    metadata: &Metadata,
    vocabulary: Option<&Vocabulary>,
) -> Result<BTreeMap<String, String>, TextError> {
    let mut tokens = BTreeMap::new();
    let Some(vocabulary) = vocabulary else { return Ok(tokens) };
    for (name, key) in [
        ("bos_token", "tokenizer.ggml.bos_token_id"),
        ("eos_token", "tokenizer.ggml.eos_token_id"),
        ("pad_token", "tokenizer.ggml.padding_token_id"),
        ("unk_token", "tokenizer.ggml.unknown_token_id"),
    ] {
        if let Some(id) = gguf::id(metadata, key)? {
            let text = String::from_utf8_lossy(vocabulary.pieces.get(id)).into_owned();
            tokens.insert(name.to_owned(), text);
        }
    }
    Ok(tokens)
}
