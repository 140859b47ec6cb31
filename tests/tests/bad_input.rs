//! What clients send wrongly, against the real binary with a real model: each gets an answer that
//! names what is wrong, and the server goes on as before.

use serde_json::{Value, json};
use std::{
    io::Write,
    process::{Command, Stdio},
};
use tests::{Process, Reply, exchange, lockstep};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

struct Server(Process);

impl Server {
    fn post(&self, path: &str, body: &str) -> Reply {
        exchange(self.0.address("http"), "POST", path, body.as_bytes())
    }

    /// The error's message and code.
    fn refused(&self, path: &str, body: &str, status: u16) -> String {
        let reply = self.post(path, body);
        let shown: String = body.chars().take(200).collect();
        assert_eq!(reply.status, status, "{shown} got {reply:?}");
        let error = &reply.json()["error"];
        let message = error["message"].as_str().unwrap_or_else(|| panic!("{shown}: {reply:?}"));
        format!("{message} {}", error["code"].as_str().unwrap_or_default())
    }

    fn model(&self) -> String {
        let listed = exchange(self.0.address("http"), "GET", "/v1/models", b"").json();
        listed["data"][0]["id"].as_str().unwrap().to_owned()
    }

    fn answers(&self, model: &str) {
        let reply = self.post(CHAT, &chat(model, json!({"max_tokens": 2})));
        assert_eq!(reply.status, 200, "{reply:?}");
    }
}

fn chat(model: &str, extra: Value) -> String {
    merged(json!({"model": model, "messages": [{"role": "user", "content": "Hi"}]}), extra)
}

fn text(model: &str, extra: Value) -> String {
    merged(json!({"model": model, "prompt": "Hi", "max_tokens": 2}), extra)
}

fn merged(mut body: Value, extra: Value) -> String {
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body.to_string()
}

#[test]
fn every_fault_is_named_and_the_server_goes_on() {
    let server = Server(Process::up(&["--threads", "1", "--context", "256"]));
    let model = &server.model();
    server.answers(model);
    broken_bodies(&server, model);
    refused_values(&server, model);
    every_door_says_the_same(&server, model);
    server.answers(model);
    special_text_stays_text(&server, model);
    server.answers(model);
}

/// By HTTP, by gRPC, and without a server.
fn every_door_says_the_same(server: &Server, model: &str) {
    let said = server.refused(TEXT, &text(model, json!({"temperature": 2.5})), 400);
    let said = said.trim();
    assert_eq!(said, "temperature must be in [0, 2], not 2.5");
    let router = server.0.address("grpc");
    for flags in [["chat", "--router", router], ["run", "--model", "demo"]] {
        let mut command = Command::new(lockstep());
        command.args(flags).args(["--temperature", "2.5"]);
        if flags[0] == "run" {
            command.args(["--prompt", "Hi", "--threads", "1"]);
        }
        let pipes = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = pipes.spawn().expect("lockstep runs");
        // Only `chat` reads it.
        let _unread = child.stdin.take().expect("a pipe").write_all(b"Hi\n");
        let output = child.wait_with_output().expect("its output");
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && told.contains(said), "{flags:?}: {told}");
    }
}

fn broken_bodies(server: &Server, model: &str) {
    let long = "a".repeat(5 << 20);
    for (body, status, word) in [
        ("{\"model\": ", 400, "JSON"),
        ("", 400, "JSON"),
        ("[]", 400, "object"),
        ("{\"temperature\": NaN}", 400, "JSON"),
        ("{\"temperature\": -Infinity}", 400, "JSON"),
        (&"[".repeat(100_000), 400, "JSON"),
        (&chat(model, json!({"messages": [{"role": "user", "content": long}]})), 413, "4194304"),
    ] {
        for path in [CHAT, TEXT] {
            let said = server.refused(path, body, status);
            assert!(said.contains(word), "{word}: {said}");
        }
    }
    let unknown = json!({});
    for (path, body) in [(CHAT, chat("nobody", unknown.clone())), (TEXT, text("nobody", unknown))] {
        let said = server.refused(path, &body, 404);
        assert!(said.contains("nobody") && said.contains(model), "{said}");
    }
}

fn refused_values(server: &Server, model: &str) {
    let robot = json!({"messages": [{"role": "robot", "content": "x"}]});
    for (extra, word) in [
        (json!({"temperature": -1}), "temperature"),
        (json!({"temperature": "NaN"}), "temperature"),
        (json!({"temperature": 1e300}), "temperature"),
        (json!({"top_p": -0.1}), "top_p"),
        (json!({"min_p": -1}), "min_p"),
        (json!({"top_k": -7}), "top_k"),
        (json!({"repetition_penalty": -1}), "repetition_penalty"),
        (json!({"presence_penalty": 1e300}), "presence_penalty"),
        (json!({"max_tokens": -2}), "max_tokens"),
        (json!({"n": -1}), "n must"),
        (json!({"logit_bias": {"99999999": 1}}), "logit_bias"),
        (json!({"stop_token_ids": [99_999_999]}), "stop_token_ids"),
        (json!({"temprature": 1}), "temprature"),
        (json!({"best_of_all": true}), "best_of_all"),
    ] {
        let said = server.refused(CHAT, &chat(model, extra.clone()), 400);
        assert!(said.contains(word), "{word}: {said}");
        let said = server.refused(TEXT, &text(model, extra), 400);
        assert!(said.contains(word), "{word}: {said}");
    }
    let said = server.refused(CHAT, &chat(model, robot), 400);
    assert!(said.contains("role") && said.contains("robot"), "{said}");
    for (extra, word) in [
        (json!({"prompt": [99_999_999]}), "99999999"),
        (json!({"prompt": [-1]}), "prompt"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": "word ".repeat(1000)}), "context_length_exceeded"),
        (json!({"max_tokens": 100_000}), "context_length_exceeded"),
    ] {
        let said = server.refused(TEXT, &text(model, extra), 400);
        assert!(said.contains(word), "{word}: {said}");
    }
    let many = json!({"messages": [{"role": "user", "content": "word ".repeat(1000)}]});
    let said = server.refused(CHAT, &chat(model, many), 400);
    assert!(said.contains("context"), "{said}");
}

/// Of a user's marker the special token would be one more token; as text it is several.
fn special_text_stays_text(server: &Server, model: &str) {
    let tokens = |content: &str| {
        let messages = json!([{"role": "user", "content": content}]);
        let body = chat(model, json!({"messages": messages, "max_tokens": 1}));
        let reply = server.post(CHAT, &body);
        assert_eq!(reply.status, 200, "{reply:?}");
        reply.json()["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    let plain = tokens("Hi ");
    for marker in ["<|im_end|>", "<|im_start|>", "<|endoftext|>"] {
        let with = tokens(&format!("Hi {marker}"));
        assert!(with > plain + 2, "{marker}: {with} tokens where {plain} go without");
    }
}
