//! Each fault in each phase of a request's life: what its client sees, and for how long nothing.

use std::{
    process::Command,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tests::{
    Answer, Cluster, FaultTable, Process, Round, Streams, address, lockstep, metric, seconds,
    signal, wait_for,
};

const DEADLINE: Duration = Duration::from_secs(60);
const TOKENS: usize = 64;
/// A stopped process is noticed after 2.5 s: the rest is what going on takes, with a long prompt on
/// a machine that does much else.
const GAP_MAX: Duration = Duration::from_secs(15);
/// What nobody waits for any more ends in this time.
const FREE: Duration = Duration::from_secs(5);
const GROUP: [&str; 4] = ["--tp", "2", "--sequences", "2"];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    /// Accepted by a worker, behind others.
    Line,
    Prefill,
    Decode,
    /// One token is missing, or was not when the fault came.
    LastToken,
}

const PHASES: [Phase; 4] = [Phase::Line, Phase::Prefill, Phase::Decode, Phase::LastToken];
const COLUMNS: [&str; 5] = ["fault", "waiting in line", "prefill", "decode", "last token"];

impl Phase {
    /// A request to be met in this phase.
    fn request(self) -> Value {
        let prompt: String = match self {
            Self::Prefill => (0..LONG_PROMPT).map(|at| format!("{} ", at * 7919 % 1000)).collect(),
            _ => format!("Of {self:?}. Once upon a time"),
        };
        json!({
            "prompt": prompt, "max_tokens": TOKENS, "temperature": 0.9, "seed": 7, "logprobs": 1,
            "ignore_eos": true, "stream": true, "stream_options": {"include_usage": true},
        })
    }
}

/// Words of a prompt that takes about a second to compute.
const LONG_PROMPT: usize = 2000;

/// A request that keeps a place of a worker for a while.
fn ahead() -> Value {
    let mut request = Phase::Line.request();
    request["prompt"] = "A long story".into();
    request["max_tokens"] = 600.into();
    request
}

/// What takes a group's process away, or tells it to go.
type Blow = fn(&Process);

const BLOWS: [(&str, Blow); 4] = [
    ("leader killed", |group| group.signal("KILL")),
    ("another rank killed", |group| signal(group.children()[0], "KILL")),
    ("leader stopped", |group| group.signal("STOP")),
    ("another rank stopped", |group| signal(group.children()[0], "STOP")),
];

/// These end in order.
const FAREWELLS: [(&str, Blow); 2] = [
    ("worker gets SIGTERM", |group| group.signal("TERM")),
    ("`lockstep drain WORKER`", |group| {
        let mut drain = Command::new(lockstep());
        let (status, _) = Process::run(drain.args(["drain", address(group)]), DEADLINE);
        assert!(status.success(), "{status}");
    }),
];

/// A router and its only group.
struct Scene {
    cluster: Cluster,
    group: Process,
    /// Of each phase, undisturbed.
    wanted: Vec<(Phase, Vec<Answer>)>,
}

impl Scene {
    fn start() -> Option<Self> {
        let cluster = Cluster::with_etcd()?;
        let group = cluster.worker(&GROUP);
        cluster.expect(&[&group]);
        let mut scene = Self { cluster, group, wanted: Vec::new() };
        for phase in PHASES {
            let (answers, _) = ended(scene.open(phase));
            assert!(answers.iter().all(|answer| answer.error.is_none()), "{answers:?}");
            scene.wanted.push((phase, answers));
        }
        Some(scene)
    }

    /// The requests of a phase, and behind them those that stand before them.
    fn open(&self, phase: Phase) -> Vec<Streams> {
        let open = |requests: &[Value]| Streams::open_both(self.cluster.router(), "m", requests);
        if phase != Phase::Line {
            return vec![open(&[phase.request()])];
        }
        let ahead = open(&[ahead()]);
        ahead.reach_token(1);
        vec![open(&[phase.request()]), ahead]
    }

