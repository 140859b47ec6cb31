//! A cluster on several hosts whose network fails between any two of them, one way or both, for a
//! short time and for longer than a lease: every reader gets what one machine answers, and all
//! serves again soon after the network is whole.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::json;
use tests::{
    Answer, Log, Network, Process, Round, Streams, Supervised, address, exchange,
    in_own_network, lockstep, repeatable, wait_for,
};

const DEADLINE: Duration = Duration::from_secs(60);
const MODEL: &str = "qwen2_gqa4_tied_sharded";
const TOKENS: usize = 160;
/// Events of a round by which every stream is under way.
const UNDER_WAY: usize = 120;

/// Where the router runs, and the readers, and another worker than the group where there is one.
const ROUTER: usize = 0;
/// Rank 0 of the group.
const LEADER: usize = 1;
/// Ranks 1 and 2.
const FOLLOWER: usize = 2;
const ETCD: usize = 3;
const HOSTS: usize = 4;

fn model() -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("goldens/public").join(MODEL);
    path.to_str().expect("a path in UTF-8").to_owned()
}

struct Cluster {
    spare: Option<Process>,
    leader: Supervised,
    follower: Supervised,
    router: (Process, Log),
    http: String,
    url: String,
    /// What one machine answers.
    wanted: Vec<Answer>,
    _etcd: (Process, tempfile::TempDir),
    /// The last to go.
    network: Network,
}

impl Cluster {
    fn start() -> Self {
        let network = Network::new(HOSTS);
        let url = format!("http://{}:2379", address(ETCD));
        let data = tempfile::tempdir().expect("a folder");
        let mut etcd = network.command(ETCD, Path::new("etcd"));
        etcd.arg("--data-dir").arg(data.path());
        etcd.args(["--listen-client-urls", &url, "--advertise-client-urls", &url]);
        let etcd = Process::spawn(etcd.stdout(Stdio::null()).stderr(Stdio::null()));
        let at = |port| format!("{}:{port}", address(ROUTER));
        let wanted = {
            let [http, grpc] = [at(8100), at(8101)];
            let up = ["up", "--model", &model(), "--precision", "exact"];
            let up = [&up[..], &["--http", &http, "--grpc", &grpc]].concat();
            let (_up, _log) = network.lockstep(ROUTER, &up);
            serving(&http, 1);
            round(&http).join()
        };
        let [http, grpc] = [at(8000), at(8001)];
        let router = ["router", "--etcd", &url, "--http", &http, "--grpc", &grpc];
        let router = network.lockstep(ROUTER, &router);
        let node = |host, place: &str| {
            let group = ["--group", "g", "--nodes", place, "--node-ranks", "1,2", "--tp", "3"];
            supervised(&network, host, &[&worker(&url), &words(&group)[..]].concat())
        };
        let (follower, leader) = (node(FOLLOWER, "1/2"), node(LEADER, "0/2"));
        let _etcd = (etcd, data);
        let wanted = whole(wanted);
        let cluster = Self { spare: None, leader, follower, router, http, url, wanted, _etcd, network };
        serving(&cluster.http, 1);
        cluster.check("undisturbed", round(&cluster.http).join());
        cluster
    }

    /// What every reader got, against what one machine answers; the longest silence.
    fn check(&self, what: &str, round: Round) -> Duration {
        for (got, wanted) in round.answers.iter().zip(&self.wanted) {
            assert_eq!(got, wanted, "{what}");
        }
        round.longest_gap
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if thread::panicking() {
            let logs = [&self.router.1, &self.leader.log, &self.follower.log];
            logs.into_iter().zip(["router", "leader", "follower"]).for_each(|(log, name)| {
                eprintln!("{name}:\n{}", log.text());
            });
        }
    }
}

fn words(given: &[&str]) -> Vec<String> {
    given.iter().map(|word| (*word).to_owned()).collect()
}

fn worker(etcd: &str) -> Vec<String> {
    let own = ["worker", "--etcd", etcd, "--model", &model(), "--precision", "exact"];
    words(&[&own[..], &["--threads", "1", "--kv-memory", "4M"]].concat())
}

fn supervised(network: &Network, host: usize, arguments: &[String]) -> Supervised {
    let program = network.command(host, &lockstep());
    let (program, first): (PathBuf, Vec<_>) =
        (program.get_program().into(), program.get_args().map(ToOwned::to_owned).collect());
    let arguments = arguments.to_vec();
    Supervised::start(move || {
        let mut command = Command::new(&program);
        command.args(&first).args(&arguments).stdout(Stdio::null());
        command
    })
}

fn round(http: &str) -> Streams {
    Streams::open(http, &repeatable(MODEL, TOKENS))
}

