//! Everything that a router needs to speak one model's language.

use std::collections::BTreeMap;
use std::sync::Arc;

use formats::gguf::Metadata;
use serde_json::Value;

use crate::chat::Chat;
use crate::continuation;
use crate::defaults::GenerationDefaults;
use crate::detokenize::Detokenizer;
use crate::error::TextError;
use crate::marker;
use crate::pieces::Pieces;
use crate::qwen1;
use crate::template::{CHATML, ChatTemplate};
use crate::tokenizer::{Vocabulary, gguf};

/// A model's files by name: tokenizer.json, tokenizer_config.json, vocab.json, merges.txt, a
/// *.tiktoken file, chat_template.jinja, chat_template.json, generation_config.json, config.json;
/// or metadata.gguf, the beginning of a GGUF file. Those that the model has.
pub type Files = BTreeMap<String, Vec<u8>>;

/// How the model is spoken to in turns.
#[derive(Debug)]
enum ChatFormat {
    Templates(Box<Templates>),
    /// The original Qwen's own rules.
    Qwen1,
    None,
}

#[derive(Debug)]
struct Templates {
    plain: ChatTemplate,
    /// Some models have another template for conversations with tools.
    tools: Option<ChatTemplate>,
}

/// Tokenizer, chat format and sampling defaults of one model.
#[derive(Debug)]
pub struct Language {
    vocabulary: Option<Vocabulary>,
    chat: ChatFormat,
    defaults: GenerationDefaults,
    /// Shared with every running decoder.
    pieces: Arc<Pieces>,
}

impl Language {
    /// A model without any tokenizer is fine: whatever needs one answers `NoTokenizer`.
    pub fn load(files: &Files) -> Result<Self, TextError> {
        let vocabulary = Vocabulary::load(files)?;
        let metadata = files.get("metadata.gguf").map(|bytes| gguf::parse(bytes)).transpose()?;
        let metadata = metadata.as_ref();
        let defaults = GenerationDefaults::load(files, metadata, vocabulary.as_ref())?;
        let chat = chat_format(files, metadata, vocabulary.as_ref())?;
        let pieces = vocabulary.as_ref().map(|v| v.pieces.clone()).unwrap_or_default();
        Ok(Self { vocabulary, chat, defaults, pieces })
    }

    /// A completion prompt: a user's text, in which special tokens are only text; BOS before it
    /// where the model wants that.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.vocabulary()?.encode(text, true)
    }

    /// Text as it is: no special tokens parsed, none added.
    pub fn encode_ordinary(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.vocabulary()?.encode(text, false)
    }

    /// As [`Self::encode`], without BOS.
    pub fn encode_bare(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.encode_trusted(text)
    }

    /// Text taken literally: the names of added tokens are only text; BOS before it where the
    /// model wants that.
    pub fn encode_literal(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.vocabulary()?.encode(text, true)
    }

    /// The id of the added token with exactly this text, e.g. of a stop string that names one.
    pub fn special_token(&self, text: &str) -> Option<u32> {
        self.vocabulary.as_ref()?.specials.id(text)
    }

    /// Text that the caller wrote, e.g. a template of its own: special tokens are parsed.
    pub fn encode_trusted(&self, text: &str) -> Result<Vec<u32>, TextError> {
        let marker = marker::choose(&Chat::default(), text)?;
        self.vocabulary()?.encode_rendered(text, marker)
    }

    /// The rendered conversation; special tokens are only where the template put them.
    pub fn encode_chat(&self, chat: &Chat) -> Result<Vec<u32>, TextError> {
        let vocabulary = self.vocabulary()?;
        let template = match self.template(chat) {
            Some(template) => template,
            None if matches!(self.chat, ChatFormat::Qwen1) => {
                return Ok(qwen1::compose(chat, vocabulary)?.ids);
            }
            None => return Err(TextError::NoTemplate),
        };
        let marker = marker::choose(chat, template.source())?;
        let rendered = template.render(&vocabulary.specials.mark_chat(chat, marker))?;
        let mark = |text: &str| vocabulary.specials.mark(text, marker);
        vocabulary.encode_rendered(continuation::part(&rendered, chat, &mark)?, marker)
    }

    /// The conversation as text. Whether a special token in it is one cannot be seen here.
    pub fn render_chat(&self, chat: &Chat) -> Result<String, TextError> {
        match self.template(chat) {
            Some(template) => {
                let rendered = template.render(chat)?;
                Ok(continuation::part(&rendered, chat, &str::to_owned)?.to_owned())
            }
            None if matches!(self.chat, ChatFormat::Qwen1) => {
                Ok(qwen1::compose(chat, self.vocabulary()?)?.text)
            }
            None => Err(TextError::NoTemplate),
        }
    }

    /// The bytes that an id stands for; none for an id outside the vocabulary.
    pub fn piece(&self, id: u32) -> Vec<u8> {
        self.pieces.get(id).to_vec()
    }

    /// One more than the highest id of the tokenizer; 0 without one.
    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    /// Whether an id is a control token, which leaves no text.
    pub fn is_special(&self, id: u32) -> bool {
        self.pieces.is_special(id)
    }

    /// Decodes one answer; without a tokenizer every id is empty.
    pub fn decoder(&self) -> Detokenizer {
        Detokenizer::new(self.pieces.clone())
    }

    /// What the model's files say about sampling.
    pub fn defaults(&self) -> &GenerationDefaults {
        &self.defaults
    }

    fn vocabulary(&self) -> Result<&Vocabulary, TextError> {
        self.vocabulary.as_ref().ok_or(TextError::NoTokenizer)
    }

    fn template(&self, chat: &Chat) -> Option<&ChatTemplate> {
        match &self.chat {
            ChatFormat::Templates(own) => match &own.tools {
                Some(tools) if chat.tools.is_some() => Some(tools),
                _ => Some(&own.plain),
            },
            ChatFormat::Qwen1 | ChatFormat::None => None,
        }
    }
}

