//! Byte-level BPE tokenizers made in memory, for vocabularies that come without a tokenizer.json.

use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper, Tokenizer};

use crate::error::TextError;

/// How text is cut into words before merging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Every Qwen: one digit at a time, NFC first.
    Qwen,
    /// Llama 3: up to three digits; a word that is a token is not merged.
    Llama3,
    /// SmolLM: single digits, then as GPT-2.
    SmolLm,
    /// GPT-2.
    Gpt2,
}

impl Split {
    /// As a tokenizer.json has it.
    pub fn pre_tokenizer(self) -> Value {
        let words = |digits: &str| {
            let pattern = format!(
                "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{{L}}\\p{{N}}]?\\p{{L}}+|{digits}|\
                 \x20?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
            );
            json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
                   "invert": false})
        };
        let bytes = |use_regex: bool| {
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
                   "use_regex": use_regex})
        };
        let steps = match self {
            Self::Qwen => json!([words("\\p{N}"), bytes(false)]),
            Self::Llama3 => json!([words("\\p{N}{1,3}"), bytes(false)]),
            Self::SmolLm => json!([{"type": "Digits", "individual_digits": true}, bytes(true)]),
            Self::Gpt2 => json!([bytes(true)]),
        };
        json!({"type": "Sequence", "pretokenizers": steps})
    }
}

/// A tokenizer of the `tokenizers` crate as it was read.
#[derive(Debug)]
pub struct Loaded {
    pub tokenizer: Tokenizer,
    /// Best first, in the byte-level spelling; `None` where the files have them in no known form.
    pub merges: Option<Vec<(String, String)>>,
}

/// Everything that makes such a tokenizer.
#[derive(Debug)]
pub struct Recipe {
    /// Tokens in the byte-level spelling; added tokens as they are.
    pub vocab: Vec<(String, u32)>,
    /// Best first.
    pub merges: Merges,
    /// Tokens found whole in text; all are in `vocab`.
    pub added: Vec<AddedToken>,
    pub split: Split,
    /// A word that is a token stays one, whatever merging would make of it.
    pub whole_words: bool,
    /// Put before every text.
    pub bos: Option<u32>,
}

impl Recipe {
    pub fn build(self) -> Result<Loaded, TextError> {
        let model = BPE::builder()
            .vocab_and_merges(self.vocab.into_iter().collect::<Vocab>(), self.merges.clone())
            .ignore_merges(self.whole_words)
            .build()
            .map_err(error)?;
        let mut tokenizer = Tokenizer::new(model);
        let pre_tokenizer: PreTokenizerWrapper = part(self.split.pre_tokenizer())?;
        let decoder: DecoderWrapper = part(json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
            "use_regex": false
        }))?;
        tokenizer.with_pre_tokenizer(Some(pre_tokenizer)).with_decoder(Some(decoder));
        if self.split == Split::Qwen {
            let normalizer: NormalizerWrapper = part(json!({"type": "NFC"}))?;
            tokenizer.with_normalizer(Some(normalizer));
        }
        if let Some(id) = self.bos {
            let bos = TemplateProcessing::builder()
                .try_single(vec!["[BOS]:0".to_owned(), "$A:0".to_owned()])
                .map_err(error)?
                .special_tokens(vec![("[BOS]".to_owned(), id)])
                .build()
                .map_err(error)?;
            tokenizer.with_post_processor(Some(bos));
        }
        tokenizer.add_tokens(&self.added);
        Ok(Loaded { tokenizer, merges: Some(self.merges) })
    }
}

fn part<T: serde::de::DeserializeOwned>(value: Value) -> Result<T, TextError> {
    serde_json::from_value(value).map_err(error)
}

/// Any failure of the tokenizer library.
pub fn error(error: impl ToString) -> TextError {
    TextError::Tokenizer(error.to_string())
}

/// Refuses tokenizers whose tokens are not bytes.
pub fn check(tokenizer: &Tokenizer) -> Result<(), TextError> {
    let decoder = serde_json::to_value(tokenizer.get_decoder()).map_err(error)?;
    let is_bytes = |value: &Value| value["type"] == "ByteLevel";
    let steps = decoder["decoders"].as_array();
    if is_bytes(&decoder) || steps.is_some_and(|steps| steps.iter().any(is_bytes)) {
        return Ok(());
    }
    let name = decoder["type"].as_str().unwrap_or("none");
    Err(TextError::Tokenizer(format!(
        "decoder {name} is not supported; only byte-level vocabularies are"
    )))
}
