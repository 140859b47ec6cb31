//! Keeps the floors apart and the rooms small: who may depend on whom, where `unsafe` and tokio may
//! live, and how long files, functions and lines may grow. An exception is named with its reason.

use std::{
    fs,
    path::{Path, PathBuf},
};

use syn::{spanned::Spanned, visit::Visit};

const FILE_LINES_MAX: usize = 400;
const FUNCTION_LINES_MAX: usize = 70;
const ARGUMENTS_MAX: usize = 6;
const LINE_COLUMNS_MAX: usize = 100;

/// Crates and the workspace crates that each may use.
const FLOORS: &[(&str, &[&str])] = &[
    ("proto", &[]),
    ("formats", &[]),
    ("engine", &[]),
    ("kernels", &[]),
    ("kernels/cpu", &["kernels"]),
    ("kernels/cuda", &["kernels"]),
    ("kernels/emulate", &["cuda", "kernels"]),
    ("kernels/checks", &["cuda", "engine", "kernels", "model"]),
    ("collective", &["cuda", "kernels", "tls"]),
    ("model", &["collective", "engine", "formats", "kernels"]),
    ("text", &["engine", "formats"]),
    ("tls", &[]),
    ("cluster", &["proto", "tls"]),
    (
        "worker",
        &[
            "cluster",
            "collective",
            "cpu",
            "cuda",
            "engine",
            "formats",
            "kernels",
            "model",
            "proto",
            "tls",
        ],
    ),
    ("router", &["cluster", "engine", "proto", "text", "tls"]),
];

/// Crates that may use tokio; everything else is synchronous.
const ASYNC: &[&str] = &["cluster", "router", "worker", "cli", "tests"];

/// `path: what` — why it may exceed the guide.
const EXCEPTIONS: &[(&str, &str)] = &[];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ has a parent").to_path_buf()
}

fn crates() -> Vec<String> {
    let text = fs::read_to_string(root().join("Cargo.toml")).expect("workspace manifest");
    let manifest: toml::Table = text.parse().expect("workspace manifest parses");
    let members = manifest["workspace"]["members"].as_array().expect("members");
    members.iter().map(|member| member.as_str().expect("a path").to_string()).collect()
}

/// The crate's name: its folder's.
fn name_of(member: &str) -> String {
    member.rsplit('/').next().unwrap_or(member).to_owned()
}

fn dependencies(member: &str) -> Vec<String> {
    let text = fs::read_to_string(root().join(member).join("Cargo.toml")).expect("manifest");
    let manifest: toml::Table = text.parse().expect("manifest parses");
    match manifest.get("dependencies").and_then(toml::Value::as_table) {
        Some(table) => table.keys().cloned().collect(),
        None => Vec::new(),
    }
}

fn sources(dir: &Path, extensions: &[&str], found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        let hidden = entry.file_name().to_string_lossy().starts_with('.');
        let extension = path.extension().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() && !hidden {
            sources(&path, extensions, found);
        } else if extensions.contains(&extension.as_str()) {
            found.push(path);
        }
    }
}

/// Paths from the root, and what the files say.
fn read(paths: &[PathBuf]) -> Vec<(String, String)> {
    let name = |path: &Path| path.strip_prefix(root()).expect("in the root").display().to_string();
    paths.iter().map(|path| (name(path), fs::read_to_string(path).expect("readable"))).collect()
}

/// Kernels, their emulation, and scripts: every file of theirs but what is built or fetched.
fn other_sources() -> Vec<(String, String)> {
    let mut found = vec![root().join("dev"), root().join(".ci/run"), root().join(".ci/bare")];
    let entries = fs::read_dir(root()).expect("the root");
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            sources(&path, &["cu", "cuh", "c", "cpp", "h", "py", "sh"], &mut found);
        }
    }
    assert!(found.len() > 30, "the source walk found only {} files", found.len());
    read(&found)
}

