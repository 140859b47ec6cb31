//! The router's logic against workers in memory, on a clock that jumps to whatever happens next.
//!
//! A seed gives a schedule: workers, what befalls them and when, requests and their clients. Each
//! schedule takes some milliseconds, so that thousands of interleavings are tried. Whatever
//! happens, each token comes once and in order, every request ends, and nothing is left behind.
//! A failure names its seed; `LOCKSTEP_SEED=N` runs it alone. Tasks that wake at the same moment
//! may do so in another order then: run it some times.

mod client;
mod net;
mod worker;
mod world;

use client::{Client, End};
use std::{
    collections::BTreeMap,
    env,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};
use world::World;

/// Numbers that follow from a seed: SplitMix64.
struct Draw(u64);

impl Draw {
    fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    /// A time below `end`, in milliseconds.
    fn time(&mut self, end: u64) -> Duration {
        Duration::from_millis(self.below(end))
    }
}

/// What a schedule came to.
#[derive(Default)]
struct Outcome {
    ends: BTreeMap<String, usize>,
    faults: usize,
    resumes: u64,
    violations: Vec<String>,
}

/// How requests ended that did not end whole, without the names and numbers.
fn kind(end: &End) -> String {
    match end {
        End::Whole => "whole".to_owned(),
        End::Cancelled => "cancelled by the client".to_owned(),
        End::Failed(error) => {
            let known = ["overloaded", "may be what breaks", "the stream broke"];
            let known = known.into_iter().find(|part| error.contains(part));
            known.map_or_else(|| error.clone(), str::to_owned)
        }
    }
}

fn run(seed: u64) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let mut draw = Draw::new(seed);
        let world = World::new(&mut draw);
        let clients = (0..3 + draw.below(12)).map(|at| Client::new(at, &mut draw));
        let clients: Vec<_> =
            clients.map(|client| tokio::spawn(client.run(world.clone()))).collect();
        let faults = world.befall(&mut draw).await;
        let mut outcome = Outcome { faults, ..Outcome::default() };
        for client in clients {
            let end = client.await.expect("a client that does not panic");
            *outcome.ends.entry(kind(&end)).or_default() += 1;
        }
        outcome.violations.extend(world.left_behind().await);
        outcome.resumes = world.upstream.metrics.resumes.get();
        outcome
    })
}

/// Runs schedules from a seed on, on two threads; tells of what breaks the rules.
fn schedules(first: u64, count: u64) {
    let started = Instant::now();
    let next = AtomicU64::new(first);
    let each = || {
        let mut all = Outcome::default();
        loop {
            let seed = next.fetch_add(1, Relaxed);
            if seed >= first + count {
                return all;
            }
            let outcome = run(seed);
            all.faults += outcome.faults;
            all.resumes += outcome.resumes;
            for (kind, number) in outcome.ends {
                *all.ends.entry(kind).or_default() += number;
            }
            let told = outcome.violations.into_iter();
            all.violations.extend(told.map(|what| format!("seed {seed}: {what}")));
        }
    };
    let outcomes: Vec<Outcome> = thread::scope(|scope| {
        let threads: Vec<_> = (0..2).map(|_| scope.spawn(each)).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    let mut ends: BTreeMap<String, usize> = BTreeMap::new();
    for (kind, number) in outcomes.iter().flat_map(|outcome| &outcome.ends) {
        *ends.entry(kind.clone()).or_default() += number;
    }
    let faults: usize = outcomes.iter().map(|outcome| outcome.faults).sum();
    let resumes: u64 = outcomes.iter().map(|outcome| outcome.resumes).sum();
    let took = started.elapsed();
    println!("{count} schedules, {faults} faults, {resumes} resumes in {took:?}: {ends:#?}");
    let violations: Vec<_> = outcomes.into_iter().flat_map(|outcome| outcome.violations).collect();
    assert!(violations.is_empty(), "{}", violations.join("\n"));
    assert!(ends["whole"] > count as usize && resumes > count / 4, "too little happened");
}

#[test]
fn whatever_befalls_workers_each_token_comes_once_and_every_request_ends() {
    let Some(seed) = env::var("LOCKSTEP_SEED").ok() else { return schedules(0, 2000) };
    let lines = tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).with_test_writer();
    let _lines = tracing::subscriber::set_default(lines.without_time().finish());
    let outcome = run(seed.parse().expect("LOCKSTEP_SEED is a number"));
    println!("{:#?}", outcome.ends);
    assert!(outcome.violations.is_empty(), "{:#?}", outcome.violations);
}

#[test]
#[ignore = "takes minutes"]
fn soak_schedules_by_the_ten_thousand() {
    schedules(1_000_000, 10_000);
}
