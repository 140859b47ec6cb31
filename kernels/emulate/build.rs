//! Compiles every kernel for the host, once plainly and once under AddressSanitizer, each into a
//! shared library that the emulator loads.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Name of the library, and what it is compiled with.
const VARIANTS: [(&str, &[&str]); 2] =
    [("plain", &["-O2"]), ("asan", &["-O1", "-fsanitize=address", "-fno-omit-frame-pointer"])];

fn main() {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let cuda = here.parent().expect("kernels/").join("cuda");
    for path in [&cuda, &here.join("simt.h"), &here.join("simt.cpp")] {
        println!("cargo::rerun-if-changed={}", path.display());
    }
    let mut sources = vec![here.join("simt.cpp")];
    let mut kernels: Vec<PathBuf> = fs::read_dir(&cuda)
        .expect("kernels/cuda is readable")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    kernels.sort();
    for kernel in &kernels {
        sources.push(wrapped(kernel, &out));
    }
    let compiler = cc::Build::new().cpp(true).get_compiler();
    for (name, flags) in VARIANTS {
        let command = || {
            let mut command = Command::new(compiler.path());
            command.args([
                "-std=c++17",
                "-g1",
                "-fPIC",
                "-Wall",
                "-Wextra",
                "-Wno-unknown-pragmas",
            ]);
            command.args(["-DLOCKSTEP_EMULATE", "-I"]).arg(&here).arg("-I").arg(&cuda).args(flags);
            command
        };
        let dir = out.join(name);
        fs::create_dir_all(&dir).expect("OUT_DIR is writable");
        let objects = compile(&sources, &dir, &command);
        let library = out.join(format!("lib{name}.so"));
        succeed(command().arg("-shared").args(&objects).arg("-o").arg(&library));
        println!("cargo::rustc-env=EMULATED_{}={}", name.to_uppercase(), library.display());
    }
    let found = Command::new(compiler.path()).arg("-print-file-name=libasan.so").output();
    let asan = String::from_utf8(found.expect("the compiler runs").stdout).expect("a path");
    println!("cargo::rustc-env=LIBASAN={}", asan.trim());
}

/// A kernel file in a namespace of its own: files may use the same names for different things.
fn wrapped(kernel: &Path, out: &Path) -> PathBuf {
    let name = kernel.file_stem().expect("a name").to_string_lossy();
    let path = out.join(format!("{name}.cpp"));
    let text =
        format!("#include \"common.cuh\"\nnamespace {{\n#include \"{}\"\n}}\n", kernel.display());
    fs::write(&path, text).expect("OUT_DIR is writable");
    path
}

/// Objects of all sources, as many compilers at a time as cargo allows.
fn compile(sources: &[PathBuf], dir: &Path, command: &dyn Fn() -> Command) -> Vec<PathBuf> {
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1usize);
    let mut objects = Vec::new();
    for group in sources.chunks(jobs.max(1)) {
        let started: Vec<_> = group
            .iter()
            .map(|source| {
                let object = dir.join(source.file_stem().expect("a name")).with_extension("o");
                let mut command = command();
                command.arg("-c").arg(source).arg("-o").arg(&object);
                objects.push(object);
                command.spawn().expect("the C++ compiler runs; is g++ installed?")
            })
            .collect();
        for mut child in started {
            assert!(child.wait().expect("the compiler ends").success(), "the compiler refused");
        }
    }
    objects
}

fn succeed(command: &mut Command) {
    let status = command.status().expect("the C++ compiler runs; is g++ installed?");
    assert!(status.success(), "{command:?} failed");
}
