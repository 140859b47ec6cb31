//! Several streamed answers at once, as their readers see them, over HTTP and over gRPC.

mod grpc;
mod http;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::Process;

const DEADLINE: Duration = Duration::from_secs(300);

/// What one choice's reader got.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Choice {
    pub text: String,
    /// Every token that was told, with its logprob and the likeliest others, as printed.
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

/// How far one reader has come, for those who wait for it.
#[derive(Default)]
struct Pulse {
    accepted: AtomicBool,
    /// Of the first choice.
    tokens: AtomicUsize,
    /// It is told every token: others may count fewer.
    counts: bool,
    /// Of all readers of the round.
    events: Arc<AtomicUsize>,
    /// Its client is to go away.
    left: AtomicBool,
    leave: Notify,
}

/// One stream's reader.
struct Reader {
    answer: Answer,
    gap: Duration,
    last: Instant,
    pulse: Arc<Pulse>,
}

impl Reader {
    /// Something came.
    fn heard(&mut self) {
        self.gap = self.gap.max(self.last.elapsed());
        self.last = Instant::now();
        self.pulse.events.fetch_add(1, Ordering::SeqCst);
    }

    /// Somebody answers it: what follows is the answer.
    fn accepted(&self) {
        self.pulse.accepted.store(true, Ordering::SeqCst);
    }

    fn choice(&mut self, index: u64, tokens: usize) -> &mut Choice {
        if index == 0 {
            self.pulse.tokens.fetch_add(tokens, Ordering::SeqCst);
        }
        self.answer.choices.entry(index).or_default()
    }

    fn failed(&mut self, error: String) {
        self.answer.error.get_or_insert(error);
    }
}

/// Streams that are being read.
pub struct Streams {
    readers: Vec<(JoinHandle<Reader>, Arc<Pulse>)>,
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

/// How a request goes in.
#[derive(Clone, Copy)]
enum Door {
    Http,
    Grpc,
}

impl Streams {
    /// Sends all requests at once, over HTTP.
    pub fn open(router: &str, requests: &[Value]) -> Self {
        let mut streams = Self { readers: Vec::new(), events: Arc::default() };
        requests.iter().for_each(|body| streams.ask(Door::Http, router, "", body));
        streams
    }

    /// Sends each request over HTTP and over gRPC, all at once. The router's log knows them by
    /// `name`, the door and their place: `NAME-http-0`, `NAME-grpc-0` and so on.
    pub fn open_both(router: &Process, name: &str, requests: &[Value]) -> Self {
        let mut streams = Self { readers: Vec::new(), events: Arc::default() };
        for (at, body) in requests.iter().enumerate() {
            for (door, called) in [(Door::Http, "http"), (Door::Grpc, "grpc")] {
                let id = format!("{name}-{called}-{at}");
                streams.ask(door, router.address(called), &id, body);
            }
        }
        streams
    }

    fn ask(&mut self, door: Door, router: &str, id: &str, body: &Value) {
        let counts = matches!(door, Door::Grpc) || body["logprobs"].is_number();
        let pulse = Arc::new(Pulse { counts, events: self.events.clone(), ..Pulse::default() });
        let (router, id, body, told) =
            (router.to_owned(), id.to_owned(), body.clone(), pulse.clone());
        let reader = thread::spawn(move || {
            let (answer, gap, last) = (Answer::default(), Duration::ZERO, Instant::now());
            let mut reader = Reader { answer, gap, last, pulse: told };
            match door {
                Door::Http => http::read(&mut reader, &router, &id, &body),
                Door::Grpc => grpc::read(&mut reader, &router, &id, &body),
            }
            reader
        });
        self.readers.push((reader, pulse));
    }

    /// Waits until so many events have come on all streams together.
    pub fn reach(&self, events: usize) {
        self.wait(|| self.events.load(Ordering::SeqCst) >= events, "events did not come");
    }

    /// Waits until each stream has been accepted; for those that are told of every token, until
    /// the first choice has so many, or has ended.
    pub fn reach_token(&self, tokens: usize) {
        let there = |(reader, pulse): &(JoinHandle<Reader>, Arc<Pulse>)| {
            let known = pulse.tokens.load(Ordering::SeqCst);
            let accepted = pulse.accepted.load(Ordering::SeqCst);
            reader.is_finished() || accepted && (!pulse.counts || known >= tokens)
        };
        self.wait(|| self.readers.iter().all(there), "tokens did not come");
    }

    fn wait(&self, there: impl Fn() -> bool, failure: &str) {
        let began = Instant::now();
        loop {
            // Looked at first: what ended since then is seen as there.
            let running = self.are_running();
            if there() {
                return;
            }
            assert!(running, "all ended before: {failure}");
            assert!(began.elapsed() < DEADLINE, "{failure} within {DEADLINE:?}");
            thread::sleep(Duration::from_micros(200));
        }
    }

    /// Whether any has not ended.
    pub fn are_running(&self) -> bool {
        self.readers.iter().any(|(reader, _)| !reader.is_finished())
    }

    /// All clients go away before the end.
    pub fn leave(self) {
        for (_, pulse) in &self.readers {
            pulse.left.store(true, Ordering::SeqCst);
            pulse.leave.notify_one();
        }
        self.join();
    }

    /// Reads to every end.
    pub fn join(self) -> Round {
        let ends = self.readers.into_iter().map(|(reader, _)| reader.join().expect("a reader"));
        let (answers, gaps): (Vec<_>, Vec<_>) =
            ends.map(|reader| (reader.answer, reader.gap)).unzip();
        Round { answers, longest_gap: gaps.into_iter().max().unwrap_or_default() }
    }
}
