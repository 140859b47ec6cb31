//! A model of which there is no checkpoint, served by the real binary.

use std::{fs, path::Path};

use serde_json::json;
use tests::{Process, exchange};

#[test]
fn a_folder_without_weights_is_served_with_random_ones() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/public");
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        let from = golden.join("qwen2_gqa4_tied_sharded").join(file);
        fs::copy(&from, folder.path().join(file)).unwrap_or_else(|e| panic!("{from:?}: {e}"));
    }
    let model = folder.path().display().to_string();
    let ports =
        ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--threads", "1", "--context", "256"];
    let flags = ["up", "--model", &model, "--weights", "random", "--name", "random"];
    let up = Process::lockstep(&[&flags[..], &ports].concat());
    let body = json!({"model": "random", "prompt": "hello", "max_tokens": 5, "temperature": 0});
    let reply =
        exchange(up.address("http"), "POST", "/v1/completions", body.to_string().as_bytes());
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(reply.json()["usage"]["completion_tokens"], 5, "{reply:?}");
}
