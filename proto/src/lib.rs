#![forbid(unsafe_code)]
//! The wire: protocol buffers and gRPC stubs, generated at build time. No logic lives here.

/// Package `lockstep.v1`: the public service `Inference` and the internal service `Worker`.
#[allow(clippy::all)]
pub mod v1 {
    tonic::include_proto!("lockstep.v1");
}

/// Version of the service `Worker`: router and worker of different ones do not speak to each other.
pub const WORKER_PROTOCOL: u32 = 1;

/// A worker says something to each router that watches it at least this often, in milliseconds:
/// often enough to be missed soon, seldom enough that a router over a hundred idle workers rests.
pub const WORKER_BEAT_MS: u64 = 1200;

/// Prefixes that a worker tells each router of, at most.
pub const CACHED_PREFIXES_MAX: usize = 1 << 15;

/// What is used of etcd's v3 protocol, as a client.
#[allow(clippy::all)]
pub mod etcd {
    tonic::include_proto!("etcdserverpb");
}

/// Encoded `FileDescriptorSet` of our own protocols, for server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
