//! Several streamed answers at once, as their readers see them.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::TcpStream,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::request;

const DEADLINE: Duration = Duration::from_secs(300);
const PATH: &str = "/v1/completions";

/// What one choice's reader got.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Choice {
    pub text: String,
    /// Every token with its logprob, as printed.
    pub tokens: Vec<String>,
    pub finish: Option<String>,
}

/// What one request's reader got, told in parts that do not depend on how it came.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    pub choices: BTreeMap<u64, Choice>,
    pub usage: Option<Value>,
    pub error: Option<String>,
}

/// The answers of one round, and the longest silence of any.
#[derive(Debug)]
pub struct Round {
    pub answers: Vec<Answer>,
    pub longest_gap: Duration,
}

/// Streams that are being read.
pub struct Streams {
    readers: Vec<JoinHandle<(Answer, Duration)>>,
    events: Arc<AtomicUsize>,
}

/// Requests of every kind whose answers are repeatable: greedy and seeded, of several choices, with
/// logprobs, with a stop string.
pub fn repeatable(model: &str, tokens: usize) -> Vec<Value> {
    let extras = [
        json!({}),
        json!({"temperature": 1.0, "seed": 7}),
        json!({"n": 2, "temperature": 1.0, "seed": 8}),
        json!({"logprobs": 2}),
        json!({"logprobs": 1, "temperature": 0.8, "seed": 9, "top_p": 0.9}),
        json!({"stop": ["nowhere to be found"]}),
        json!({"presence_penalty": 0.5}),
        json!({"max_tokens": 5}),
    ];
    let request = |(at, extra): (usize, Value)| {
        let mut body = json!({
            "model": model, "prompt": format!("Story number {at}. Once upon a time"),
            "max_tokens": tokens, "temperature": 0, "ignore_eos": true, "stream": true,
            "stream_options": {"include_usage": true},
        });
        let fields = extra.as_object().expect("an object").clone();
        body.as_object_mut().expect("an object").extend(fields);
        body
    };
    extras.into_iter().enumerate().map(request).collect()
}

impl Streams {
    /// Sends all requests at once.
    pub fn open(router: &str, requests: &[Value]) -> Self {
        let events = Arc::new(AtomicUsize::new(0));
        let read = |body: &Value| {
            let (router, body, events) = (router.to_owned(), body.to_string(), events.clone());
            thread::spawn(move || read(&router, &body, &events))
        };
        Self { readers: requests.iter().map(read).collect(), events }
    }

    /// Waits until so many events have come on all streams together.
    pub fn reach(&self, events: usize) {
        let began = Instant::now();
        while self.events.load(Ordering::SeqCst) < events {
            assert!(began.elapsed() < DEADLINE, "{events} events did not come");
            assert!(!self.readers.iter().all(JoinHandle::is_finished), "all ended before");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Reads to every end.
    pub fn join(self) -> Round {
        let ends = self.readers.into_iter().map(|reader| reader.join().expect("a reader"));
        let (answers, gaps): (Vec<_>, Vec<_>) = ends.unzip();
        Round { answers, longest_gap: gaps.into_iter().max().unwrap_or_default() }
    }
}

fn read(router: &str, body: &str, events: &AtomicUsize) -> (Answer, Duration) {
    let mut stream = TcpStream::connect(router).expect("a router");
    stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
    stream.write_all(&request("POST", PATH, body.as_bytes())).expect("a router that reads");
    let mut answer = Answer::default();
    let (mut gap, mut last) = (Duration::ZERO, Instant::now());
    let mut lines = BufReader::new(stream).lines();
    let head = lines.next().expect("a head").expect("a head in time");
    if head.split(' ').nth(1) != Some("200") {
        let rest: Vec<String> = lines.map_while(Result::ok).collect();
        answer.error = Some(format!("{head}: {}", rest.last().cloned().unwrap_or_default()));
        return (answer, gap);
    }
    let mut whole = false;
    for line in lines {
        let Ok(line) = line else { break };
        let Some(data) = line.strip_prefix("data: ") else { continue };
        gap = gap.max(last.elapsed());
        last = Instant::now();
        if data == "[DONE]" {
            whole = true;
            break;
        }
        take(&mut answer, &serde_json::from_str(data).expect("JSON"));
        events.fetch_add(1, Ordering::SeqCst);
    }
    if !whole {
        answer.error.get_or_insert_with(|| "the stream broke off".to_owned());
    }
    (answer, gap)
}

fn take(answer: &mut Answer, event: &Value) {
    if let Some(error) = event.get("error") {
        answer.error = Some(error.to_string());
    }
    if let Some(usage) = event.get("usage").filter(|usage| !usage.is_null()) {
        let mut usage = usage.clone();
        // What was in a cache depends on where it ran.
        usage.as_object_mut().expect("an object").remove("prompt_tokens_details");
        answer.usage = Some(usage);
    }
    for choice in event["choices"].as_array().into_iter().flatten() {
        let known = answer.choices.entry(choice["index"].as_u64().expect("an index")).or_default();
        known.text += choice["text"].as_str().unwrap_or_default();
        let logprobs = &choice["logprobs"];
        let tokens = logprobs["tokens"].as_array().into_iter().flatten();
        let values = logprobs["token_logprobs"].as_array().into_iter().flatten();
        known.tokens.extend(tokens.zip(values).map(|(token, value)| format!("{token} {value}")));
        if let Some(finish) = choice["finish_reason"].as_str() {
            known.finish = Some(finish.to_owned());
        }
    }
}
