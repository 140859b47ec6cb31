//! `./dev` on machines that lack something: what is missing is named, with the command that brings
//! it. The machines are folders of links, so that nothing is installed.

use std::{
    env,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

/// What every system has.
const BASE: &[&str] =
    &["bash", "cut", "date", "df", "awk", "dirname", "head", "id", "sed", "sort", "uname"];

fn find(tool: &str) -> PathBuf {
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).map(|folder| folder.join(tool)).find(|at| at.exists());
    found.unwrap_or_else(|| panic!("{tool} is not on PATH"))
}

/// What `./dev ARGUMENT` says where it fails, on a machine that has also these tools; `=` in one
/// gives it another program: `apk=true`.
fn complaint(argument: &str, tools: &[&str]) -> String {
    let machine = TempDir::new().unwrap();
    for tool in BASE.iter().chain(tools) {
        let (name, program) = tool.split_once('=').unwrap_or((tool, tool));
        symlink(find(program), machine.path().join(name)).unwrap();
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut dev = Command::new(find("bash"));
    // Of the environment only what rustup needs to find its toolchain.
    dev.env_clear().env("PATH", machine.path()).env("CARGO_HOME", machine.path());
    for name in ["HOME", "RUSTUP_HOME", "RUSTUP_TOOLCHAIN"] {
        if let Some(value) = env::var_os(name) {
            dev.env(name, value);
        }
    }
    let output = dev.arg(root.join("dev")).arg(argument).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn without_rust_it_says_which_and_where_from() {
    let told = complaint("up", &[]);
    assert!(told.contains("cargo is not installed: get Rust 1."), "{told}");
    assert!(told.contains("https://rustup.rs"), "{told}");
}

#[test]
fn packages_are_called_what_the_system_calls_them() {
    let rust = ["cargo", "rustc"];
    for (manager, argument, command) in [
        ("apk=true", "build", "apk add gcc musl-dev\n"),
        ("apk=true", "test", "musl-dev python3 py3-pip g++ etcd etcd-ctl iproute2\n"),
        ("dnf=true", "build", "dnf install gcc glibc-devel\n"),
        ("dnf=true", "test", "glibc-devel python3 python3-pip gcc-c++ etcd iproute\n"),
        ("apt-get=false", "build", "apt-get install gcc libc6-dev\n"),
        ("apt-get=false", "check", "libc6-dev g++ python3 python3-venv\n"),
        (
            "apt-get=false",
            "test",
            "python3-pip python3-venv g++ etcd-server etcd-client iproute2\n",
        ),
        ("apt-get=false", "soak", "gcc libc6-dev etcd-server etcd-client iproute2\n"),
        ("true", "build", "macOS: xcode-select --install"),
    ] {
        let told = complaint(argument, &[&rust[..], &[manager][..]].concat()[..]);
        assert!(told.contains(command), "{manager} {argument}: {told}");
    }
}
