//! Compiles kernels for the host: the build script for the emulator, tests for kernels that they
//! have damaged.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command},
};

/// What a library is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variant {
    pub name: &'static str,
    /// Flags for everything.
    flags: &'static [&'static str],
    /// Flags for the kernels alone, and for the emulation alone.
    kernels: &'static [&'static str],
    emulation: &'static [&'static str],
}

/// Fast.
pub const PLAIN: Variant = Variant { name: "plain", flags: &["-O2"], kernels: &[], emulation: &[] };
/// Address faults end the process.
pub const ASAN: Variant = Variant {
    name: "asan",
    flags: &["-O1", "-fsanitize=address", "-fno-omit-frame-pointer"],
    kernels: &[],
    emulation: &[],
};
/// Races on shared memory are errors (`races.h`).
pub const RACES: Variant = Variant {
    name: "races",
    flags: &["-O1", "-DLOCKSTEP_RACES"],
    kernels: &["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"],
    emulation: &[],
};

/// Where things are.
pub struct Places<'a> {
    /// The C++ compiler.
    pub compiler: &'a Path,
    /// `kernels/emulate`.
    pub emulation: &'a Path,
    /// `kernels/cuda`, or a copy.
    pub kernels: &'a Path,
    /// Where objects and libraries go.
    pub out: &'a Path,
}

/// Compiles the kernel files that `wanted` names into a library, `jobs` at a time.
///
/// # Errors
/// Says which file the compiler refused; its own words went to the terminal.
pub fn library(
    places: &Places<'_>,
    variant: Variant,
    jobs: usize,
    wanted: &dyn Fn(&str) -> bool,
) -> Result<PathBuf, String> {
    let text = |error: std::io::Error| error.to_string();
    let dir = places.out.join(variant.name);
    fs::create_dir_all(&dir).map_err(text)?;
    let mut units = Vec::new();
    for path in files(places.emulation, "cpp")? {
        units.push((path, variant.emulation));
    }
    for path in files(places.kernels, "cu")? {
        let name = stem(&path);
        if wanted(&name) {
            let wrapper = dir.join(format!("{name}.kernel.cpp"));
            fs::write(&wrapper, wrapped(&path)).map_err(text)?;
            units.push((wrapper, variant.kernels));
        }
    }
    let mut objects = Vec::new();
    for group in units.chunks(jobs.max(1)) {
        let mut started: Vec<(&PathBuf, Child)> = Vec::new();
        for (source, flags) in group {
            let object = dir.join(stem(source)).with_extension("o");
            let mut command = compiler(places, variant);
            command.args(*flags).arg("-c").arg(source).arg("-o").arg(&object);
            started.push((source, command.spawn().map_err(text)?));
            objects.push(object);
        }
        for (source, mut child) in started {
            if !child.wait().map_err(text)?.success() {
                return Err(format!("the C++ compiler refused {}", source.display()));
            }
        }
    }
    let library = places.out.join(format!("lib{}.so", variant.name));
    let mut link = compiler(places, variant);
    link.arg("-shared").args(&objects).arg("-o").arg(&library);
    match link.status().map_err(text)?.success() {
        true => Ok(library),
        false => Err("the linker refused".into()),
    }
}

fn compiler(places: &Places<'_>, variant: Variant) -> Command {
    let mut command = Command::new(places.compiler);
    command
        .args(["-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden"])
        .args(["-Wall", "-Wextra", "-Wno-unknown-pragmas"])
        .arg("-DLOCKSTEP_EMULATE")
        .arg("-I")
        .arg(places.emulation)
        .arg("-I")
        .arg(places.kernels)
        .args(variant.flags);
    command
}

/// A kernel file in a namespace of its own: files may use the same names for different things.
fn wrapped(kernel: &Path) -> String {
    format!("#include \"common.cuh\"\nnamespace {{\n#include \"{}\"\n}}\n", kernel.display())
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

fn files(dir: &Path, extension: &str) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| error.to_string())?.path();
        if path.extension().is_some_and(|found| found == extension) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}
