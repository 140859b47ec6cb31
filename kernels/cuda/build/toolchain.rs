//! Finds the CUDA compiler, and says what it compiles for. Shared by the build script and by the
//! tests of what it makes.

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

/// Names the compiler where it is neither on PATH nor in the private toolchain.
pub const NVCC_VARIABLE: &str = "LOCKSTEP_NVCC";

/// What is to be done where there is no compiler.
pub const REMEDY: &str = "nvcc was not found: run `./dev cuda-toolchain`, which fetches one into \
                          .cache/cuda-toolchain, or name one in LOCKSTEP_NVCC, or put one on PATH";

/// Virtual and real architectures that there is machine code for.
pub const TARGETS: [(&str, &str); 2] = [("compute_80", "sm_80"), ("compute_90a", "sm_90a")];

/// How every kernel is compiled.
pub const FLAGS: [&str; 5] =
    ["-std=c++17", "-O3", "--threads=0", "-lineinfo", "-Xcompiler=-Wall,-Wextra"];

/// The compiler: as `LOCKSTEP_NVCC` says, else on PATH, else in the private toolchain.
pub fn nvcc(workspace: &Path) -> Result<PathBuf, String> {
    if let Some(named) = env::var_os(NVCC_VARIABLE) {
        let path = PathBuf::from(named);
        let missing = || format!("{NVCC_VARIABLE} names {}, which is no file", path.display());
        return if path.is_file() { Ok(path) } else { Err(missing()) };
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let places = env::split_paths(&path).chain(private(workspace));
    let found = places.map(|place| place.join("nvcc")).find(|nvcc| nvcc.is_file());
    found.ok_or_else(|| REMEDY.to_owned())
}

/// Folders of programs in `.cache/cuda-toolchain`, a Python environment of whatever version.
fn private(workspace: &Path) -> Vec<PathBuf> {
    let lib = workspace.join(".cache/cuda-toolchain/lib");
    let entries = fs::read_dir(lib).into_iter().flatten().flatten();
    let pythons = entries.map(|entry| entry.path());
    pythons.map(|python| python.join("site-packages/nvidia/cu13/bin")).collect()
}

/// Names of the files in `folder` that end in `ending`, in order.
fn files(folder: &Path, ending: &str) -> Result<Vec<String>, String> {
    let entries = fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let mut found: Vec<String> = names.filter(|name| name.ends_with(ending)).collect();
    found.sort();
    Ok(found)
}

/// One source of all kernels in `folder`, each file in a namespace of its own: they may use the
/// same names for different things. Kernels keep theirs; headers belong to all.
pub fn together(folder: &Path) -> Result<String, String> {
    let headers = files(folder, ".cuh")?;
    let mut text: String = headers.iter().map(|name| format!("#include \"{name}\"\n")).collect();
    for kernel in files(folder, ".cu")? {
        let name = kernel.trim_end_matches(".cu");
        text += &format!("namespace {name}_cu {{\n#include \"{kernel}\"\n}}\n");
    }
    Ok(text)
}

/// `-I` and the folder, for sources that lie elsewhere.
pub fn include(folder: &Path) -> [OsString; 2] {
    ["-I".into(), folder.into()]
}
