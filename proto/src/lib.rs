#![forbid(unsafe_code)]
//! The wire: protocol buffers and gRPC stubs, generated at build time. No logic lives here.

/// Package `lockstep.v1`: the public service `Inference` and the internal service `Worker`.
#[allow(clippy::all)]
pub mod v1 {
    tonic::include_proto!("lockstep.v1");
}

/// Encoded `FileDescriptorSet` of every protocol here, for server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
