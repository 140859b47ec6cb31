//! Writes model files by hand, right or wrong, for tests.

pub mod gguf;

pub use gguf::GgufFile;

/// A safetensors file of any header and data.
pub fn safetensors(header: impl AsRef<[u8]>, data: &[u8]) -> Vec<u8> {
    let header = header.as_ref();
    [&(header.len() as u64).to_le_bytes()[..], header, data].concat()
}
