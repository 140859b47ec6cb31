//! Why a file could not be read.

use std::path::Path;

/// One variant for each case that a caller treats differently.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// The system refused.
    #[error("reading {path}: {source}")]
    Io { path: String, source: std::io::Error },
    /// The file ends before what it declares.
    #[error("truncated: {0}")]
    Truncated(String),
    /// The file contradicts itself or its format.
    #[error("malformed: {0}")]
    Malformed(String),
    /// Sound, but of a version or type that is not read here.
    #[error("unsupported: {0}")]
    Unsupported(String),
    /// Nothing at the path is a model.
    #[error("{0}")]
    NotFound(String),
    /// One of the above, and the file it happened in.
    #[error("{path}: {source}")]
    In { path: String, source: Box<FormatError> },
}

impl FormatError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.display().to_string(), source }
    }

    /// Names the file, unless the error already does.
    pub(crate) fn at(self, path: &Path) -> Self {
        match self {
            Self::Io { .. } | Self::In { .. } | Self::NotFound(_) => self,
            other => Self::In { path: path.display().to_string(), source: Box::new(other) },
        }
    }
}

/// Shortens and escapes what comes out of a file, for messages.
pub(crate) fn shown(text: &str) -> String {
    let mut shown: String = text.chars().take(100).flat_map(char::escape_debug).collect();
    if text.chars().nth(100).is_some() {
        shown.push('…');
    }
    shown
}
