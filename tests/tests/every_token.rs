//! Whoever is lost, at whichever token: every stream goes on as if nothing had happened.
//!
//! One group answers requests of every kind, over HTTP and gRPC at once. At a chosen token one of
//! its processes is killed or stopped while its successor starts: all streams move.

use std::{
    collections::BTreeSet,
    thread,
    time::{Duration, Instant},
};

use tests::{Answer, Cluster, FaultTable, Process, Streams, etcd, repeatable, seconds, signal};

const TOKENS: usize = 64;
const GROUP: [&str; 2] = ["--tp", "2"];
/// A stopped process is noticed after 2.5 s, a stopped rank after 2 s: the rest is what it takes
/// to go on elsewhere, on a machine that does much else.
const STOPPED_GAP_MAX: Duration = Duration::from_secs(6);
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

    fn signal(self, group: &Process, name: &str) {
        let ranks = group.children();
        assert_eq!(ranks.len(), 1, "a group of two");
        if self != Self::Leader {
            signal(ranks[0], name);
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
    _etcd: (Process, tempfile::TempDir),
}

impl Scene {
    fn start() -> Option<Self> {
        let (etcd, endpoint, data) = etcd()?;
        let cluster = Cluster::start(&endpoint);
        let group = cluster.worker(&GROUP);
        cluster.expect(&[&group]);
        let wanted = Vec::new();
        let mut scene = Self { cluster, group, wanted, rounds: 0, _etcd: (etcd, data) };
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
        let streams = self.open(&id);
        streams.reach_token(0);
        let (round, next) = thread::scope(|scope| {
            let next = scope.spawn(|| self.cluster.worker(&GROUP));
            streams.reach_token(token);
            victim.signal(&self.group, name);
            (streams.join(), next.join().expect("a worker"))
        });
        self.group = next;
        round.check(&format!("{victim:?} got {name} at token {token}"), &self.wanted);
        self.cluster.expect(&[&self.group]);
        (round.longest_gap, broken(&self.cluster.log(), &format!("{id}-")))
    }

    /// Losses of one kind at many tokens.
    fn rounds(
        &mut self,
        table: &mut FaultTable,
        (who, victim): (&str, Victim),
        name: &str,
        tokens: &[usize],
    ) -> BTreeSet<usize> {
        let began = Instant::now();
        let (mut longest, mut met) = (Duration::ZERO, BTreeSet::new());
        for &token in tokens {
            let (gap, mut at) = self.round(victim, name, token);
            assert!(!at.is_empty() || token + 2 >= TOKENS, "{who} {name} at {token}: none broke");
            longest = longest.max(gap);
            met.append(&mut at);
        }
        let what = match name {
            "KILL" => format!("{who} killed"),
            _ => format!("{who} stopped"),
        };
        let (rounds, places) = (tokens.len().to_string(), met.len().to_string());
        table.cells(&[&what, &rounds, &places, "all complete and identical", &seconds(longest)]);
        println!("{what}: {:?} a round, broken at {met:?}", began.elapsed() / tokens.len() as u32);
        assert!(longest < if name == "KILL" { KILLED_GAP_MAX } else { STOPPED_GAP_MAX });
        met
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
    let mut table = table("tokens");
    let Some(mut scene) = Scene::start() else { return };
    for (at, victim) in Victim::EACH.into_iter().enumerate() {
        // Eight, spread, and others for each victim.
        let tokens: Vec<usize> = (0..8).map(|step| (step * 9 + at * 3) % TOKENS).collect();
        scene.rounds(&mut table, victim, "KILL", &tokens);
    }
    for (at, victim) in Victim::EACH[..2].iter().enumerate() {
        scene.rounds(&mut table, *victim, "STOP", &[17 + at * 20]);
    }
    table.finish();
}

/// Each victim at each token.
fn each(section: &'static str, name: &str) {
    let mut table = table(section);
    let Some(mut scene) = Scene::start() else { return };
    for victim in Victim::EACH {
        let all: Vec<usize> = (0..TOKENS).collect();
        let met = scene.rounds(&mut table, victim, name, &all);
        let missed: Vec<usize> = (0..TOKENS - 1).filter(|token| !met.contains(token)).collect();
        assert!(missed.is_empty(), "no stream broke at {missed:?}");
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
