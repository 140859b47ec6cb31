//! One shape check per op.

/// Shapes that do not fit each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{op}: {detail}")]
pub struct ShapeError {
    pub op: &'static str,
    pub detail: String,
}
