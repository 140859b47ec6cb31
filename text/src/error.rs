//! Why text could not be turned into tokens.

/// What can go wrong between text and token ids.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// The model came without a tokenizer: only routes that take token ids work.
    #[error("the model has no tokenizer; send token ids instead of text")]
    NoTokenizer,
    /// Neither a template nor the tokens of ChatML: the model cannot chat.
    #[error("the model has no chat template and no ChatML tokens; send a completion prompt")]
    NoTemplate,
    /// The tokenizer's files are broken, or of a kind that is not supported.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// Another of the model's files is broken.
    #[error("{file}: {reason}")]
    File { file: String, reason: String },
    /// The model's own template is unusable: the model can complete, but not chat.
    #[error(
        "the model's chat template is broken ({0}); send a completion prompt, or mend the file"
    )]
    BrokenTemplate(String),
    /// The model's template refused the conversation, in its own words.
    #[error("the chat template refused: {0}")]
    Refused(String),
    /// The template failed on this conversation, or ran out of its means.
    #[error("chat template: {0}")]
    Template(String),
    /// The text itself cannot be encoded.
    #[error("input: {0}")]
    Input(String),
}

impl TextError {
    pub(crate) fn file(file: &str, reason: impl ToString) -> Self {
        Self::File { file: file.to_owned(), reason: reason.to_string() }
    }
}
