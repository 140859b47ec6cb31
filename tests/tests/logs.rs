//! Log lines and whoever reads them: servers whose output nobody takes serve and end as ever, and
//! machines get JSON and nothing else.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use serde_json::{Value, json};
use tests::{Connection, Process, exchange, full_pipe, lockstep, request, wait_for};

const DEADLINE: Duration = Duration::from_secs(60);
const REQUESTS: usize = 10_000;
const CLIENTS: usize = 8;
const MODEL: &str = "qwen2_gqa4_tied_sharded";

/// A model of a few hundred kilobytes: an answer takes a millisecond.
fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/public").join(MODEL)
}

/// Addresses that were free a moment ago, for processes whose ready line nobody reads.
fn free<const N: usize>() -> [String; N] {
    let held = [(); N].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    held.map(|port| port.local_addr().unwrap().to_string())
}

fn up([http, grpc]: &[String; 2], flags: &[&str]) -> Command {
    let mut command = Command::new(lockstep());
    command
        .args(["up", "--http", http, "--grpc", grpc, "--threads", "1", "--kv-memory", "4M"])
        .args(flags)
        .arg("--model")
        .arg(tiny());
    command
}

fn completion(extra: Value) -> Vec<u8> {
    let mut body = json!({"model": MODEL, "prompt": "Once", "max_tokens": 1});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body.to_string().into_bytes()
}

/// The value of a counter, summed over its labels.
fn sum(text: &str, name: &str) -> u64 {
    let values = text.lines().filter_map(|line| {
        let (labels, value) = line.strip_prefix(name)?.rsplit_once(' ')?;
        (labels.is_empty() || labels.starts_with('{')).then(|| value.parse::<u64>().ok())?
    });
    values.sum()
}

fn is_ready(address: &str) -> bool {
    TcpStream::connect(address).is_ok() && exchange(address, "GET", "/health", b"").status == 200
}

#[test]
fn a_stalled_log_reader_stops_nothing() {
    let (reader, [stdout, stderr]) = full_pipe();
    let addresses = free();
    let mut command = up(&addresses, &[]);
    let mut process = Process::spawn(command.stdout(stdout).stderr(stderr));
    let http = addresses[0].as_str();
    wait_for("a ready server", DEADLINE, || is_ready(http), |ready| *ready);

    let whole = completion(json!({}));
    let stream = completion(json!({"stream": true}));
    let wrong = completion(json!({"n": 0}));
    thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                let mut connection = Connection::open(http);
                for at in 0..REQUESTS / CLIENTS {
                    let (method, path, body, status) = match at % 5 {
                        0 => ("POST", "/v1/completions", whole.as_slice(), 200),
                        1 => ("POST", "/v1/completions", stream.as_slice(), 200),
                        2 => ("POST", "/v1/completions", wrong.as_slice(), 400),
                        3 => ("GET", "/v1/nothing", &[][..], 404),
                        _ => ("GET", "/v1/models", &[][..], 200),
                    };
                    let reply = connection.exchange(method, path, body);
                    assert_eq!(reply.status, status, "request {at}: {reply:?}");
                }
            });
        }
    });
    let metrics = exchange(http, "GET", "/metrics", b"").body;
    assert!(sum(&metrics, "lockstep_router_requests_total") >= REQUESTS as u64, "{metrics}");
    assert!(sum(&metrics, "lockstep_router_log_lines_dropped_total") > 0, "{metrics}");

    // One answer is under way when the signal comes: it is finished first.
    let long = completion(json!({"max_tokens": 200, "ignore_eos": true, "stream": true}));
    let mut running = TcpStream::connect(http).unwrap();
    running.set_read_timeout(Some(DEADLINE)).unwrap();
    running.write_all(&request("POST", "/v1/completions", &long)).unwrap();
    let mut first = [0; 64];
    running.read_exact(&mut first).unwrap();
    process.signal("INT");
    let mut rest = String::new();
    running.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("[DONE]"), "{rest}");
    let status = process.wait(DEADLINE);
    assert!(status.success(), "{status}");
    drop(reader);
}

/// Every line of a stream, each of them JSON.
fn objects(stream: impl Read) -> Vec<Value> {
    let lines = BufReader::new(stream).lines().map(|line| line.expect("text"));
    lines
        .map(|line| serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}")))
        .collect()
}

