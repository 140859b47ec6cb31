//! Compiles the protocol definitions without `protoc`, and keeps the descriptor set of our own for
//! reflection.

use std::{env, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let own = ["lockstep/v1/inference.proto", "lockstep/v1/worker.proto"];
    let etcd = "etcd/etcd.proto";
    for file in own.iter().chain([&etcd]) {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(own, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?).join("descriptors.bin");
    fs::write(out, prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    let descriptors = protox::compile([etcd], ["."])?;
    tonic_prost_build::configure().build_server(false).compile_fds(descriptors)?;
    Ok(())
}
