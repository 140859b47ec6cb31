//! The checks in a process of their own, plainly and under compute-sanitizer's tools.

use serde_json::Value;
use std::{
    env,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

const TOOLS: [&str; 3] = ["memcheck", "racecheck", "synccheck"];
/// What compute-sanitizer ends with where it has found something.
const FOUND: i32 = 9;
/// Beyond its own limit, for the check that runs when it passes.
const GRACE: Duration = Duration::from_secs(90);
/// Seconds that a piece of work may take under a sanitizer.
const PATIENCE: &str = "600";

/// The name of each check that ran, and what was wrong.
pub type Checks = Vec<(String, Option<String>)>;

/// Every check, within so many seconds.
pub fn plain(device: usize, seconds: u64) -> Result<Checks, String> {
    let this = env::current_exe().map_err(|error| error.to_string())?;
    let mut command = Command::new(this);
    let command = arguments(&mut command, device, seconds).arg("--long");
    let (status, output) = run(command, seconds)?;
    let mut checks = read(&output);
    if !status.success() && checks.iter().all(|(_, error)| error.is_none()) {
        checks.push(("all".into(), Some(format!("the process of the checks ended ({status})"))));
    }
    Ok(checks)
}

/// Every tool, within so many seconds each.
pub fn all(device: usize, seconds: u64) -> Vec<(String, Result<String, String>)> {
    let program = find();
    let one = |tool: &str| -> Result<String, String> {
        let program = program.as_ref().ok_or(
            "compute-sanitizer is not installed: put it on PATH or name its toolkit in CUDA_HOME",
        )?;
        let this = env::current_exe().map_err(|error| error.to_string())?;
        let mut command = Command::new(program);
        let code = FOUND.to_string();
        command.args(["--tool", tool, "--error-exitcode", &code, "--print-limit", "20"]).arg(this);
        let (status, output) = run(arguments(&mut command, device, seconds), seconds)?;
        let checks = read(&output);
        let wrong: Vec<&str> = checks
            .iter()
            .filter(|(_, error)| error.is_some())
            .map(|(name, _)| name.as_str())
            .collect();
        if status.success() && !checks.is_empty() {
            return Ok(format!("{} checks", checks.len()));
        }
        let said = output.iter().filter(|line| line.starts_with("=====")).take(8);
        let said: Vec<&str> = said.map(|line| line.trim_start_matches('=').trim()).collect();
        let wrong = wrong.join(", ");
        Err(format!("{status}; checks that failed: {wrong}; {}", said.join(" / ")))
    };
    TOOLS.iter().map(|tool| ((*tool).to_owned(), one(tool))).collect()
}

fn arguments(command: &mut Command, device: usize, seconds: u64) -> &mut Command {
    let (device, seconds) = (device.to_string(), seconds.to_string());
    let limits = ["--within", &seconds, "--patience", PATIENCE];
    command.args(["checks", "--device", &device]).args(limits)
}

/// On PATH, or in the toolkit that CUDA_HOME names, or where toolkits are installed.
fn find() -> Option<PathBuf> {
    let mut folders: Vec<PathBuf> =
        env::split_paths(&env::var_os("PATH").unwrap_or_default()).collect();
    let homes = [env::var_os("CUDA_HOME").map(PathBuf::from), Some("/usr/local/cuda".into())];
    for home in homes.into_iter().flatten() {
        folders.extend([home.join("bin"), home.join("compute-sanitizer")]);
    }
    let programs = folders.into_iter().map(|folder| folder.join("compute-sanitizer"));
    programs.into_iter().find(|program| program.is_file())
}

/// Runs to the end or to the limit; the lines of its output.
fn run(command: &mut Command, seconds: u64) -> Result<(ExitStatus, Vec<String>), String> {
    let spawned = command.stdout(Stdio::piped()).stdin(Stdio::null()).spawn();
    let mut child = spawned.map_err(|error| format!("{command:?} does not start: {error}"))?;
    let output = child.stdout.take().ok_or("a pipe was asked for")?;
    let lines = thread::spawn(move || {
        BufReader::new(output).lines().map_while(Result::ok).collect::<Vec<String>>()
    });
    let status = wait(&mut child, Duration::from_secs(seconds) + GRACE)?;
    let lines = lines.join().map_err(|_| "the output could not be read")?;
    Ok((status, lines))
}

/// Ends it at the limit.
fn wait(child: &mut Child, limit: Duration) -> Result<ExitStatus, String> {
    let start = Instant::now();
    while start.elapsed() < limit {
        if let Some(status) = child.try_wait().map_err(|error| error.to_string())? {
            return Ok(status);
        }
        thread::sleep(Duration::from_millis(50));
    }
    child.kill().map_err(|error| error.to_string())?;
    child.wait().map_err(|error| error.to_string())?;
    Err(format!("it did not end within {} s", limit.as_secs()))
}

/// The lines that `gpu-check checks` prints.
fn read(lines: &[String]) -> Checks {
    let parsed = lines.iter().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let ran = parsed.filter(|value| value.get("skipped").is_none());
    let check = |value: Value| {
        let name = value.get("name")?.as_str()?.to_owned();
        Some((name, value.get("error").and_then(|error| error.as_str()).map(str::to_owned)))
    };
    ran.filter_map(check).collect()
}