/// Crates that may hold `unsafe`: the kernels, and the device in software that tests them.
const UNSAFE: &[&str] = &["kernels/cpu", "kernels/cuda", "kernels/emulate"];

/// Every Rust file of the workspace, with its path from the root.
fn all_sources() -> Vec<(String, String)> {
    let mut found = Vec::new();
    for member in crates() {
        for room in ["src", "tests", "benches", "build", "build.rs"] {
            let path = root().join(&member).join(room);
            if path.is_file() {
                found.push(path);
            } else {
                sources(&path, &["rs"], &mut found);
            }
        }
    }
    assert!(found.len() > 20, "the source walk found only {} files", found.len());
    read(&found)
}

fn excepted(what: &str) -> bool {
    EXCEPTIONS.iter().any(|(name, _)| *name == what)
}

#[test]
fn floors_know_only_what_is_below_them() {
    let members: Vec<String> = crates().iter().map(|member| name_of(member)).collect();
    for (floor, allowed) in FLOORS {
        for used in dependencies(floor) {
            let inside = members.contains(&used);
            assert!(!inside || allowed.contains(&used.as_str()), "{floor} may not use {used}");
        }
    }
}

#[test]
fn tokio_stays_upstairs() {
    for member in crates() {
        if !ASYNC.contains(&member.as_str()) {
            assert!(!dependencies(&member).contains(&"tokio".to_string()), "{member} uses tokio");
        }
    }
}

#[test]
fn unsafe_lives_in_kernels_and_their_emulation_alone() {
    for member in crates().iter().filter(|member| !UNSAFE.contains(&member.as_str())) {
        let bins = ["src/gpu_check/main.rs", "src/requantise/main.rs"];
        for file in ["src/lib.rs", "src/main.rs"].into_iter().chain(bins) {
            if let Ok(text) = fs::read_to_string(root().join(member).join(file)) {
                assert!(text.contains("#![forbid(unsafe_code)]"), "{member}/{file}");
            }
        }
    }
}

/// Collects functions that are too long or take too much, tests aside.
struct Functions {
    file: String,
    faults: Vec<String>,
}

impl Functions {
    fn check(&mut self, signature: &syn::Signature, lines: usize) {
        let what = format!("{}: {}", self.file, signature.ident);
        if excepted(&what) {
            return;
        }
        if lines > FUNCTION_LINES_MAX {
            self.faults.push(format!("{what} has {lines} lines"));
        }
        let arguments = signature.inputs.iter().filter(|i| matches!(i, syn::FnArg::Typed(_)));
        let arguments = arguments.count();
        if arguments > ARGUMENTS_MAX {
            self.faults.push(format!("{what} takes {arguments} arguments"));
        }
    }
}

fn lines_of(node: &impl Spanned) -> usize {
    node.span().end().line - node.span().start().line + 1
}

fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute.meta.require_list().is_ok_and(|list| list.tokens.to_string() == "test")
    })
}

impl<'ast> Visit<'ast> for Functions {
    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        if !is_test(&module.attrs) {
            syn::visit::visit_item_mod(self, module);
        }
    }

    fn visit_item_fn(&mut self, function: &'ast syn::ItemFn) {
        self.check(&function.sig, lines_of(function));
        syn::visit::visit_item_fn(self, function);
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        self.check(&function.sig, lines_of(function));
        syn::visit::visit_impl_item_fn(self, function);
    }
}

/// Lines before the file's test module.
fn lines_without_tests(text: &str) -> usize {
    text.lines().take_while(|line| *line != "#[cfg(test)]").count()
}

/// Lines that are wider than the guide says.
fn wide_lines(file: &str, text: &str) -> Vec<String> {
    let lines = text.lines().map(|line| line.chars().count()).zip(1..);
    let wide = lines.filter(|(columns, _)| *columns > LINE_COLUMNS_MAX && !excepted(file));
    wide.map(|(columns, number)| format!("{file}:{number} is {columns} wide")).collect()
}