#[test]
fn json_logs_are_json_and_tell_each_request_once() {
    let addresses = free();
    let mut command = up(&addresses, &["--log-format", "json", "--tp", "2"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = Process::spawn(child);
    let (stdout, stderr) = process.outputs();
    let stdout = thread::spawn(move || objects(stdout));
    let stderr = thread::spawn(move || objects(stderr));
    let http = addresses[0].as_str();
    wait_for("a ready server", DEADLINE, || is_ready(http), |ready| *ready);
    let chat = json!({
        "model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3,
        "ignore_eos": true,
    });
    for (path, body, status) in [
        ("/v1/chat/completions", chat.to_string().into_bytes(), 200),
        ("/v1/completions", completion(json!({"n": 2})), 200),
        ("/v1/completions", completion(json!({"model": "nobody"})), 404),
        ("/v1/completions", b"{".to_vec(), 400),
        ("/nothing", Vec::new(), 404),
    ] {
        assert_eq!(exchange(http, "POST", path, &body).status, status, "{path}");
    }
    // A client that leaves in the middle.
    let long = completion(json!({"max_tokens": 4000, "ignore_eos": true, "stream": true}));
    let mut running = TcpStream::connect(http).unwrap();
    running.write_all(&request("POST", "/v1/completions", &long)).unwrap();
    running.read_exact(&mut [0; 64]).unwrap();
    drop(running);
    let gone =
        || sum(&exchange(http, "GET", "/metrics", b"").body, "lockstep_router_requests_total");
    wait_for("all six counted", DEADLINE, gone, |count| *count >= 6);
    process.signal("INT");
    assert!(process.wait(DEADLINE).success());

    let ready = stdout.join().unwrap();
    assert_eq!(ready.len(), 1, "{ready:?}");
    assert_eq!(ready[0]["message"], "ready");
    assert_eq!(ready[0]["http"], format!("http://{http}"));
    let lines = stderr.join().unwrap();
    let requests: Vec<&Value> = lines.iter().filter(|line| line["route"].is_string()).collect();
    let told: Vec<_> = requests
        .iter()
        .map(|line| (line["status"].as_str().unwrap(), line["message"].as_str().unwrap()))
        .collect();
    let wanted = [
        ("200", "request ended"),
        ("200", "request ended"),
        ("404", "request refused"),
        ("400", "request refused"),
        ("404", "request refused"),
        ("499", "client went away"),
    ];
    assert_eq!(told, wanted, "{requests:?}");
    for line in &requests {
        assert_eq!(line["level"], "INFO", "{line}");
        assert!(line["client"].as_str().unwrap().starts_with("127.0.0.1:"), "{line}");
        assert!(line["request_id"].is_string() && line["milliseconds"].is_u64(), "{line}");
    }
    let first = requests[0];
    assert_eq!((&first["model"], &first["finish"]), (&json!(MODEL), &json!("length")), "{first}");
    assert_eq!(first["completion_tokens"], 3, "{first}");
    assert_eq!(requests[1]["finish"], "length:2", "{:?}", requests[1]);
    for name in ["first_token_milliseconds", "queue_milliseconds", "prompt_tokens"] {
        assert!(first[name].is_u64(), "{name}: {first}");
    }
    assert!(first["workers"].as_str().unwrap().starts_with("http://127.0.0.1:"), "{first}");
    assert!(requests[2]["error"].as_str().unwrap().contains("nobody"), "{:?}", requests[2]);
    assert_eq!(requests[4]["route"], "unknown");
}

#[test]
fn a_fatal_error_is_told_even_as_json() {
    let mut command = up(&["127.0.0.1:0".into(), "not-an-address".into()], &[]);
    let refused = command.output().unwrap();
    assert!(!refused.status.success() && !refused.stderr.is_empty());
    let held = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = held.local_addr().unwrap().to_string();
    let command = &mut up(&[taken.clone(), "127.0.0.1:0".into()], &["--log-format", "json"]);
    let output = command.output().unwrap();
    assert!(!output.status.success());
    let lines = objects(output.stderr.as_slice());
    let last = lines.last().expect("a line");
    assert_eq!(last["level"], "ERROR", "{last}");
    assert!(last["message"].as_str().unwrap().contains(&taken), "{last}");
}
