//! A router knows what workers have cached, whoever sent it there.

use std::{path::Path, thread, time::Duration};

use serde_json::json;
use tests::{Process, address, exchange};

const MODEL: &str = "qwen2_gqa4_tied_sharded";
const ATTEMPTS: u32 = 20;

fn worker() -> Process {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/public").join(MODEL);
    let model = model.to_str().expect("a path in UTF-8");
    Process::lockstep(&["worker", "--model", model, "--engine", "mock"])
}

fn router(workers: &[&Process]) -> Process {
    let workers: Vec<&str> = workers.iter().map(|worker| address(worker)).collect();
    let ports = ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];
    Process::lockstep(&[&["router", "--workers", &workers.join(",")], &ports[..]].concat())
}

/// Tokens of a prompt of that number that were cached.
fn cached(router: &Process, number: u32) -> u64 {
    let prompt: Vec<u32> = (0..100).map(|at| (at * 7 + number * 31 + 1) % 500).collect();
    let body = json!({ "model": MODEL, "prompt": prompt, "max_tokens": 1 }).to_string();
    let reply = exchange(router.address("http"), "POST", "/v1/completions", body.as_bytes());
    assert_eq!(reply.status, 200, "{reply:?}");
    let usage = &reply.json()["usage"];
    usage["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a count")
}

#[test]
fn what_one_router_sent_somewhere_another_one_finds_there() {
    let workers = [worker(), worker()];
    // Each of these knows one worker alone, and the third has sent nothing so far.
    let [first, second] = [&workers[0], &workers[1]].map(|worker| router(&[worker]));
    let both = router(&[&workers[0], &workers[1]]);
    for sender in [&first, &second] {
        // What is cached is told ten times a second, by and to processes that may be slow.
        let finds = (0..ATTEMPTS).any(|attempt| {
            let number = attempt + ATTEMPTS * u32::from(std::ptr::eq(sender, &second));
            cached(sender, number);
            thread::sleep(Duration::from_millis(200) * (attempt + 1));
            cached(&both, number) >= 96
        });
        assert!(finds, "a prompt went elsewhere than to what has it cached");
    }
}
