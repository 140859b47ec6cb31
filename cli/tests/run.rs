//! `lockstep run` as a person would use it: ids in, ids and logits out, without a tokenizer.

use std::{
    path::Path,
    process::{Command, Output},
};

use serde_json::Value;

const CHECKPOINT: &str = "../tests/goldens/public/qwen3_gqa4_hd128_tied";

fn lockstep(arguments: &[&str]) -> Output {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join(CHECKPOINT);
    let binary = env!("CARGO_BIN_EXE_lockstep");
    Command::new(binary).arg("run").arg("--model").arg(model).args(arguments).output().unwrap()
}

fn greedy(ids: &str, more: &[&str]) -> Value {
    let mut arguments = vec!["--prompt-ids", ids, "--json", "--threads", "1"];
    arguments.extend(["--precision", "exact", "--temperature", "0", "--repetition-penalty", "1"]);
    arguments.extend(["--ignore-eos", "--max-tokens", "32"]);
    arguments.extend(more);
    let output = lockstep(&arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn greedy_continuations_are_the_reference_ones_at_any_number_of_ranks() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(CHECKPOINT).join("goldens.json");
    let goldens: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let logits = folder.path().join("logits.safetensors");
    for case in goldens["greedy"].as_array().unwrap() {
        let prompt: Vec<_> =
            case["prompt"].as_array().unwrap().iter().map(Value::to_string).collect();
        let wanted = case["greedy32"].as_array().unwrap();
        for tp in ["1", "2"] {
            let more = ["--tp", tp, "--logits-out", logits.to_str().unwrap(), "--logprobs", "2"];
            let answer = greedy(&prompt.join(","), &more);
            assert_eq!(answer["token_ids"].as_array().unwrap(), wanted, "tp {tp}");
            assert_eq!(answer["finish_reason"], "length");
            let logprobs = answer["logprobs"].as_array().unwrap();
            assert_eq!(logprobs.len(), 32);
            assert_eq!(logprobs[0]["token"], logprobs[0]["top"][0][0]);
            // The file's last row is what the first token was chosen from.
            let bytes = std::fs::read(&logits).unwrap();
            let tensors = formats::safetensors::parse(&bytes).unwrap();
            let [rows, vocab] = tensors[0].shape[..] else { panic!("{:?}", tensors[0].shape) };
            assert_eq!((tensors[0].name.as_str(), rows), ("logits", prompt.len() as u64));
            let last: Vec<f32> = bytes[bytes.len() - 4 * vocab as usize..]
                .chunks_exact(4)
                .map(|value| f32::from_le_bytes(value.try_into().unwrap()))
                .collect();
            let best = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
            assert_eq!(wanted[0].as_u64(), Some(best as u64), "tp {tp}");
        }
    }
}

#[test]
fn what_cannot_be_is_refused_in_one_line() {
    for (arguments, word) in [
        (["--prompt-ids", "1,2,999999", "--temperature", "0"], "999999 does not exist"),
        (["--prompt-ids", "1,2", "--temperature", "-1"], "--temperature"),
        (["--prompt-ids", "1,2", "--max-tokens", "99999999"], "exceeds the context"),
        (["--prompt", "text", "--max-tokens", "1"], "tokenizer"),
        (["--prompt-ids", "1", "--tp", "5000"], "rank"),
    ] {
        let output = lockstep(&arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
        let last = said.lines().last().unwrap_or_default();
        assert!(last.starts_with("error: ") && last.contains(word), "{arguments:?}: {said}");
    }
    let output = lockstep(&[]);
    assert_eq!(output.status.code(), Some(2), "a prompt is required");
}
