//! The binary that has CUDA in it, on a machine without: it starts on the CPU, and says plainly
//! what is missing where a device is asked for. Ignored unless asked for by name: `./dev test`
//! builds that binary first.

use std::process::{Command, Output};

use tests::lockstep;

fn run(device: &str) -> Output {
    let prompt = ["--prompt-ids", "1,2,3", "--max-tokens", "2", "--json"];
    Command::new(lockstep())
        .args(["run", "--model", "demo", "--device", device])
        .args(prompt)
        .env("RUST_BACKTRACE", "1")
        .output()
        .expect("lockstep runs")
}

fn has_driver() -> bool {
    let listed = Command::new("ldconfig").arg("-p").output();
    let found = listed.is_ok_and(|out| String::from_utf8_lossy(&out.stdout).contains("libcuda.so"));
    found || Command::new("nvidia-smi").output().is_ok_and(|out| out.status.success())
}

#[test]
#[ignore = "needs the binary built with the feature cuda"]
fn it_serves_on_the_cpu() {
    let done = run("cpu");
    let text = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert!(text.contains("\"token_ids\""), "{text}");
}

#[test]
#[ignore = "needs the binary built with the feature cuda"]
fn it_says_what_is_missing_for_cuda() {
    if has_driver() {
        eprintln!("SKIPPED: this machine has a CUDA driver");
        return;
    }
    let done = run("cuda");
    let text = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{text}");
    assert!(text.contains("no CUDA driver") && text.contains("install NVIDIA's driver"), "{text}");
    assert!(!text.contains("panicked") && !text.contains("stack backtrace"), "{text}");
    assert!(done.stdout.is_empty());
}
