//! A cluster on several hosts whose network fails between any two of them, one way or both, for a
//! short time and for longer than a lease: every reader gets what one machine answers, and all
//! serves again soon after the network is whole.

use std::{
    ffi::OsString,
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::json;
use tests::{
    Answer, FaultTable, Log, Network, Process, Round, Streams, Supervised, exchange,
    in_own_network, lockstep, repeatable, seconds, signal, skip, wait_for, workers,
};

const DEADLINE: Duration = Duration::from_secs(60);
const MODEL: &str = "qwen2_gqa4_tied_sharded";
const TOKENS: usize = 480;
/// Events of a round by which every stream is under way.
const UNDER_WAY: usize = 60;
/// Between the network's return and an answer: 5 s at most, and room for a busy machine.
const SERVES_AGAIN: Duration = Duration::from_secs(20);

/// Where the router runs, and the readers, and another worker than the group where there is one.
const ROUTER: usize = 0;
/// Rank 0 of the group.
const LEADER: usize = 1;
/// Ranks 1 and 2.
const FOLLOWER: usize = 2;
const ETCD: usize = 3;
/// Where another rank 0 may run.
const SUCCESSOR: usize = 4;
const HOSTS: usize = 5;

struct Cluster {
    /// Of each answer.
    tokens: usize,
    spare: Option<Process>,
    leader: Supervised,
    follower: Supervised,
    router: (Process, Log),
    http: String,
    etcd: String,
    /// What one machine answers.
    wanted: Vec<Answer>,
    _etcd: (Process, tempfile::TempDir),
    /// The last to go.
    network: Network,
}

impl Cluster {
    fn start() -> Self {
        Self::answering(TOKENS)
    }

    fn answering(tokens: usize) -> Self {
        let network = Network::new(HOSTS);
        let wanted = one_machine(&network, tokens);
        let etcd = format!("http://{}:2379", Network::address(ETCD));
        let [http, grpc] = ports(8000);
        let router = ["router", "--insecure", "--etcd", &etcd, "--http", &http, "--grpc", &grpc];
        let router = network.lockstep(ROUTER, &router);
        let follower = node(&network, FOLLOWER, "1/2", &etcd);
        let leader = node(&network, LEADER, "0/2", &etcd);
        // The last to come: all others wait for it.
        let data = tempfile::tempdir().expect("a folder");
        let mut registry = network.command(ETCD, Path::new("etcd"));
        registry.arg("--data-dir").arg(data.path());
        registry.args(["--listen-client-urls", &etcd, "--advertise-client-urls", &etcd]);
        let registry = Process::spawn(registry.stdout(Stdio::null()).stderr(Stdio::null()));
        let (spare, _etcd) = (None, (registry, data));
        let cluster =
            Self { tokens, spare, leader, follower, router, http, etcd, wanted, _etcd, network };
        cluster.expect(1);
        cluster.check("undisturbed", cluster.open().join());
        cluster
    }

    fn with_another_worker() -> Self {
        let mut cluster = Self::start();
        let flags = worker(&cluster.etcd);
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        cluster.spare = Some(Process::lockstep(&flags));
        cluster.expect(2);
        cluster
    }

    fn open(&self) -> Streams {
        Streams::open(&self.http, &repeatable(MODEL, self.tokens))
    }

    /// Streams that run on every worker: two rounds are more than one takes while another is free.
    fn under_way(&self) -> Vec<Streams> {
        let all = 1 + usize::from(self.spare.is_some());
        let rounds: Vec<Streams> = (0..all).map(|_| self.open()).collect();
        rounds.iter().for_each(|round| round.reach(UNDER_WAY));
        let busy = workers(&self.http).iter().filter(|worker| worker["in_flight"] != 0).count();
        assert_eq!(busy, all, "workers with streams");
        rounds
    }

    /// What every reader got, against what one machine answers; the longest silence.
    fn check(&self, what: &str, round: Round) -> Duration {
        for (got, wanted) in round.answers.iter().zip(&self.wanted) {
            assert_eq!(got, wanted, "{what}");
        }
        round.longest_gap
    }

    /// Waits until the router has so many workers to give.
    fn expect(&self, workers: usize) {
        serving(&self.http, workers);
    }

    /// How long after `healed` every worker was there to stay, and a request that was sent then
    /// was answered: the later of both.
    fn serves_after(&self, healed: Instant) -> Duration {
        let body = json!({"model": MODEL, "prompt": "Once", "max_tokens": 4}).to_string();
        let reply = exchange(&self.http, "POST", "/v1/completions", body.as_bytes());
        assert_eq!(reply.status, 200, "{reply:?}");
        let answered = healed.elapsed();
        let workers = 1 + usize::from(self.spare.is_some());
        let mut since = None;
        loop {
            let now = healed.elapsed();
            assert!(now < DEADLINE, "{workers} workers: not there to stay");
            since = if usable(&self.http) == Ok(workers) { since.or(Some(now)) } else { None };
            match since {
                Some(since) if now > since + Duration::from_secs(1) => return since.max(answered),
                _ => thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// A round that is under way when a fault begins, and one that is sent while it lasts.
    /// How long after its end all served again.
    fn disturb(&self, table: &mut FaultTable, fault: &Fault, lasts: u64) -> Duration {
        let what = format!("{} for {lasts} s", fault.what);
        let half = Duration::from_secs(lasts) / 2;
        let mut rounds = self.under_way();
        fault.begin(&self.network);
        thread::sleep(half);
        rounds.push(self.open());
        thread::sleep(half);
        fault.end(&self.network);
        let again = self.serves_after(Instant::now());
        let ends = rounds.into_iter().map(|round| self.check(&what, round.join()));
        let silence = ends.max().unwrap_or_default();
        let cells = [&*what, "all complete and identical", &seconds(silence), &seconds(again)];
        table.cells(&cells);
        assert!(again < SERVES_AGAIN, "{what}: {again:?}");
        let wait = Duration::from_secs(if self.spare.is_some() { 0 } else { lasts });
        assert!(silence < wait + SERVES_AGAIN, "{what}: {silence:?}");
        again
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if thread::panicking() {
            let logs = [&self.router.1, &self.leader.log, &self.follower.log];
            for (log, name) in logs.into_iter().zip(["router", "leader", "follower"]) {
                let text = log.text();
                let telling = |line: &&str| !line.contains("request ended");
                let lines: Vec<&str> = text.lines().filter(telling).collect();
                let last = lines.len().saturating_sub(60);
                eprintln!("{name}:\n{}\n", lines[last..].join("\n"));
            }
        }
    }
}

fn model() -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("goldens/public").join(MODEL);
    path.to_str().expect("a path in UTF-8").to_owned()
}

/// Two addresses on the router's host.
fn ports(first: u16) -> [String; 2] {
    [first, first + 1].map(|port| format!("{}:{port}", Network::address(ROUTER)))
}

fn one_machine(network: &Network, tokens: usize) -> Vec<Answer> {
    let [http, grpc] = ports(8100);
    let model = ["up", "--model", &model(), "--precision", "exact"];
    let ports = ["--insecure", "--http", &http, "--grpc", &grpc];
    let (_up, _log) = network.lockstep(ROUTER, &[&model[..], &ports].concat());
    serving(&http, 1);
    let round = Streams::open(&http, &repeatable(MODEL, tokens)).join();
    assert!(round.answers.iter().all(|answer| answer.error.is_none()), "{round:?}");
    round.answers
}

fn worker(etcd: &str) -> Vec<String> {
    let own = ["worker", "--insecure", "--etcd", etcd, "--model", &model(), "--precision", "exact"];
    let all = [&own[..], &["--threads", "1", "--kv-memory", "256M"]].concat();
    all.into_iter().map(str::to_owned).collect()
}

/// One machine of the group, with a rank on the first and two on the second.
fn node(network: &Network, host: usize, place: &str, etcd: &str) -> Supervised {
    let known = network.command(host, &lockstep());
    let program = known.get_program().to_owned();
    let group = ["--group", "g", "--nodes", place, "--node-ranks", "1,2", "--tp", "3"];
    let mut words: Vec<OsString> = known.get_args().map(ToOwned::to_owned).collect();
    words.extend(worker(etcd).into_iter().map(OsString::from));
    words.extend(group.map(OsString::from));
    Supervised::start(move || {
        let mut command = Command::new(&program);
        command.args(&words).stdout(Stdio::null());
        command
    })
}

/// How many workers the router has to give.
fn usable(http: &str) -> Result<usize, String> {
    TcpStream::connect(http).map_err(|error| error.to_string())?;
    Ok(workers(http).iter().filter(|worker| worker["usable"] == true).count())
}

fn serving(http: &str, workers: usize) {
    let what = format!("{workers} workers");
    wait_for(&what, DEADLINE, || usable(http), |found| *found == Ok(workers));
}

/// What is wrong with the network.
struct Fault {
    what: String,
    how: How,
}

enum How {
    /// What is sent from one host to the other is lost, for each of these.
    Lost(Vec<(usize, usize)>),
    /// A host is without its cable.
    Unplugged(usize),
}

impl Fault {
    /// Both ways between two hosts, and each alone.
    fn between((a, from): (&str, usize), (b, to): (&str, usize)) -> [Self; 3] {
        [
            (format!("{a} and {b} cut off from each other"), vec![(from, to), (to, from)]),
            (format!("what {a} sends to {b} lost"), vec![(from, to)]),
            (format!("what {b} sends to {a} lost"), vec![(to, from)]),
        ]
        .map(|(what, ways)| Self { what, how: How::Lost(ways) })
    }

    fn unplugged((name, host): (&str, usize)) -> Self {
        Self { what: format!("{name} cut off from all"), how: How::Unplugged(host) }
    }

    fn all() -> Vec<Self> {
        let [router, leader] = [("router", ROUTER), ("leader", LEADER)];
        let [follower, etcd] = [("follower", FOLLOWER), ("etcd", ETCD)];
        let pairs = [
            (router, leader),
            (leader, follower),
            (leader, etcd),
            (follower, etcd),
            (router, etcd),
        ];
        let cuts = pairs.into_iter().flat_map(|(a, b)| Self::between(a, b));
        cuts.chain([leader, follower, etcd].map(Self::unplugged)).collect()
    }

    fn begin(&self, network: &Network) {
        match &self.how {
            How::Lost(ways) => ways.iter().for_each(|&(from, to)| network.cut(from, to)),
            How::Unplugged(host) => network.unplug(*host),
        }
    }

    fn end(&self, network: &Network) {
        match &self.how {
            How::Lost(ways) => ways.iter().for_each(|&(from, to)| network.heal(from, to)),
            How::Unplugged(host) => network.plug(*host),
        }
    }
}

fn table(section: &'static str) -> FaultTable {
    FaultTable::with(section, &["fault", "streams", "longest silence", "serves again after"])
}

/// Runs `body` where there are hosts and an etcd.
fn on_hosts(limit: Duration, body: impl FnOnce()) {
    match Command::new("etcd").arg("--version").output() {
        Ok(_) => in_own_network(limit, body),
        Err(_) => skip("etcd, of the package etcd-server").unwrap_or_default(),
    }
}

/// Every fault, for a short time and for longer than a lease.
fn matrix(cluster: &Cluster, section: &'static str) {
    let mut table = table(section);
    for fault in Fault::all() {
        for lasts in [3, 20] {
            cluster.disturb(&mut table, &fault, lasts);
        }
    }
    table.finish();
}

#[test]
#[ignore = "20 minutes"]
fn soak_hosts_alone() {
    on_hosts(Duration::from_secs(3000), || {
        let cluster = Cluster::start();
        matrix(&cluster, "hosts");
        let told = "the leader has not been heard of for 10 s";
        assert!(cluster.follower.log.text().contains(told));
    });
}

#[test]
#[ignore = "20 minutes"]
fn soak_hosts_with_another_worker() {
    on_hosts(Duration::from_secs(3000), || {
        matrix(&Cluster::with_another_worker(), "hosts-spare");
    });
}

/// What waits may have waited for long, or just begun, when the network is back.
#[test]
#[ignore = "8 minutes"]
fn soak_hosts_for_other_times() {
    on_hosts(Duration::from_secs(3000), || {
        let cluster = Cluster::start();
        let lengths = [1, 2, 5, 6, 7, 9, 11, 13, 15];
        let mut rows = FaultTable::with("hosts-times", &["fault", "serves again after, at most"]);
        let [router, leader] = [("router", ROUTER), ("leader", LEADER)];
        let follower = ("follower", FOLLOWER);
        let pairs = [(router, leader), (leader, follower)];
        let cuts = pairs.into_iter().flat_map(|(a, b)| Fault::between(a, b).into_iter().take(1));
        for fault in cuts.chain([leader, follower].map(Fault::unplugged)) {
            let again = lengths.map(|lasts| cluster.disturb(&mut table("hosts"), &fault, lasts));
            let longest = again.into_iter().max().unwrap_or_default();
            let times = lengths.map(|lasts| lasts.to_string()).join(", ");
            rows.cells(&[&format!("{} for {times} s", fault.what), &seconds(longest)]);
        }
        rows.finish();
    });
}

/// A leader that etcd alone does not hear has streams and ranks until another leads, not longer.
#[test]
#[ignore = "2 minutes"]
fn soak_hosts_led_by_two() {
    on_hosts(Duration::from_secs(600), || {
        let cluster = Cluster::answering(3000);
        let rounds: Vec<Streams> = (0..5).map(|_| cluster.open()).collect();
        rounds.iter().for_each(|round| round.reach(UNDER_WAY));
        let [cut, ..] = Fault::between(("leader", LEADER), ("etcd", ETCD));
        cut.begin(&cluster.network);
        cluster.expect(0);
        let broke = || cluster.router.1.text().matches("stream broke; resuming").count();
        assert_eq!(broke(), 0, "they run on");
        let successor = node(&cluster.network, SUCCESSOR, "0/2", &cluster.etcd);
        cluster.expect(1);
        rounds.into_iter().for_each(|round| {
            cluster.check("led by two", round.join());
        });
        assert!(broke() > 0, "none was under way any more");
        cut.end(&cluster.network);
        let told = "is led already, in epoch 2";
        wait_for(
            "no second leader",
            DEADLINE,
            || cluster.leader.log.text(),
            |log| log.contains(told),
        );
        drop(successor);
        let again = cluster.serves_after(Instant::now());
        assert!(again < SERVES_AGAIN, "{again:?}");
    });
}

#[test]
fn a_group_over_hosts_outlives_cuts_of_its_network() {
    on_hosts(Duration::from_secs(240), || {
        let cluster = Cluster::start();
        let mut table = table("");
        let [router, leader] = [("router", ROUTER), ("leader", LEADER)];
        let follower = ("follower", FOLLOWER);
        let [_, one_way, _] = Fault::between(router, leader);
        cluster.disturb(&mut table, &one_way, 3);
        let [both, ..] = Fault::between(leader, follower);
        cluster.disturb(&mut table, &both, 4);
        let told = "it has not been heard of for 2 s";
        assert!(cluster.leader.log.text().contains(told));
        cluster.disturb(&mut table, &Fault::unplugged(leader), 6);
        // Nobody had to start anything again, or load what was there.
        assert_eq!([cluster.leader.starts(), cluster.follower.starts()], [1, 1]);
    });
}

#[test]
fn a_leader_whose_epoch_is_over_is_heard_by_no_client() {
    on_hosts(Duration::from_secs(240), || {
        let cluster = Cluster::start();
        let first = cluster.leader.pid();
        let streams = cluster.open();
        streams.reach(UNDER_WAY);
        // It stands still with its streams' tokens, until etcd has forgotten it and another leads.
        signal(first, "STOP");
        cluster.expect(0);
        let successor = node(&cluster.network, SUCCESSOR, "0/2", &cluster.etcd);
        cluster.expect(1);
        signal(first, "CONT");
        cluster.check("streams of an epoch that is over", streams.join());
        let said = cluster.follower.log.text();
        assert!(said.contains("bringing this node's ranks group=\"g\" epoch=2"), "{said}");
        // Whoever comes back does not lead while another does, and leads after it.
        let told = "is led already, in epoch 2";
        let look = || cluster.leader.log.text();
        wait_for("no second leader", DEADLINE, look, |log| log.contains(told));
        cluster.check("led by another", cluster.open().join());
        drop(successor);
        let again = cluster.serves_after(Instant::now());
        assert!(again < SERVES_AGAIN, "{again:?}");
        cluster.check("led by the first host again", cluster.open().join());
    });
}
