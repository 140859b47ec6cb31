//! Tells the crate which C++ compiler there is and where it may keep what it compiles.

use std::{env, path::PathBuf};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let compiler = cc::Build::new().cpp(true).get_compiler();
    println!("cargo::rustc-env=EMULATION_COMPILER={}", compiler.path().display());
    // OUT_DIR is <profile>/build/<crate>/out.
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let profile = out.ancestors().nth(3).expect("a folder of the profile");
    println!("cargo::rustc-env=EMULATION_CACHE={}", profile.join("emulated").display());
}
