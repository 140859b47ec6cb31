//! The files that say how a model speaks, good and broken, in a folder that the real binary serves.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::{Value, json};
use tests::{Process, Reply, exchange, lockstep};

/// A small checkpoint with a tokenizer; `change` are files put in place of its own.
fn folder(change: &[(&str, &[u8])]) -> tempfile::TempDir {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR"));
    let golden: PathBuf = golden.join("goldens/public/qwen2_gqa4_tied_sharded");
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(golden).unwrap() {
        let path = entry.unwrap().path();
        let target = folder.path().join(path.file_name().unwrap());
        fs::copy(path, target).unwrap();
    }
    for (name, bytes) in change {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

fn post(up: &Process, path: &str, body: &Value) -> Reply {
    exchange(up.address("http"), "POST", path, body.to_string().as_bytes())
}

#[test]
fn broken_files_are_refused_by_name_before_the_model_is_loaded() {
    for (file, content, says) in [
        ("tokenizer.json", &b"{\"version\": "[..], "EOF"),
        ("tokenizer_config.json", b"{]", "line 1"),
        ("generation_config.json", b"\xef\xbb\xbf{}", "byte order mark"),
        ("generation_config.json", b"{\"top_k\": 50.5}", "not a whole number"),
        ("config.json", b"{\"vocab_size\": NaN}", "NaN"),
    ] {
        let folder = folder(&[(file, content)]);
        let mut command = Command::new(lockstep());
        command.args(["up", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--model"]);
        command.arg(folder.path()).env("LOCKSTEP_LOG", "error").stdin(Stdio::null());
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
        assert!(said.starts_with("error: ") && said.contains(file), "{said}");
        assert!(said.contains(says) && said.lines().count() == 1, "{said}");
    }
}

#[test]
fn a_broken_template_refuses_chat_alone_and_raw_prompts_are_templates() {
    let folder = folder(&[
        ("chat_template.jinja", b"{% for m in messages %}{{ m.content }"),
        ("generation_config.json", b"{\"top_k\": 50.0, \"eos_token_id\": [480.0, 482]}"),
    ]);
    let path = folder.path().to_str().unwrap();
    let up = ["up", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--threads", "1"];
    let up = Process::lockstep(&[&up[..], &["--model", path]].concat());
    let listed = exchange(up.address("http"), "GET", "/v1/models", b"").json();
    let model = &listed["data"][0]["id"];
    let complete = |prompt: &str| {
        let body = json!({"model": model, "prompt": prompt, "max_tokens": 1});
        let reply = post(&up, "/v1/completions", &body);
        assert_eq!(reply.status, 200, "{reply:?}");
        reply.json()["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    // Special or not, an added token is one id wherever it stands.
    for token in ["<|im_end|>", "<tool_call>"] {
        assert_eq!(complete(token), 1, "{token}");
        assert_eq!(complete(&format!("the{token}the")), 1 + 2 * complete("the"), "{token}");
    }
    let messages = json!([{"role": "user", "content": "Hi"}]);
    let body = json!({"model": model, "messages": messages});
    let reply = post(&up, "/v1/chat/completions", &body);
    assert_eq!(reply.status, 400, "{reply:?}");
    let message = reply.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains("chat_template.jinja: "), "{message}");
    assert!(message.contains("send a completion prompt"), "{message}");
}
