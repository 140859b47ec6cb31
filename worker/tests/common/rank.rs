//! Ranks that are processes: the rank program is the test binary, called through a script that
//! turns the arguments of a rank into the one ignored test that serves as one.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf, process::Command};

use tempfile::TempDir;
use worker::{RankConfig, run_rank};

pub const PLACE_VARIABLE: &str = "LOCKSTEP_TEST_PLACE";

/// Not a test of its own: what the script below starts.
#[test]
#[ignore = "serves as a rank of the other tests"]
fn serve_as_rank() {
    let Ok(place) = std::env::var(PLACE_VARIABLE) else { return };
    let mut words = place.split(' ');
    let mut word = || words.next().expect("rank and world size");
    let config = RankConfig {
        rank: word().parse().unwrap(),
        world_size: word().parse().unwrap(),
        model: None,
        tls: None,
    };
    run_rank(config).unwrap();
}

/// An executable script; `{exe}` in its text is this test binary.
pub fn script(dir: &TempDir, text: &str) -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let path = dir.path().join("rank.sh");
    let text = text.replace("{exe}", exe.to_str().unwrap());
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// A rank that notes its process id beside the script.
pub fn rank_script(dir: &TempDir) -> PathBuf {
    let text = format!(
        "echo $$ > {}/pid.$3\n{PLACE_VARIABLE}=\"$3 $5\" exec \"{{exe}}\" --ignored --exact \
         rank::serve_as_rank --nocapture",
        dir.path().display()
    );
    script(dir, &text)
}

/// Of a rank that `rank_script` started.
pub fn pid(dir: &TempDir, rank: usize) -> String {
    fs::read_to_string(dir.path().join(format!("pid.{rank}"))).unwrap().trim().to_owned()
}

pub fn signal(pid: &str, name: &str) {
    // The shell's own: the program `kill` is not on every machine.
    let kill = format!("kill {name} {pid}");
    assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
}
