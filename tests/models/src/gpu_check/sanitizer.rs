//! The short checks under compute-sanitizer.

use crate::{
    lines::{Line, Order, Write, this},
    process::{self, Line as Said},
};
use checks::bench::Report;
use std::{env, path::PathBuf, process::Command, time::Duration};

const TOOLS: [&str; 2] = ["memcheck", "synccheck"];
/// What compute-sanitizer ends with where it has found something.
const FOUND: &str = "9";
/// Lines of a sanitizer that a report tells.
const SAID_MAX: usize = 24;

/// Every tool, each for its part of the time; told after each.
///
/// # Errors
/// Where there is none, or what the first one did not come through.
pub fn run(order: &Order, report: &mut Report, write: Write<'_>) -> Result<(), String> {
    let program = find("compute-sanitizer").ok_or(
        "compute-sanitizer is not installed: put it on PATH or name its toolkit in CUDA_HOME",
    )?;
    for tool in TOOLS {
        let seconds = order.seconds / TOOLS.len() as u64;
        let order = Order { seconds, only: order.only.clone(), out: order.out.clone(), ..*order };
        let result = watched(&order, tool, &program);
        report.sanitizer.push((tool.to_owned(), result));
        write(report)?;
    }
    Ok(())
}

fn watched(order: &Order, tool: &str, program: &PathBuf) -> Result<String, String> {
    // A kernel takes a hundred times as long.
    let patience = order.seconds;
    let mut limits = order.limits(patience);
    limits.silence = Duration::from_secs(order.seconds);
    let this = this()?;
    let command = |skip| {
        let mut command = Command::new(program);
        command.args(["--tool", tool, "--error-exitcode", FOUND, "--print-limit", "20"]);
        command.arg(&this).args(order.pieces(Line::Sanitizer, patience, limits.end, skip));
        command
    };
    let (mut ran, mut skipped, mut wrong, mut said) = (0, 0, Vec::new(), Vec::new());
    let odd = process::every(command, limits, |line| match line {
        Said::Done { name, error, value } => {
            eprintln!("{tool}: {name}: {error:?}, {} s", value["took"]);
            ran += 1;
            wrong.extend(error.as_ref().map(|error| format!("{name}: {error}")));
        }
        Said::Skipped(_) => skipped += 1,
        Said::Other(line) if line.starts_with("=====") => {
            eprintln!("{line}");
            if said.len() < SAID_MAX {
                said.push(line.trim_start_matches('=').trim().to_owned());
            }
        }
        _ => {}
    })
    .map_err(|error| format!("{error}; {}", said.join(" / ")))?;
    let left = match skipped {
        0 => String::new(),
        skipped => format!(", no time for {skipped} more"),
    };
    let clean = format!("{ran} checks{left}");
    if wrong.is_empty() && odd.is_none() && ran > 0 {
        return Ok(clean);
    }
    let odd = odd.unwrap_or_default();
    Err(format!("{clean}; {odd}; {}; {}", wrong.join("; "), said.join(" / ")))
}

/// A tool of NVIDIA's: on PATH, or in the toolkit that CUDA_HOME names, or where toolkits are
/// installed.
pub fn find(tool: &str) -> Option<PathBuf> {
    let mut folders: Vec<PathBuf> =
        env::split_paths(&env::var_os("PATH").unwrap_or_default()).collect();
    let homes = [env::var_os("CUDA_HOME").map(PathBuf::from), Some("/usr/local/cuda".into())];
    for home in homes.into_iter().flatten() {
        folders.extend([home.join("bin"), home.join("compute-sanitizer")]);
    }
    folders.into_iter().map(|folder| folder.join(tool)).find(|program| program.is_file())
}