/// The model's own template wherever it is kept, else what its kind of vocabulary implies.
fn chat_format(
    files: &Files,
    metadata: Option<&Metadata>,
    vocabulary: Option<&Vocabulary>,
) -> Result<ChatFormat, TextError> {
    let config = json(files, "tokenizer_config.json")?;
    let tokens = match metadata {
        Some(metadata) => metadata_tokens(metadata, vocabulary)?,
        None => config_tokens(&config),
    };
    let (plain, tools) = template_sources(files, metadata, &config)?;
    let compile = |source: &str| ChatTemplate::compile(source, tokens.clone());
    if let Some(source) = plain {
        let tools = tools.map(|source| compile(&source)).transpose()?;
        let own = Templates { plain: compile(&source)?, tools };
        return Ok(ChatFormat::Templates(Box::new(own)));
    }
    let is_chatml = vocabulary.is_some_and(|vocabulary| {
        ["<|im_start|>", "<|im_end|>"].iter().all(|name| vocabulary.specials.id(name).is_some())
    });
    Ok(match is_chatml {
        true if files.keys().any(|name| name.ends_with(".tiktoken")) => ChatFormat::Qwen1,
        true => {
            let own = Templates { plain: compile(CHATML)?, tools: None };
            ChatFormat::Templates(Box::new(own))
        }
        false => ChatFormat::None,
    })
}

/// The template, and the one for conversations with tools where there are two.
type Sources = (Option<String>, Option<String>);

fn template_sources(
    files: &Files,
    metadata: Option<&Metadata>,
    config: &Value,
) -> Result<Sources, TextError> {
    if let Some(source) = files.get("chat_template.jinja") {
        let source = std::str::from_utf8(source);
        let source = source.map_err(|error| TextError::file("chat_template.jinja", error))?;
        return Ok((Some(source.to_owned()), None));
    }
    let broken = |error: formats::FormatError| TextError::file("metadata.gguf", error);
    if let Some(metadata) = metadata {
        let source = |key: &str| Ok(metadata.string(key).map_err(broken)?.map(str::to_owned));
        let plain = source("tokenizer.chat_template")?;
        return Ok((plain, source("tokenizer.chat_template.tool_use")?));
    }
    let own = json(files, "chat_template.json")?;
    let template = [&own, config].into_iter().find_map(|file| file.get("chat_template"));
    match template {
        None | Some(Value::Null) => Ok((None, None)),
        Some(Value::String(source)) => Ok((Some(source.clone()), None)),
        Some(Value::Array(named)) => {
            let find = |name: &str| {
                let entry = named.iter().find(|entry| entry["name"] == name)?;
                entry["template"].as_str().map(str::to_owned)
            };
            Ok((find("default"), find("tool_use")))
        }
        Some(_) => {
            let reason = "chat_template is neither text nor a list";
            Err(TextError::file("tokenizer_config.json", reason))
        }
    }
}

fn json(files: &Files, name: &str) -> Result<Value, TextError> {
    let Some(bytes) = files.get(name) else { return Ok(Value::Null) };
    serde_json::from_slice(bytes).map_err(|error| TextError::file(name, error))
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
