//! `gpu-check` on a fake card with tiny shapes: the whole run, and what a hang costs.

use serde_json::Value;
use std::{ffi::OsString, path::Path, process::Command, time::Instant};

/// Runs it; the report and how it looks, whatever it says.
fn check(out: &Path, settings: &[(&'static str, &str)], flags: &[&str]) -> (Value, String) {
    let cards = emulate::machine(1);
    let settings = settings.iter().map(|(name, value)| (*name, OsString::from(*value)));
    run(out, cards.into_iter().chain(settings), flags)
}

fn run(
    out: &Path,
    environment: impl IntoIterator<Item = (&'static str, OsString)>,
    flags: &[&str],
) -> (Value, String) {
    let done = Command::new(env!("CARGO_BIN_EXE_gpu-check"))
        .args(["--tiny", "--date", "today", "--out"])
        .arg(out)
        .args(flags)
        .envs(environment)
        .output()
        .expect("gpu-check runs");
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    let read = |ending: &str| {
        let mut found = std::fs::read_dir(out).expect("a folder").flatten();
        let report = found.find(|file| file.file_name().to_string_lossy().ends_with(ending));
        let report = report.unwrap_or_else(|| panic!("no {ending}: {said}"));
        std::fs::read_to_string(report.path()).expect("a report")
    };
    (serde_json::from_str(&read(".json")).expect("JSON"), read(".md") + &said)
}

fn ends(report: &Value) -> Vec<(&str, &str)> {
    let lines = report["lines"].as_array().expect("lines");
    lines
        .iter()
        .map(|line| (line["line"].as_str().expect("a name"), line["end"].as_str().expect("an end")))
        .collect()
}

#[test]
fn a_whole_run_writes_a_complete_report() {
    let out = tempfile::tempdir().expect("a folder");
    let (report, text) = check(out.path(), &[], &[]);
    let ends = ends(&report);
    for line in ["machine", "risks", "ceilings", "checks", "steps", "benches"] {
        assert!(ends.contains(&(line, "done")), "{line}: {ends:?}\n{text}");
    }
    // What is not installed here says so.
    assert_eq!(ends.len(), 9);
    for (line, end) in &ends {
        assert!(!["running", "not begun"].contains(end), "{line} {end}");
    }
    assert_eq!(report["device"], "fake 0");
    for ceiling in [
        "copy_bytes_per_second",
        "read_bytes_per_second",
        "bf16_flops_per_second",
        "fp8_flops_per_second",
        "stream_boundary_seconds",
        "idle_wake_seconds",
        "busy_wake_seconds",
    ] {
        assert!(report["ceilings"][ceiling].is_number(), "{ceiling}\n{text}");
    }
    let wrong: Vec<&Value> = report["checks"].as_array().expect("checks").iter().collect();
    assert!(wrong.len() > 4 && wrong.iter().all(|check| check[1].is_null()), "{wrong:?}");
    assert_eq!(report["failed"], serde_json::json!([]), "{text}");
    let steps = report["steps"].as_array().expect("steps");
    assert!(steps.len() == 12 && steps.iter().all(|step| step["of_read_floor"].is_number()));
    assert!(report["figures"].as_array().expect("figures").len() > 20);
    assert!(text.contains("Next:\n1. "), "{text}");
    assert!(text.contains("libcublasLt.so.13") && text.contains("kernels, opened in"), "{text}");
}

#[test]
fn a_kernel_that_hangs_costs_its_piece() {
    let out = tempfile::tempdir().expect("a folder");
    let flags = ["--lines", "3,4", "--budget", "180"];
    let (report, text) = check(out.path(), &[("FAKE_HANG", "read_all")], &flags);
    assert_eq!(ends(&report), [("machine", "done"), ("ceilings", "done"), ("checks", "done")]);
    let failed = report["failed"].as_array().expect("failed");
    assert_eq!(failed.len(), 1, "{text}");
    assert!(failed[0][1].as_str().is_some_and(|why| why.contains("has not finished within")));
    assert!(report["ceilings"]["copy_bytes_per_second"].is_number());
    assert!(report["ceilings"]["idle_wake_seconds"].is_number(), "{text}");
    assert!(text.contains("--only \"read\""), "{text}");
}

#[test]
fn a_line_that_hangs_costs_its_own_time_alone() {
    let out = tempfile::tempdir().expect("a folder");
    let begun = Instant::now();
    // A launch that never returns: no patience of the driver's code helps.
    let flags = ["--lines", "ceilings,checks", "--budget", "66"];
    let (report, text) = check(out.path(), &[("FAKE_STUCK", "read_all")], &flags);
    let wanted = [("machine", "done"), ("ceilings", "its time was over"), ("checks", "done")];
    assert_eq!(ends(&report), wanted, "{text}");
    assert!(report["lines"][1]["took"].as_f64() < Some(30.0), "{text}");
    assert!(text.contains("--lines ceilings"), "{text}");
    assert!(begun.elapsed().as_secs() < 200);
}

#[test]
fn a_machine_without_a_driver_gets_a_report_that_says_so() {
    let out = tempfile::tempdir().expect("a folder");
    // A folder in which there is no driver; a machine that has one of its own finds that.
    let nowhere = [("LD_LIBRARY_PATH", OsString::from(out.path()))];
    let (report, text) = run(out.path(), nowhere, &["--lines", "machine,ceilings"]);
    if report["device"] != "" {
        eprintln!("SKIPPED: this machine has a CUDA device");
        return;
    }
    assert!(text.contains("no CUDA driver"), "{text}");
    assert!(text.contains("--lines ceilings: they did not come to their end"), "{text}");
}