/// Functions of C++ and of shell scripts that are too long: they begin where a line, or several
/// that are one, ends in a brace, and end in a line with a brace at the same depth.
fn long_functions(file: &str, text: &str) -> Vec<String> {
    let lines: Vec<&str> = text.lines().collect();
    let depth = |at: usize| lines[at].len() - lines[at].trim_start().len();
    let goes_on = |at: usize| {
        let line = lines[at].trim();
        !line.is_empty()
            && !line.starts_with(['#', '/'])
            && !line.ends_with([';', '{', '}', ':', '>'])
    };
    let mut faults = Vec::new();
    let mut begun: Vec<usize> = Vec::new();
    for (at, line) in lines.iter().map(|line| line.trim()).enumerate() {
        if line.starts_with('}') && begun.last().is_some_and(|first| depth(*first) == depth(at)) {
            let first = begun.pop().expect("seen");
            let (what, lines) = (format!("{file}: {}", lines[first].trim()), at - first + 1);
            if lines > FUNCTION_LINES_MAX && !excepted(&what) {
                faults.push(format!("{what} has {lines} lines"));
            }
        }
        if !line.ends_with('{') || line.starts_with('}') {
            continue;
        }
        let first = (0..at).rev().take_while(|&before| goes_on(before)).last().unwrap_or(at);
        let data = ["struct ", "class ", "namespace ", "extern \"C\" {"];
        let takes = lines[first..=at].iter().any(|line| line.contains('('));
        if takes && !data.iter().any(|word| lines[first].trim().starts_with(word)) {
            begun.push(first);
        }
    }
    faults
}

#[test]
fn other_languages_keep_to_the_size_guide_too() {
    let mut faults = Vec::new();
    for (file, text) in other_sources() {
        let lines = text.lines().count();
        if lines > FILE_LINES_MAX && !excepted(&file) {
            faults.push(format!("{file} has {lines} lines"));
        }
        faults.append(&mut wide_lines(&file, &text));
        if !file.ends_with(".py") {
            faults.append(&mut long_functions(&file, &text));
        }
    }
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}

#[test]
fn the_size_guide_sees_wide_lines_and_long_functions() {
    let body = "    x += 1;\n".repeat(FUNCTION_LINES_MAX - 1);
    let start = "int of(int x,\n       int y) {";
    let text = format!("struct S {{\n{start}\n{body}}}\n}};\nf() {{\n}}\n");
    assert_eq!(long_functions("a.cpp", &text), ["a.cpp: int of(int x, has 72 lines"]);
    assert!(long_functions("a.cpp", &text.replacen("    x += 1;\n", "", 2)).is_empty());
    assert_eq!(wide_lines("a.cpp", &format!("é\n{}", "é".repeat(101))), ["a.cpp:2 is 101 wide"]);
}

#[test]
fn files_and_functions_keep_to_the_size_guide() {
    let mut faults = Vec::new();
    for (file, text) in all_sources() {
        let lines = lines_without_tests(&text);
        let tests = file.contains("/tests/") || file.ends_with("tests.rs");
        if lines > FILE_LINES_MAX && !tests && !excepted(&file) {
            faults.push(format!("{file} has {lines} lines"));
        }
        faults.append(&mut wide_lines(&file, &text));
        if !tests {
            let parsed = syn::parse_file(&text).unwrap_or_else(|error| panic!("{file}: {error}"));
            let mut functions = Functions { file, faults: Vec::new() };
            functions.visit_file(&parsed);
            faults.append(&mut functions.faults);
        }
    }
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}

#[test]
fn every_file_says_what_it_is() {
    for (file, text) in all_sources() {
        let start = text.trim_start().trim_start_matches("#![forbid(unsafe_code)]").trim_start();
        assert!(start.starts_with("//!"), "{file} has no header");
    }
}