    /// Requests that are in a phase now.
    fn reach(&self, phase: Phase) -> Vec<Streams> {
        let streams = self.open(phase);
        let seen = |name: &str, count: f64| {
            let look = || metric(self.cluster.http(), name);
            wait_for(name, DEADLINE, look, |seen| *seen >= count);
        };
        match phase {
            Phase::Line => seen("lockstep_router_in_flight", 4.0),
            Phase::Prefill => seen("lockstep_router_prefilling", 1.0),
            Phase::Decode => streams[0].reach_token(20),
            Phase::LastToken => streams[0].reach_token(TOKENS - 1),
        }
        streams
    }

    fn check(&self, what: &str, phase: Phase, answers: &[Answer]) {
        let (_, wanted) = self.wanted.iter().find(|(known, _)| *known == phase).expect("known");
        assert_eq!(answers, wanted, "{what}, {phase:?}");
    }

    /// Another group, which has computed nothing, is the only one from now on.
    fn renew(&mut self) {
        let next = self.cluster.worker(&GROUP);
        drop(std::mem::replace(&mut self.group, next));
        self.cluster.expect(&[&self.group]);
    }

    /// A group is lost while another starts: how long nothing came, and what is left of it.
    fn lose(&mut self, what: &str, blow: Blow, phase: Phase) -> (Duration, Process) {
        let streams = self.reach(phase);
        let next = thread::scope(|scope| {
            scope.spawn(|| blow(&self.group));
            self.cluster.worker(&GROUP)
        });
        let before = std::mem::replace(&mut self.group, next);
        let (answers, gap) = ended(streams);
        self.check(what, phase, &answers);
        (gap, before)
    }

    fn client_gone(&mut self, phase: Phase) -> String {
        self.renew();
        let streams = self.reach(phase);
        let began = Instant::now();
        streams.into_iter().for_each(Streams::leave);
        let states = ["running", "waiting"].map(|it| format!("lockstep_worker_sequences_{it}"));
        let busy = || states.each_ref().map(|name| metric(address(&self.group), name));
        wait_for("a free worker", DEADLINE, busy, |busy| *busy == [0.0, 0.0]);
        let free = began.elapsed();
        assert!(free < FREE, "{phase:?}: {free:?}");
        format!("worker free, {}", seconds(free))
    }

    fn router_killed(&mut self, phase: Phase) -> String {
        self.renew();
        let streams = self.reach(phase);
        let began = Instant::now();
        self.cluster.lose_router();
        let (answers, _) = ended(streams);
        let told = began.elapsed();
        // Streams may have had their last token just before.
        let fails = |answer: &Answer| answer.error.is_some();
        assert!(phase == Phase::LastToken || answers.iter().all(fails), "{answers:?}");
        assert!(told < FREE, "{phase:?}: {told:?}");
        self.cluster.start_router();
        self.cluster.expect(&[&self.group]);
        let (again, _) = ended(self.open(phase));
        self.check("asked again", phase, &again);
        format!("breaks off, {}; whole when asked again", seconds(told))
    }
}

/// All answers, and the longest silence of those in the phase.
fn ended(streams: Vec<Streams>) -> (Vec<Answer>, Duration) {
    let mut rounds: Vec<Round> = streams.into_iter().map(Streams::join).collect();
    let gap = rounds[0].longest_gap;
    (rounds.iter_mut().flat_map(|round| std::mem::take(&mut round.answers)).collect(), gap)
}

/// One more row, from what happens in each phase.
fn row(table: &mut FaultTable, fault: &str, cell: impl FnMut(Phase) -> String) {
    let cells = PHASES.map(cell);
    let all: Vec<&str> = [fault].into_iter().chain(cells.iter().map(String::as_str)).collect();
    table.cells(&all);
}

