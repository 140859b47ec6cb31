//! Tells the binary its version: the package's, the commit that it was built from, and its devices.

use std::{env, path::Path, process::Command};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let package = env::var("CARGO_PKG_VERSION").expect("cargo sets it");
    let folder = env::var("CARGO_MANIFEST_DIR").expect("cargo sets it");
    let devices = if env::var_os("CARGO_FEATURE_CUDA").is_some() { "cpu, cuda" } else { "cpu" };
    let root = Path::new(&folder).parent().expect("the workspace's");
    let commit = commit(root).unwrap_or_else(|| "unknown".to_owned());
    println!("cargo:rustc-env=LOCKSTEP_VERSION={package} ({commit}, {devices})");
}

/// The commit of the git checkout whose root this is, where git is installed.
fn commit(root: &Path) -> Option<String> {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").current_dir(root).args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    // Unpacked inside somebody else's checkout, git would tell of theirs.
    let top = git(&["rev-parse", "--show-toplevel"])?;
    if Path::new(&top).canonicalize().ok()? != root.canonicalize().ok()? {
        return None;
    }
    // Grows whenever HEAD moves. Without it: HEAD, and the branch that HEAD names.
    let branch = git(&["rev-parse", "--symbolic-full-name", "HEAD"])?;
    let watched = [&["logs/HEAD"][..], &["HEAD", "packed-refs", &branch]];
    for names in watched {
        let mut found = false;
        for name in names {
            let path = root.join(git(&["rev-parse", "--git-path", name])?);
            // Cargo takes an absent file for one that always changes.
            if path.is_file() {
                println!("cargo:rerun-if-changed={}", path.display());
                found = true;
            }
        }
        if found {
            break;
        }
    }
    git(&["rev-parse", "--short=12", "HEAD"])
}
