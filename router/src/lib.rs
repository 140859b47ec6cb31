#![forbid(unsafe_code)]
//! The front of the cluster: gRPC and OpenAI HTTP in, worker streams out.
