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
    in_own_network, lockstep, repeatable, seconds, signal, wait_for,
};

const DEADLINE: Duration = Duration::from_secs(60);
const MODEL: &str = "qwen2_gqa4_tied_sharded";
const TOKENS: usize = 480;
/// Events of a round by which every stream is under way.
const UNDER_WAY: usize = 60;
/// Between the network's return and an answer, with room for a busy machine: it is 5 s otherwise.
const SERVES_AGAIN: Duration = Duration::from_secs(10);

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
        let network = Network::new(HOSTS);
        let wanted = one_machine(&network);
        let at = format!("{}:2379", Network::address(ETCD));
        let etcd = format!("http://{at}");
        let data = tempfile::tempdir().expect("a folder");
        let mut registry = network.command(ETCD, Path::new("etcd"));
        registry.arg("--data-dir").arg(data.path());
        registry.args(["--listen-client-urls", &etcd, "--advertise-client-urls", &etcd]);
        let registry = Process::spawn(registry.stdout(Stdio::null()).stderr(Stdio::null()));
        wait_for("etcd", DEADLINE, || TcpStream::connect(&at).map(drop), Result::is_ok);
        let [http, grpc] = ports(8000);
        let router = ["router", "--etcd", &etcd, "--http", &http, "--grpc", &grpc];
        let router = network.lockstep(ROUTER, &router);
        let follower = node(&network, FOLLOWER, "1/2", &etcd);
        let leader = node(&network, LEADER, "0/2", &etcd);
        let (spare, _etcd) = (None, (registry, data));
        let cluster = Self { spare, leader, follower, router, http, etcd, wanted, _etcd, network };
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
        Streams::open(&self.http, &repeatable(MODEL, TOKENS))
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
    fn disturb(&self, table: &mut FaultTable, fault: &Fault, lasts: u64) {
        let what = format!("{} for {lasts} s", fault.what);
        let half = Duration::from_secs(lasts) / 2;
        let streams = self.open();
        streams.reach(UNDER_WAY);
        fault.begin(&self.network);
        thread::sleep(half);
        let later = self.open();
        thread::sleep(half);
        fault.end(&self.network);
        let again = self.serves_after(Instant::now());
        let silence = self.check(&what, streams.join()).max(self.check(&what, later.join()));
        let cells = [&*what, "all complete and identical", &seconds(silence), &seconds(again)];
        table.cells(&cells);
        assert!(again < SERVES_AGAIN, "{what}: {again:?}");
        let wait = Duration::from_secs(if self.spare.is_some() { 0 } else { lasts });
        assert!(silence < wait + SERVES_AGAIN, "{what}: {silence:?}");
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

fn one_machine(network: &Network) -> Vec<Answer> {
    let [http, grpc] = ports(8100);
    let up = ["up", "--model", &model(), "--precision", "exact", "--http", &http, "--grpc", &grpc];
    let (_up, _log) = network.lockstep(ROUTER, &up);
    serving(&http, 1);
    let round = Streams::open(&http, &repeatable(MODEL, TOKENS)).join();
    assert!(round.answers.iter().all(|answer| answer.error.is_none()), "{round:?}");
    round.answers
}

fn worker(etcd: &str) -> Vec<String> {
    let own = ["worker", "--etcd", etcd, "--model", &model(), "--precision", "exact"];
    let all = [&own[..], &["--threads", "1", "--kv-memory", "32M"]].concat();
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
    let status = exchange(http, "GET", "/status", b"").json();
    let all = status["models"][0]["workers"].as_array().cloned().unwrap_or_default();
    Ok(all.into_iter().filter(|worker| worker["usable"] == true).count())
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
    in_own_network(Duration::from_secs(3000), || {
        let cluster = Cluster::start();
        matrix(&cluster, "hosts");
        let told = "the leader has not been heard of for 10 s";
        assert!(cluster.follower.log.text().contains(told));
    });
}

#[test]
#[ignore = "20 minutes"]
fn soak_hosts_with_another_worker() {
    in_own_network(Duration::from_secs(3000), || {
        matrix(&Cluster::with_another_worker(), "hosts-spare");
    });
}

#[test]
fn a_group_over_hosts_outlives_cuts_of_its_network() {
    in_own_network(Duration::from_secs(240), || {
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
        assert!(cluster.leader.starts() > 2);
        assert_eq!(cluster.follower.starts(), 1);
    });
}

#[test]
fn a_leader_whose_epoch_is_over_is_heard_by_no_client() {
    in_own_network(Duration::from_secs(240), || {
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
        wait_for("its end", DEADLINE, || cluster.leader.starts(), |starts| *starts > 1);
        let said = cluster.follower.log.text();
        let place = |what: &str| said.find(what).unwrap_or_else(|| panic!("{what}: {said}"));
        let ended = place("the ranks of this node have ended");
        assert!(ended < place("starting the ranks of this node group=\"g\" epoch=2"), "{said}");
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
