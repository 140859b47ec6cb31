//! The demo model's perplexity agrees with llama.cpp's on the same text.

use std::{path::Path, process::Command};

/// llama-perplexity on the same file and text, context 512 (`goldens/gguf`).
const LLAMA_CPP: f64 = 18.1773;

#[test]
fn the_demo_model_is_as_perplexed_as_under_llama_cpp() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests");
    let text = root.join("goldens/gguf/ppl_text.txt");
    for ranks in ["1", "2"] {
        let output = Command::new(env!("CARGO_BIN_EXE_lockstep"))
            .args(["perplexity", "--model", "demo", "--tp", ranks, "--file"])
            .arg(&text)
            .output()
            .expect("lockstep starts");
        let (out, log) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{out}\n{log}");
        let mut numbers = out.split_whitespace().filter_map(|word| word.parse::<f64>().ok());
        let ours = numbers.next().unwrap_or_else(|| panic!("no number in {out}"));
        assert!((ours / LLAMA_CPP - 1.0).abs() < 0.01, "{ours} against {LLAMA_CPP}: {out}");
    }
}
