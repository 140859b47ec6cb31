//! Everything that a router needs to speak one model's language.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::de::IgnoredAny;

use crate::chat::Chat;
use crate::chat_format::ChatFormat;
use crate::continuation;
use crate::defaults::GenerationDefaults;
use crate::detokenize::Detokenizer;
use crate::error::TextError;
use crate::marker;
use crate::pieces::Pieces;
use crate::qwen1;
use crate::tokenizer::{EncoderKind, Vocabulary, gguf};

/// A model's files by name: tokenizer.json, tokenizer_config.json, vocab.json, merges.txt,
/// added_tokens.json, special_tokens_map.json, a *.tiktoken file, chat_template.jinja,
/// additional_chat_templates/*.jinja, chat_template.json, generation_config.json, config.json; or
/// metadata.gguf, the beginning of a GGUF file. Those that the model has.
pub type Files = BTreeMap<String, Vec<u8>>;

/// Tokenizer, chat format and sampling defaults of one model.
#[derive(Debug)]
pub struct Language {
    vocabulary: Option<Vocabulary>,
    chat: ChatFormat,
    defaults: GenerationDefaults,
    /// Of the settings.
    warnings: Vec<String>,
    /// Shared with every running decoder.
    pieces: Arc<Pieces>,
}

impl Language {
    /// A model without any tokenizer is fine: whatever needs one answers `NoTokenizer`. So is one
    /// with a broken chat template: see [`Self::warnings`].
    ///
    /// # Errors
    /// Names the file that is broken or of an unsupported kind. Every file is read, needed or not.
    pub fn load(files: &Files) -> Result<Self, TextError> {
        check(files)?;
        let vocabulary = Vocabulary::load(files)?;
        let metadata = files.get("metadata.gguf").map(|bytes| gguf::parse(bytes)).transpose()?;
        let metadata = metadata.as_ref();
        let (defaults, warnings) = GenerationDefaults::load(files, metadata, vocabulary.as_ref())?;
        let chat = ChatFormat::load(files, metadata, vocabulary.as_ref())?;
        let pieces = vocabulary.as_ref().map(|v| v.pieces.clone()).unwrap_or_default();
        Ok(Self { vocabulary, chat, defaults, warnings, pieces })
    }

    /// A raw prompt, which is the caller's own template: every added token of the vocabulary is
    /// parsed in it; BOS before it where the model wants that.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.vocabulary()?.encode(text, true)
    }

    /// As [`Self::encode`], without BOS.
    pub fn encode_bare(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.vocabulary()?.encode(text, false)
    }

    /// Text taken literally: the names of added tokens are only text; BOS before it where the
    /// model wants that.
    pub fn encode_literal(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.vocabulary()?.encode_literal(text, true)
    }

    /// As [`Self::encode_literal`], without BOS.
    pub fn encode_ordinary(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.vocabulary()?.encode_literal(text, false)
    }

    /// The id of the added token with exactly this text, e.g. of a stop string that names one.
    pub fn special_token(&self, text: &str) -> Option<u32> {
        self.vocabulary.as_ref()?.added_token(text)
    }

    /// The rendered conversation; special tokens are only where the template put them.
    pub fn encode_chat(&self, chat: &Chat) -> Result<Vec<u32>, TextError> {
        let vocabulary = self.vocabulary()?;
        let Some(template) = self.chat.template(chat)? else {
            return Ok(qwen1::compose(chat, vocabulary)?.ids);
        };
        let marker = marker::choose(chat, template.private())?;
        let mark = |text: &str| vocabulary.specials.mark(text, marker);
        let rendered = template.render(chat, &mark)?;
        vocabulary.encode_rendered(continuation::part(&rendered, chat, &mark)?, marker)
    }

    /// The conversation as text. Whether a special token in it is one cannot be seen here.
    pub fn render_chat(&self, chat: &Chat) -> Result<String, TextError> {
        match self.chat.template(chat)? {
            Some(template) => {
                let rendered = template.render(chat, &str::to_owned)?;
                Ok(continuation::part(&rendered, chat, &str::to_owned)?.to_owned())
            }
            None => Ok(qwen1::compose(chat, self.vocabulary()?)?.text),
        }
    }

    /// What is wrong with the model's files without keeping it from being served, one sentence
    /// each, naming the file.
    pub fn warnings(&self) -> Vec<String> {
        [self.warnings.clone(), self.chat.warnings()].concat()
    }

    /// Which code finds the ids of a text; `None` without a tokenizer.
    pub fn encoder(&self) -> Option<EncoderKind> {
        self.vocabulary.as_ref().map(Vocabulary::encoder)
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
}

/// That every small file of JSON is JSON, and that none begins as Windows editors let them begin.
fn check(files: &Files) -> Result<(), TextError> {
    let texts = files.iter().filter(|(name, _)| name.ends_with(".json") || *name == "merges.txt");
    for (name, bytes) in texts {
        match name.as_str() {
            // These are read whole where they are used.
            "tokenizer.json" | "vocab.json" | "merges.txt" => formats::json::check_encoding(bytes),
            _ => formats::json::parse::<IgnoredAny>(bytes).map(|_| ()),
        }
        .map_err(|reason| TextError::file(name, reason))?;
    }
    Ok(())
}

/// A file of JSON; `None` where the model has none of that name.
pub fn json<T: serde::de::DeserializeOwned>(
    files: &Files,
    name: &str,
) -> Result<Option<T>, TextError> {
    let Some(bytes) = files.get(name) else { return Ok(None) };
    formats::json::parse(bytes).map(Some).map_err(|reason| TextError::file(name, reason))
}
