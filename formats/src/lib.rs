#![forbid(unsafe_code)]
//! Containers of model files on disk: safetensors and GGUF, read without trusting them.
