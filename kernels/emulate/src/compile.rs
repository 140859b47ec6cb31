//! Compiles kernels for the host, on first use: an object is named after everything that it is made
//! of, so that after an edit only what it touches is compiled again, and only in the variants that
//! some test asks for.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::Mutex,
    thread,
};

/// What a library is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Variant {
    pub name: &'static str,
    /// Flags for everything.
    flags: &'static [&'static str],
    /// Flags for the kernels alone.
    kernels: &'static [&'static str],
}

/// Fast.
pub const PLAIN: Variant = Variant { name: "plain", flags: &["-O2"], kernels: &[] };
/// Address faults end the process, which must have [`libasan`] preloaded.
pub const ASAN: Variant = Variant {
    name: "asan",
    flags: &["-O1", "-fsanitize=address", "-fno-omit-frame-pointer"],
    kernels: &[],
};
/// Races on shared memory are errors (`races.h`).
pub const RACES: Variant = Variant {
    name: "races",
    flags: &["-O1", "-DLOCKSTEP_RACES"],
    kernels: &["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"],
};

const FLAGS: [&str; 8] = [
    "-std=c++17",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-DLOCKSTEP_EMULATE",
];
pub(crate) const COMPILER: &str = env!("EMULATION_COMPILER");

/// Where things are.
pub struct Places<'a> {
    /// `kernels/cuda/cu`, or a copy.
    pub kernels: &'a Path,
    /// Where objects and libraries go.
    pub out: &'a Path,
}

/// All kernels as they stand, in one library.
///
/// # Panics
/// Where the C++ compiler is missing or refuses them: there is nothing to test with.
pub fn library(variant: Variant) -> PathBuf {
    // Threads of one process wait here; processes wait for the file's lock.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock();
    let kernels = here().with_file_name("cuda").join("cu");
    let places = Places { kernels: &kernels, out: Path::new(env!("EMULATION_CACHE")) };
    let library = compile(&places, variant, &|_| true);
    library.unwrap_or_else(|error| panic!("{error}; is g++ installed?"))
}

/// AddressSanitizer's run-time library.
///
/// # Panics
/// Where there is no C++ compiler.
pub fn libasan() -> String {
    let found = Command::new(COMPILER).arg("-print-file-name=libasan.so").output();
    let path = String::from_utf8(found.expect("the C++ compiler runs").stdout);
    path.expect("a path").trim().to_owned()
}

/// Compiles the kernel files that `wanted` names into a library.
///
/// # Errors
/// Says which file the compiler refused; its own words went to the terminal.
pub fn compile(
    places: &Places<'_>,
    variant: Variant,
    wanted: &dyn Fn(&str) -> bool,
) -> Result<PathBuf, String> {
    let dir = places.out.join(variant.name);
    fs::create_dir_all(&dir).map_err(text)?;
    let lock = File::create(dir.join("lock")).map_err(text)?;
    lock.lock().map_err(text)?;
    let units = units(places, variant, &dir, wanted)?;
    let missing: Vec<&Unit> = units.iter().filter(|unit| !unit.object.exists()).collect();
    let jobs = thread::available_parallelism().map_or(1, usize::from);
    for group in missing.chunks(jobs) {
        let start = |unit: &&Unit| Ok((unit.part(), unit.compiler(places, variant).spawn()?));
        let started: std::io::Result<Vec<(PathBuf, Child)>> = group.iter().map(start).collect();
        for (unit, (part, mut child)) in group.iter().zip(started.map_err(text)?) {
            if !child.wait().map_err(text)?.success() {
                return Err(format!("the C++ compiler refused {}", unit.source.display()));
            }
            fs::rename(part, &unit.object).map_err(text)?;
        }
    }
    let objects: Vec<&PathBuf> = units.iter().map(|unit| &unit.object).collect();
    let library = dir.join(format!("{:016x}.so", digest(&objects)));
    if !library.exists() {
        let part = library.with_extension("part");
        let mut link = compiler(places, variant);
        link.arg("-shared").args(&objects).arg("-o").arg(&part);
        if !link.status().map_err(text)?.success() {
            return Err("the linker refused".into());
        }
        fs::rename(part, &library).map_err(text)?;
        let sources = units.iter().map(|unit| &unit.source);
        forget(&dir, objects.into_iter().chain(sources).chain([&library]))?;
    }
    Ok(library)
}

/// What is compiled at once.
struct Unit {
    source: PathBuf,
    flags: &'static [&'static str],
    object: PathBuf,
}

impl Unit {
    /// What the compiler writes; it becomes the object once it is whole.
    fn part(&self) -> PathBuf {
        self.object.with_extension("part")
    }

    fn compiler(&self, places: &Places<'_>, variant: Variant) -> Command {
        let mut command = compiler(places, variant);
        command.args(self.flags).arg("-c").arg(&self.source).arg("-o").arg(self.part());
        command
    }
}

/// The emulation and the wanted kernels, each with the name of its object.
fn units(
    places: &Places<'_>,
    variant: Variant,
    dir: &Path,
    wanted: &dyn Fn(&str) -> bool,
) -> Result<Vec<Unit>, String> {
    let read = |path: &PathBuf| fs::read(path).map_err(|e| format!("{}: {e}", path.display()));
    let headers = [files(places.kernels, "cuh")?, files(here(), "h")?].concat();
    let headers = headers.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    let common = digest(&(headers, COMPILER, FLAGS, variant, places.kernels));
    let object = |source: &PathBuf, stem: &str| {
        let name = format!("{stem}-{:016x}.o", digest(&(common, read(source)?)));
        Ok::<_, String>(dir.join(name))
    };
    let mut units = Vec::new();
    for source in files(here(), "cpp")? {
        units.push(Unit { object: object(&source, &stem(&source))?, source, flags: &[] });
    }
    for kernel in files(places.kernels, "cu")? {
        let name = stem(&kernel);
        if wanted(&name) {
            let object = object(&kernel, &name)?;
            let source = object.with_extension("kernel.cpp");
            fs::write(&source, wrapped(&kernel)).map_err(text)?;
            units.push(Unit { source, flags: variant.kernels, object });
        }
    }
    Ok(units)
}

/// Removes what `kept` does not name: what was made of sources as they once were.
fn forget<'a>(dir: &Path, kept: impl Iterator<Item = &'a PathBuf>) -> Result<(), String> {
    let kept: BTreeSet<&Path> = kept.map(PathBuf::as_path).collect();
    let old = [files(dir, "o")?, files(dir, "so")?, files(dir, "cpp")?].concat();
    for path in old.iter().filter(|path| !kept.contains(path.as_path())) {
        fs::remove_file(path).map_err(text)?;
    }
    Ok(())
}

fn compiler(places: &Places<'_>, variant: Variant) -> Command {
    let mut command = Command::new(COMPILER);
    // A process under AddressSanitizer has it preloaded; compilers do not run with it.
    command.env_remove("LD_PRELOAD");
    command.args(FLAGS).args(variant.flags);
    command.arg("-I").arg(here()).arg("-I").arg(places.kernels);
    command
}

/// `kernels/emulate`.
pub(crate) fn here() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A kernel file in a namespace of its own: files may use the same names for different things.
fn wrapped(kernel: &Path) -> String {
    format!("#include \"common.cuh\"\nnamespace {{\n#include \"{}\"\n}}\n", kernel.display())
}

pub(crate) fn digest(of: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

fn files(dir: &Path, extension: &str) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(text)?.path();
        if path.extension().is_some_and(|found| found == extension) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

pub(crate) fn text(error: std::io::Error) -> String {
    error.to_string()
}