fn whole(round: Round) -> Vec<Answer> {
    assert!(round.answers.iter().all(|answer| answer.error.is_none()), "{round:?}");
    round.answers
}

/// How many workers the router has to give.
fn usable(http: &str) -> Result<usize, String> {
    std::net::TcpStream::connect(http).map_err(|error| error.to_string())?;
    let status = exchange(http, "GET", "/status", b"").json();
    let all = status["models"][0]["workers"].as_array().cloned().unwrap_or_default();
    Ok(all.into_iter().filter(|worker| worker["usable"] == true).count())
}

/// Waits until it has so many.
fn serving(http: &str, workers: usize) {
    let all = format!("{workers} workers");
    wait_for(&all, DEADLINE, || usable(http), |found| *found == Ok(workers));
}

/// What was lost on the network: from where to where.
type Cut = (usize, usize);

/// A pair of hosts whose ways to each other fail, and what they are to each other.
const PAIRS: [(&str, &str, Cut); 5] = [
    ("router", "leader", (ROUTER, LEADER)),
    ("leader", "follower", (LEADER, FOLLOWER)),
    ("leader", "etcd", (LEADER, ETCD)),
    ("follower", "etcd", (FOLLOWER, ETCD)),
    ("router", "etcd", (ROUTER, ETCD)),
];

/// Both ways, and each alone.
fn ways((a_name, b_name, (a, b)): (&str, &str, Cut)) -> [(String, Vec<Cut>); 3] {
    [
        (format!("{a_name} and {b_name}"), vec![(a, b), (b, a)]),
        (format!("{a_name} to {b_name}"), vec![(a, b)]),
        (format!("{b_name} to {a_name}"), vec![(b, a)]),
    ]
}

impl Cluster {
    /// Rounds that are under way while a fault begins, lasts for so long, and ends.
    fn disturb(&self, what: &str, hold: Duration, begin: impl FnOnce(), end: impl FnOnce()) {
        let streams = round(&self.http);
        streams.reach(UNDER_WAY);
        let starts = [&self.leader, &self.follower].map(Supervised::starts);
        begin();
        thread::sleep(hold / 2);
        let later = round(&self.http);
        thread::sleep(hold - hold / 2);
        end();
        let healed = Instant::now();
        let answer = thread::spawn({
            let http = self.http.clone();
            move || {
                let body = json!({"model": MODEL, "prompt": "Once", "max_tokens": 4}).to_string();
                let reply = exchange(&http, "POST", "/v1/completions", body.as_bytes());
                assert_eq!(reply.status, 200, "{reply:?}");
                healed.elapsed()
            }
        });
        let usable = self.usable_after(healed);
        let answer = answer.join().expect("an answer");
        let gap = self.check(what, streams.join());
        let later = self.check(what, later.join());
        let ended = [&self.leader, &self.follower].map(Supervised::starts);
        eprintln!(
            "CASE {what} {hold:?} spare={}: usable {usable:.1?} answer {answer:.1?} silence \
             {gap:.1?} later {later:.1?} starts {starts:?} {ended:?}",
            self.spare.is_some()
        );
    }

    /// How long after `healed` all workers were usable, and stayed so.
    fn usable_after(&self, healed: Instant) -> Duration {
        let workers = 1 + usize::from(self.spare.is_some());
        let mut since = None;
        loop {
            let now = healed.elapsed();
            assert!(now < DEADLINE, "not usable");
            let usable = usable(&self.http) == Ok(workers);
            since = if usable { since.or(Some(now)) } else { None };
            match since {
                Some(since) if now > since + Duration::from_secs(1) => return since,
                _ => thread::sleep(Duration::from_millis(50)),
            }
        }
    }
}

#[test]
#[ignore = "long"]
fn soak_hosts() {
    in_own_network(Duration::from_secs(3000), || {
        let mut cluster = Cluster::start();
        let only = std::env::var("ONLY").unwrap_or_default();
        for spare in [false, true] {
            if spare {
                let flags = worker(&cluster.url);
                let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
                cluster.spare = Some(Process::lockstep(&flags));
                serving(&cluster.http, 2);
            }
            for seconds in [3, 20] {
                for (what, cuts) in PAIRS.into_iter().flat_map(ways) {
                    if !format!("{what} {seconds} {spare}").contains(&only) {
                        continue;
                    }
                    let hold = Duration::from_secs(seconds);
                    let network = &cluster.network;
                    cluster.disturb(
                        &what,
                        hold,
                        || cuts.iter().for_each(|&(from, to)| network.cut(from, to)),
                        || cuts.iter().for_each(|&(from, to)| network.heal(from, to)),
                    );
                }
            }
        }
    });
}
