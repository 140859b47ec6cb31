#![forbid(unsafe_code)]
//! Containers of model files on disk: safetensors and GGUF, read without trusting them.
//!
//! A header is believed only where the file's size allows it: every length is checked against the
//! bytes that are left before anything is allocated, tensors must lie inside the file, beside each
//! other and under different names, and nesting is bounded. What tensors mean is for others to say.
//! Tensor data is read by position, in slices, so that nobody holds more of a file than asked for.

pub mod gguf;
pub mod json;
pub mod safetensors;

mod cursor;
mod error;
mod locate;
mod tensors;
mod text_files;

pub use error::FormatError;
pub use locate::{Layout, locate};
pub use tensors::{Dtype, TensorInfo, Tensors};
pub use text_files::{TEXT_FILE_BYTES_MAX, text_files};
