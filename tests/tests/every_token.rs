//! Whoever is lost, at whichever token: every stream goes on as if nothing had happened.
//!
//! One group answers requests of every kind, over HTTP and gRPC at once. At a chosen token one of
//! its processes is killed or stopped while its successor starts: all streams move.

use std::{
    collections::BTreeSet,
    thread,
    time::{Duration, Instant},
};

use tests::{Answer, Cluster, FaultTable, Process, Streams, repeatable, seconds, signal};

const TOKENS: usize = 64;
const GROUP: [&str; 2] = ["--tp", "2"];
/// A stopped process is noticed after 2.5 s, a stopped rank after 2 s: the rest is what it takes
/// to go on elsewhere, on a machine that does much else.
const STOPPED_GAP_MAX: Duration = Duration::from_secs(6);
/// Further rounds for tokens that the first ones missed.
const AIMS_MAX: usize = 200;
const KILLED_GAP_MAX: Duration = Duration::from_secs(4);

/// Who is lost of a group.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Victim {
    Leader,
    Rank,
    All,
}

impl Victim {
    const EACH: [(&'static str, Self); 3] =
        [("the leader", Self::Leader), ("another rank", Self::Rank), ("all of it", Self::All)];

    /// At once: looking for the rank would take longer than some tokens.
    fn signal(self, group: &Process, rank: u32, name: &str) {
        if self != Self::Leader {
            signal(rank, name);
        }
        if self != Self::Rank {
            group.signal(name);
        }
    }
}

struct Scene {
    cluster: Cluster,
    group: Process,
    wanted: Vec<Answer>,
    rounds: usize,
}

impl Scene {
    fn start() -> Option<Self> {
        let cluster = Cluster::with_etcd()?;
        let group = cluster.worker(&GROUP);
        cluster.expect(&[&group]);
        let wanted = Vec::new();
        let mut scene = Self { cluster, group, wanted, rounds: 0 };
        let round = scene.open("undisturbed").join();
        assert!(round.answers.iter().all(|answer| answer.error.is_none()), "{round:?}");
        scene.wanted = round.answers;
        Some(scene)
    }

    fn open(&self, name: &str) -> Streams {
        Streams::open_both(self.cluster.router(), name, &repeatable("", TOKENS))
    }

    /// A loss at a token; the longest silence, and what streams had received when they broke.
    fn round(&mut self, victim: Victim, name: &str, token: usize) -> (Duration, BTreeSet<usize>) {
        self.rounds += 1;
        let id = format!("r{}", self.rounds);
        let [rank] = self.group.children()[..] else { panic!("a group of two") };
        let streams = self.open(&id);
        // Answers are accepted with their first token: in front of it, some time has to do.
        match token {
            0 => thread::sleep(Duration::from_millis(2 * (self.rounds as u64 % 8))),
            _ => streams.reach_token(1),
        }
        let (round, next) = thread::scope(|scope| {
            let next = scope.spawn(|| self.cluster.worker(&GROUP));
            if token > 0 {
                streams.reach_token(token);
            }
            victim.signal(&self.group, rank, name);
            (streams.join(), next.join().expect("a worker"))
        });
        self.group = next;
        // A rank that is stopped does not see that its leader has ended.
        if (victim, name) == (Victim::All, "STOP") {
            signal(rank, "KILL");
        }
        round.check(&format!("{victim:?} got {name} at token {token}"), &self.wanted);
        self.cluster.expect(&[&self.group]);
        (round.longest_gap, broken(&self.cluster.log(), &format!("{id}-")))
    }
}

/// What came of rounds with one victim.
#[derive(Default)]
struct Score {
    rounds: usize,
    longest: Duration,
    /// Tokens at which streams broke.
    met: BTreeSet<usize>,
}

impl Score {
    fn add(&mut self, (gap, mut met): (Duration, BTreeSet<usize>)) {
        self.rounds += 1;
        self.longest = self.longest.max(gap);
        self.met.append(&mut met);
    }

    fn tell(&self, table: &mut FaultTable, who: &str, name: &str, began: Instant) {
        let what = match name {
            "KILL" => format!("{who} killed"),
            _ => format!("{who} stopped"),
        };
        let Self { rounds, longest, met } = self;
        let (count, places) = (rounds.to_string(), met.len().to_string());
        table.cells(&[&what, &count, &places, "all complete and identical", &seconds(*longest)]);
        println!("{what}: {:?} a round, broken at {met:?}", began.elapsed() / *rounds as u32);
        assert!(*longest < if name == "KILL" { KILLED_GAP_MAX } else { STOPPED_GAP_MAX });
    }
}

/// Tokens received by streams of one round when they broke, as the router tells it.
fn broken(log: &str, id: &str) -> BTreeSet<usize> {
    let lines = log.lines().filter(|line| line.contains("stream broke") && line.contains(id));
    let received =
        |line: &str| line.split("received=").nth(1)?.split_whitespace().next()?.parse().ok();
    lines.filter_map(received).collect()
}

fn table(section: &'static str) -> FaultTable {
    let columns = ["fault", "rounds", "different tokens", "streams", "longest silence"];
    FaultTable::with(section, &columns)
}

#[test]
fn a_loss_at_any_token_changes_no_answer() {
    let mut table = table("");
    let Some(mut scene) = Scene::start() else { return };
    for (at, victim) in Victim::EACH.into_iter().enumerate() {
        // Eight, spread, and others for each victim. On a fast machine a signal may come too late.
        let (began, mut score, mut hits) = (Instant::now(), Score::default(), 0);
        for token in (0..8).map(|step| 1 + step * 8 + at * 3) {
            let (gap, met) = scene.round(victim.1, "KILL", token);
            hits += usize::from(!met.is_empty());
            score.add((gap, met));
        }
        assert!(hits >= 4, "{victim:?}: streams broke in {hits} rounds of 8 alone");
        score.tell(&mut table, victim.0, "KILL", began);
    }
    for (at, (who, victim)) in Victim::EACH[..2].iter().enumerate() {
        let (began, mut score) = (Instant::now(), Score::default());
        score.add(scene.round(*victim, "STOP", 17 + at * 20));
        score.tell(&mut table, who, "STOP", began);
    }
}

/// Each victim at each token: rounds aim at it until a stream did break there.
fn each(section: &'static str, name: &str) {
    let mut table = table(section);
    let Some(mut scene) = Scene::start() else { return };
    for (who, victim) in Victim::EACH {
        let (began, mut score) = (Instant::now(), Score::default());
        for token in 0..TOKENS {
            score.add(scene.round(victim, name, token));
        }
        // A signal sent at a token hits a stream at it or a little later, or before its first.
        for round in 0..AIMS_MAX {
            let missed = (0..TOKENS - 1).find(|token| !score.met.contains(token));
            let Some(missed) = missed else { break };
            score.add(scene.round(victim, name, missed.saturating_sub(round % 4)));
        }
        score.tell(&mut table, who, name, began);
        let missed: Vec<usize> =
            (0..TOKENS - 1).filter(|token| !score.met.contains(token)).collect();
        assert!(missed.is_empty(), "{who}: no stream broke at {missed:?}");
    }
    table.finish();
}

#[test]
#[ignore = "takes minutes: ./dev soak tokens"]
fn soak_tokens_a_kill_at_each() {
    each("tokens-killed", "KILL");
}

#[test]
#[ignore = "takes minutes: ./dev soak tokens"]
fn soak_tokens_a_stop_at_each() {
    each("tokens-stopped", "STOP");
}
