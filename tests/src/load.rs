//! Clients that ask one request after the other, and check each answer.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use serde_json::Value;

use crate::{Answer, Streams};

/// What came of the requests.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The longest silence of each answer that came whole and right, shortest first.
    pub pauses: Vec<Duration>,
    /// What else came.
    pub failures: Vec<String>,
}

impl Outcome {
    /// The pause that so many of a hundred do not exceed.
    pub fn percentile(&self, percent: usize) -> Duration {
        self.pauses[(self.pauses.len() * percent / 100).min(self.pauses.len() - 1)]
    }

    /// Every answer was whole and right.
    pub fn check(&self, what: &str) {
        let (failures, first) = (self.failures.len(), self.failures.first());
        assert_eq!(failures, 0, "{what}: of {} answers, e.g. {first:?}", self.pauses.len());
    }
}

/// Clients at work.
pub struct Load {
    clients: Vec<JoinHandle<Outcome>>,
    /// Requests asked so far, and how many there are to be.
    asked: Arc<AtomicUsize>,
    limit: Arc<AtomicUsize>,
}

impl Load {
    /// So many clients ask these requests over HTTP in turn, `limit` in all at most, with a rest
    /// behind each answer.
    pub fn start(
        http: &str,
        (clients, rest): (usize, Duration),
        requests: &[Value],
        wanted: &[Answer],
        limit: usize,
    ) -> Self {
        let (asked, limit) = (Arc::<AtomicUsize>::default(), Arc::new(AtomicUsize::new(limit)));
        let client = || {
            let (http, asked, limit) = (http.to_owned(), asked.clone(), limit.clone());
            let (requests, wanted) = (requests.to_vec(), wanted.to_vec());
            thread::spawn(move || {
                let mut outcome = Outcome::default();
                loop {
                    let number = asked.fetch_add(1, Ordering::SeqCst);
                    if number >= limit.load(Ordering::SeqCst) {
                        return outcome;
                    }
                    let at = number % requests.len();
                    let round = Streams::open(&http, &requests[at..=at]).join();
                    match round.answers[0] == wanted[at] {
                        true => outcome.pauses.push(round.longest_gap),
                        false => outcome.failures.push(format!("{:?}", round.answers[0])),
                    }
                    thread::sleep(rest);
                }
            })
        };
        let clients = (0..clients).map(|_| client()).collect();
        Self { clients, asked, limit }
    }

    /// Requests that have been asked.
    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst).min(self.limit.load(Ordering::SeqCst))
    }

    pub fn is_over(&self) -> bool {
        self.clients.iter().all(JoinHandle::is_finished)
    }

    /// Asks nothing further.
    pub fn stop(&self) {
        self.limit.store(0, Ordering::SeqCst);
    }

    /// Waits for the last answer.
    pub fn finish(self) -> Outcome {
        let mut all = Outcome::default();
        for client in self.clients {
            let mut one = client.join().expect("a client");
            all.pauses.append(&mut one.pauses);
            all.failures.append(&mut one.failures);
        }
        all.pauses.sort_unstable();
        all
    }
}
