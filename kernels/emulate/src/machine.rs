//! A machine with CUDA cards, for whole processes: `libcuda.so.1`, `libcublasLt.so.13` and
//! `libnccl.so.2` in host memory, compiled on first use, whose kernels run in the emulation. What
//! runs on it is the real driver code of the product, and nothing of the product knows.

use crate::compile::{self, COMPILER, PLAIN, digest, here, text};
use std::{
    env,
    ffi::OsString,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
};

/// What a process needs in its environment to find `cards` cards, each with 4 GiB of its own in
/// every process that opens it: `Command::envs(machine(4))`.
///
/// More variables, each left out for a machine that behaves:
/// - `FAKE_MEMORY_MIB`, `FAKE_MAJOR` (compute capability), `FAKE_VERSION` (of the driver, 13000);
/// - `FAKE_NO_PEERS=1`: no card reaches another's memory;
/// - `FAKE_HANG`, `FAKE_FAULT` and `FAKE_STUCK`: the name of a kernel that never ends, or ends with
///   a fault, or whose launch never returns;
/// - `FAKE_ALGORITHMS=exact`: cuBLASLt's algorithms fit no other number of rows than they were
///   chosen for;
/// - `FAKE_REFUSES`: with commas between, what cuBLASLt has no algorithm for: `bias`, `scales`,
///   `fp8`, `rows:5`; `FAKE_CANDIDATES`: how many algorithms it knows, 1;
/// - `FAKE_NCCL`: with commas between, how NCCL misbehaves: `init-hangs`, `init-fails`,
///   `call-hangs`, `abort-hangs`, `abort-fails`, `fails-after:5` (calls), `version:21705`.
///
/// # Panics
/// Where the C++ compiler is missing or refuses the sources: there is nothing to test with.
pub fn machine(cards: usize) -> Vec<(&'static str, OsString)> {
    let folder = libraries().unwrap_or_else(|error| panic!("{error}; is g++ installed?"));
    vec![
        ("LD_LIBRARY_PATH", folder.into()),
        ("LOCKSTEP_FAKE_KERNELS", compile::library(PLAIN).into()),
        ("FAKE_DEVICES", cards.to_string().into()),
    ]
}

/// Runs `body`, which is all of the test called `test`, in a process of its own on a machine of
/// `cards` cards, with `settings` in its environment.
///
/// # Panics
/// Where the body does, and as [`machine`].
pub fn on_machine(test: &str, cards: usize, settings: &[(&str, &str)], body: impl FnOnce()) {
    /// Set for the process that runs there.
    const THERE: &str = "LOCKSTEP_ON_THE_FAKE_MACHINE";
    if env::var_os(THERE).is_some() {
        return body();
    }
    let done = Command::new(env::current_exe().expect("the test's own path"))
        .args(["--exact", test, "--nocapture", "--include-ignored"])
        .envs(machine(cards))
        .envs(settings.iter().copied())
        .env(THERE, "1")
        .output()
        .expect("the test runs again");
    let out = String::from_utf8_lossy(&done.stdout);
    let errors = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success() && out.contains("1 passed"), "{errors}{out}");
}

const SOURCES: [&str; 6] =
    ["machine.h", "mapping.h", "libcuda.cpp", "libcublasLt.cpp", "nccl_shared.h", "libnccl.cpp"];

/// The folder of the libraries, named after what they are made of.
fn libraries() -> Result<PathBuf, String> {
    // Threads of one process wait here; processes wait for the file's lock.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock();
    let sources = here().join("machine");
    let read = |name: &&str| fs::read(sources.join(name)).map_err(|e| format!("{name}: {e}"));
    let contents = SOURCES.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    let cache = Path::new(env!("EMULATION_CACHE"));
    fs::create_dir_all(cache).map_err(text)?;
    let lock = File::create(cache.join("machine.lock")).map_err(text)?;
    lock.lock().map_err(text)?;
    let folder = cache.join(format!("machine-{:016x}", digest(&(contents, COMPILER))));
    let driver = "libcuda.so.1";
    build(&sources.join("libcuda.cpp"), &folder, driver, &[])?;
    let needs = ["-L".into(), folder.display().to_string(), format!("-l:{driver}")];
    build(&sources.join("libcublasLt.cpp"), &folder, "libcublasLt.so.13", &needs)?;
    build(&sources.join("libnccl.cpp"), &folder, "libnccl.so.2", &needs)?;
    Ok(folder)
}

/// Compiles one library, unless it is there.
fn build(source: &Path, folder: &Path, name: &str, needs: &[String]) -> Result<(), String> {
    let library = folder.join(name);
    if library.exists() {
        return Ok(());
    }
    fs::create_dir_all(folder).map_err(text)?;
    let part = library.with_extension("part");
    let mut command = Command::new(COMPILER);
    command.args(["-std=c++17", "-O2", "-g1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]);
    command.args(["-fvisibility=hidden", "-pthread", "-ldl"]).arg(format!("-Wl,-soname,{name}"));
    command.arg(source).args(needs).arg("-o").arg(&part);
    if !command.status().map_err(text)?.success() {
        return Err(format!("the C++ compiler refused {}", source.display()));
    }
    fs::rename(part, &library).map_err(text)
}
