//! With the feature `cuda`: compiles every kernel for every target into one fat binary, which the
//! crate embeds. Without it: nothing.

#[path = "build/toolchain.rs"]
mod toolchain;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return ExitCode::SUCCESS;
    }
    match compile() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            for line in error.lines() {
                println!("cargo::error={line}");
            }
            ExitCode::FAILURE
        }
    }
}

fn folder(variable: &str) -> Result<PathBuf, String> {
    env::var_os(variable).map(PathBuf::from).ok_or_else(|| format!("cargo did not set {variable}"))
}

fn compile() -> Result<(), String> {
    let (here, out) = (folder("CARGO_MANIFEST_DIR")?, folder("OUT_DIR")?);
    let workspace = here.ancestors().nth(2).ok_or("the crate is not in its workspace")?;
    let cuda = here.join("cu");
    println!("cargo::rerun-if-changed={}", cuda.display());
    println!("cargo::rerun-if-env-changed={}", toolchain::NVCC_VARIABLE);
    println!("cargo::rerun-if-env-changed=PATH");
    let nvcc = toolchain::nvcc(workspace)?;
    let source = out.join("all.cu");
    let text = toolchain::together(&cuda)?;
    fs::write(&source, text).map_err(|e| format!("{}: {e}", source.display()))?;
    let fatbin = out.join("kernels.fatbin");
    let mut command = Command::new(&nvcc);
    command.args(toolchain::FLAGS).args(toolchain::include(&cuda));
    for (arch, code) in toolchain::TARGETS {
        command.arg(format!("-gencode=arch={arch},code={code}"));
    }
    // What comes after the targets compiles the first one's PTX when it loads it.
    let (ptx, _) = toolchain::TARGETS[0];
    command.arg(format!("-gencode=arch={ptx},code={ptx}"));
    run(command.arg("-fatbin").arg("-o").arg(&fatbin).arg(&source))?;
    println!("cargo::rustc-env=LOCKSTEP_FATBIN={}", fatbin.display());
    println!("cargo::rustc-env=LOCKSTEP_NVCC_RELEASE={}", release(&nvcc)?);
    Ok(())
}

/// What the command printed; its complaints where it failed.
fn run(command: &mut Command) -> Result<String, String> {
    let done = command.output().map_err(|e| format!("{command:?} does not start: {e}"))?;
    let (out, errors) =
        (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    if done.status.success() {
        return Ok(out.into_owned());
    }
    Err(format!("{command:?} failed ({})\n{out}{errors}", done.status))
}

/// The CUDA release of the compiler as the driver counts: 13.0 is 13000.
fn release(nvcc: &Path) -> Result<u32, String> {
    let text = run(Command::new(nvcc).arg("--version"))?;
    let found = text.split("release ").nth(1).and_then(|rest| {
        let (major, rest) = rest.split_once('.')?;
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        Some(major.parse::<u32>().ok()? * 1000 + rest[..digits].parse::<u32>().ok()? * 10)
    });
    found.ok_or_else(|| format!("{} --version names no release: {text}", nvcc.display()))
}