#[test]
fn every_fault_in_every_phase_has_its_outcome() {
    let mut table = FaultTable::with("matrix", &COLUMNS);
    let Some(mut scene) = Scene::start() else { return };
    for (fault, blow) in BLOWS {
        row(&mut table, fault, |phase| {
            scene.renew();
            let (gap, _) = scene.lose(fault, blow, phase);
            assert!(gap < GAP_MAX, "{fault}, {phase:?}: {gap:?}");
            format!("whole, {}", seconds(gap))
        });
    }
    for (fault, blow) in FAREWELLS {
        row(&mut table, fault, |phase| {
            scene.renew();
            let (gap, mut before) = scene.lose(fault, blow, phase);
            let status = before.wait(DEADLINE);
            assert!(status.success(), "{fault}, {phase:?}: {status}");
            format!("whole, {}", seconds(gap))
        });
    }
    row(&mut table, "client gone", |phase| scene.client_gone(phase));
    row(&mut table, "router killed", |phase| scene.router_killed(phase));
    table.finish();
}

const MOCK_TOKENS: usize = 16;
/// One step lasts a second at most: an engine that freezes is noticed then.
const MOCK: [&str; 8] =
    ["--engine", "mock", "--mock-step-ms", "1", "--sequences", "1", "--step-limit-seconds", "1"];

/// A worker whose engine fails in a phase, and one that does not beside it.
fn mocked(cluster: &Cluster, verb: &str, phase: Phase) -> (Vec<Answer>, Duration) {
    let after = match phase {
        Phase::Line => MOCK_TOKENS / 4,
        Phase::Prefill => 0,
        Phase::Decode => MOCK_TOKENS / 2,
        Phase::LastToken => MOCK_TOKENS - 1,
    };
    let fault = format!("{verb}@{after}");
    let mut failing = cluster.worker(&[&MOCK[..], &["--mock-fault", &fault]].concat());
    cluster.expect(&[&failing]);
    let mut request = phase.request();
    request["max_tokens"] = MOCK_TOKENS.into();
    request["prompt"] = "Once".into();
    // In front of the line is another of the same kind.
    let streams: Vec<Streams> = (0..if phase == Phase::Line { 2 } else { 1 })
        .map(|_| Streams::open(cluster.http(), &[request.clone()]))
        .collect();
    let _sound = cluster.worker(&MOCK);
    let ended = ended(streams);
    match verb {
        "slow" | "nan" => assert!(failing.ended().is_none(), "{verb}, {phase:?}"),
        _ => assert!(!failing.wait(DEADLINE).success(), "{verb}, {phase:?}"),
    }
    ended
}

#[test]
fn every_failure_of_an_engine_has_its_outcome() {
    let Some(cluster) = Cluster::with_etcd() else { return };
    let mut table = FaultTable::with("engines", &COLUMNS);
    let (wanted, _) = mocked(&cluster, "die", Phase::Line);
    assert!(wanted.iter().all(|answer| answer.error.is_none()), "{wanted:?}");
    for (verb, fault) in [
        ("die", "the process ends (`die`)"),
        ("fail", "the group fails (`fail`)"),
        ("freeze", "a step does not end (`freeze`, limit 1 s)"),
        ("slow", "steps take a hundred times as long (`slow`)"),
    ] {
        row(&mut table, fault, |phase| {
            let (answers, gap) = mocked(&cluster, verb, phase);
            assert!(
                answers.iter().all(|answer| *answer == wanted[0]),
                "{verb} {phase:?}: {answers:?}"
            );
            assert!(gap < GAP_MAX, "{verb}, {phase:?}: {gap:?}");
            format!("whole, {}", seconds(gap))
        });
    }
    // This is the request's own: no other worker would do better.
    row(&mut table, "results are no numbers (`nan`)", |phase| {
        let (answers, gap) = mocked(&cluster, "nan", phase);
        let error = answers[0].error.as_deref().unwrap_or_default();
        assert!(
            error.contains("internal: worker: the logits are no numbers"),
            "{phase:?}: {error}"
        );
        format!("error, {}", seconds(gap))
    });
    table.finish();
}
