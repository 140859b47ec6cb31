//! Compiles every kernel for the host in each variant, and tells the crate where the libraries are.

use std::{env, path::PathBuf, process::Command};

#[path = "src/compile.rs"]
mod compile;

fn main() {
    let emulation = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let kernels = emulation.parent().expect("kernels/").join("cuda/cu");
    for path in [&kernels, &emulation] {
        println!("cargo::rerun-if-changed={}", path.display());
    }
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
    let compiler = cc::Build::new().cpp(true).get_compiler();
    let compiler = compiler.path();
    println!("cargo::rustc-env=EMULATION_COMPILER={}", compiler.display());
    let places = compile::Places { compiler, emulation: &emulation, kernels: &kernels, out: &out };
    for variant in [compile::PLAIN, compile::ASAN, compile::RACES] {
        let library = compile::library(&places, variant, jobs, &|_| true);
        let library = library.unwrap_or_else(|error| panic!("{error}; is g++ installed?"));
        let name = variant.name.to_uppercase();
        println!("cargo::rustc-env=EMULATED_{name}={}", library.display());
    }
    let found = Command::new(compiler).arg("-print-file-name=libasan.so").output();
    let asan = String::from_utf8(found.expect("the compiler runs").stdout).expect("a path");
    println!("cargo::rustc-env=LIBASAN={}", asan.trim());
}
