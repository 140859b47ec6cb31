//! Workers of a real cluster that die, stop, lie about their address or are somebody else: no
//! reader gets an error, another token, or waits for long.

use std::time::Duration;

use serde_json::json;
use tests::{FaultTable, Process, Round, Streams, etcd, exchange, repeatable, wait_for, workers};

const DEADLINE: Duration = Duration::from_secs(60);
const PORTS: [&str; 4] = ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];
const TOKENS: usize = 160;
/// Events of a round by which every stream is under way.
const UNDER_WAY: usize = 120;

struct Cluster {
    endpoint: String,
    router: Process,
    /// What undisturbed readers get.
    wanted: Vec<tests::Answer>,
    _etcd: (Process, tempfile::TempDir),
}

fn worker(endpoint: &str, flags: &[&str]) -> Process {
    let own = ["worker", "--model", "demo", "--threads", "1", "--etcd", endpoint];
    Process::lockstep(&[&own[..], flags].concat())
}

impl Cluster {
    /// With a worker that has answered once.
    fn start() -> Option<(Self, Process)> {
        let (process, endpoint, data) = etcd()?;
        let router = Process::lockstep(&[&["router", "--etcd", &endpoint], &PORTS[..]].concat());
        let first = worker(&endpoint, &[]);
        let mut cluster = Self { endpoint, router, wanted: Vec::new(), _etcd: (process, data) };
        cluster.expect(1);
        let round = cluster.open().join();
        assert!(round.answers.iter().all(|answer| answer.error.is_none()), "{round:?}");
        cluster.wanted = round.answers;
        Some((cluster, first))
    }

    fn http(&self) -> &str {
        self.router.address("http")
    }

    fn worker(&self, flags: &[&str]) -> Process {
        worker(&self.endpoint, flags)
    }

    /// Waits until the router has so many workers to give.
    fn expect(&self, wanted: usize) {
        let usable = || workers(self.http()).iter().filter(|w| w["usable"] == true).count();
        wait_for(&format!("{wanted} workers"), DEADLINE, usable, |found| *found == wanted);
    }

    fn open(&self) -> Streams {
        Streams::open(self.http(), &repeatable("", TOKENS))
    }

    /// A round that something happens to once it is under way.
    fn disturbed(&self, table: &mut FaultTable, what: &str, fault: impl FnOnce()) -> Duration {
        let streams = self.open();
        streams.reach(UNDER_WAY);
        fault();
        self.check(table, what, streams.join())
    }

    fn check(&self, table: &mut FaultTable, what: &str, round: Round) -> Duration {
        for (got, wanted) in round.answers.iter().zip(&self.wanted) {
            assert_eq!(got, wanted, "{what}");
        }
        table.row(what, round.longest_gap);
        round.longest_gap
    }
}

#[test]
fn a_worker_that_dies_or_stops_hands_its_streams_on() {
    let mut table = FaultTable::new("workers");
    let Some((cluster, first)) = Cluster::start() else { return };
    let second = cluster.worker(&[]);
    cluster.expect(2);

    let gap = cluster.disturbed(&mut table, "a worker stopped for good", || first.signal("STOP"));
    assert!(gap < Duration::from_secs(8), "{gap:?}");
    cluster.check(&mut table, "new requests while it is stopped", cluster.open().join());
    first.signal("CONT");
    cluster.expect(2);
    let gap = cluster.disturbed(&mut table, "a worker killed", || first.signal("KILL"));
    assert!(gap < Duration::from_secs(4), "{gap:?}");
    drop(first);

    // The only worker, and a successor that comes later than any quick restart.
    let gap = cluster.disturbed(&mut table, "the only worker stopped for a while", || {
        second.signal("STOP");
        std::thread::sleep(Duration::from_secs(5));
        second.signal("CONT");
    });
    assert!(gap < Duration::from_secs(9), "{gap:?}");
    let streams = cluster.open();
    streams.reach(UNDER_WAY);
    second.signal("KILL");
    drop(second);
    std::thread::sleep(Duration::from_secs(13));
    let _third = cluster.worker(&[]);
    cluster.check(&mut table, "the only worker killed, another 13 s later", streams.join());
    table.finish();
}

#[test]
fn an_address_that_leads_elsewhere_is_left_alone() {
    let mut table = FaultTable::new("addresses");
    let Some((cluster, _first)) = Cluster::start() else { return };
    let elsewhere = format!("http://{}", cluster.router.address("grpc"));
    // One that swallows packets: nobody accepts, and the line in front of it is full.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let swallows = format!("http://{}", silent.local_addr().expect("an address"));
    let _lost = [&elsewhere, &swallows].map(|address| cluster.worker(&["--advertise", address]));
    for round in ["first", "second"] {
        let what = format!("beside another server and one that says nothing, {round} round");
        let gap = cluster.check(&mut table, &what, cluster.open().join());
        assert!(gap < Duration::from_secs(4), "{gap:?}");
    }
    table.finish();
}

#[test]
fn other_weights_under_one_name_are_never_mixed_in() {
    let mut table = FaultTable::new("versions");
    let Some((cluster, first)) = Cluster::start() else { return };
    let name = exchange(cluster.http(), "GET", "/v1/models", b"").json();
    let name = name["data"][0]["id"].as_str().expect("a name").to_owned();
    let second = cluster.worker(&[]);
    cluster.expect(2);
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/goldens/public/qwen2_gqa4_tied_sharded");
    let other = ["worker", "--model", folder, "--etcd", &cluster.endpoint, "--name", &name];
    let _other = Process::lockstep(&other);
    cluster.check(&mut table, "beside other weights under the same name", cluster.open().join());
    // Not even where its own are gone: it waits for those.
    let streams = cluster.open();
    streams.reach(UNDER_WAY);
    drop((first, second));
    std::thread::sleep(Duration::from_secs(2));
    let _third = cluster.worker(&[]);
    cluster.check(
        &mut table,
        "all workers of its version killed, one came back 2 s later",
        streams.join(),
    );
    // A new request is served by whoever is there.
    let body = json!({"prompt": "Once", "max_tokens": 4}).to_string();
    assert_eq!(exchange(cluster.http(), "POST", "/v1/completions", body.as_bytes()).status, 200);
    table.finish();
}
