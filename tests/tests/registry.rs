//! A registry of three members at its worst, under load: no request fails, nobody starts again, and
//! soon after its return the roster is right.

use std::{
    thread,
    time::{Duration, Instant},
};

use tests::{Answer, Cluster, FaultTable, Load, Process, Registry, Streams, repeatable, seconds};

/// Of the roster, once etcd takes changes again.
const RIGHT: Duration = Duration::from_secs(5);
/// Longer than a lease.
const OUTAGE: Duration = Duration::from_secs(15);
/// Longer than what vanished in an outage is still believed in.
const GRACE: Duration = Duration::from_secs(35);
const TOKENS: usize = 64;
const MEMBERS: usize = 3;
/// How many, and how long they rest between two requests.
const CLIENTS: (usize, Duration) = (4, Duration::from_millis(50));

struct Scene {
    registry: Registry,
    cluster: Cluster,
    workers: Vec<Process>,
    wanted: Vec<Answer>,
    table: FaultTable,
}

impl Scene {
    fn start(section: &'static str) -> Option<Self> {
        let registry = Registry::start(MEMBERS)?;
        let cluster = Cluster::start(&registry.endpoints());
        let workers = vec![cluster.worker(&[]), cluster.worker(&[])];
        cluster.expect(&workers.iter().collect::<Vec<_>>());
        let wanted = Streams::open(cluster.http(), &repeatable("", TOKENS)).join().answers;
        assert!(wanted.iter().all(|answer| answer.error.is_none()), "{wanted:?}");
        let columns = ["fault", "requests", "failed", "longest silence", "roster right after"];
        let table = FaultTable::with(section, &columns);
        Some(Self { registry, cluster, workers, wanted, table })
    }

    /// Under load: the fault, then a worker that comes and one that goes, then some time in which
    /// nothing may change.
    fn disturbed(&mut self, what: &str, rest: Duration, fault: impl FnOnce(&mut Registry)) {
        let requests = repeatable("", TOKENS);
        let load = Load::start(self.cluster.http(), CLIENTS, &requests, &self.wanted, usize::MAX);
        fault(&mut self.registry);
        self.registry.await_majority();
        let back = Instant::now();
        let mut before = self.workers.remove(0);
        let next = thread::scope(|scope| {
            let next = scope.spawn(|| self.cluster.worker(&[]));
            before.signal("TERM");
            next.join().expect("a worker")
        });
        self.workers.push(next);
        self.cluster.expect(&self.workers.iter().collect::<Vec<_>>());
        let right = back.elapsed();
        thread::sleep(rest);
        self.cluster.expect(&self.workers.iter().collect::<Vec<_>>());
        load.stop();
        let outcome = load.finish();
        outcome.check(what);
        let asked = outcome.pauses.len().to_string();
        let longest = seconds(outcome.percentile(100));
        self.table.cells(&[what, &asked, "0", &longest, &seconds(right)]);
        assert!(right < RIGHT, "{what}: {right:?}");
        assert!(before.wait(RIGHT).success(), "{what}: a worker that was told to end");
        // Nothing starts them again here: who ended is not there.
        for process in self.workers.iter().chain([self.cluster.router()]) {
            assert!(!process.has_ended(), "{what}");
        }
    }

    fn all_down(&mut self, outage: Duration, rest: Duration) {
        let what = format!("all members killed, back after {} s", outage.as_secs());
        self.disturbed(&what, rest, |registry| {
            (0..MEMBERS).for_each(|at| registry.kill(at));
            thread::sleep(outage);
            (0..MEMBERS).for_each(|at| registry.start_member(at));
        });
    }

    fn all_forgotten(&mut self, outage: Duration, rest: Duration) {
        let what = format!("all members' data lost, back after {} s", outage.as_secs());
        self.disturbed(&what, rest, |registry| {
            (0..MEMBERS).for_each(|at| registry.kill(at));
            registry.forget();
            thread::sleep(outage);
            (0..MEMBERS).for_each(|at| registry.start_member(at));
        });
    }
}

/// One member after the other; the rest is after each.
fn members(rest: Duration) -> Option<FaultTable> {
    let mut scene = Scene::start("registry-members")?;
    let mut lost = 0;
    // Longer than a lease: registrations are renewed by way of other members.
    scene.disturbed("the leading member stopped", rest.max(OUTAGE), |registry| {
        lost = registry.leader();
        registry.signal(lost, "STOP");
    });
    scene.registry.signal(lost, "CONT");
    scene.registry.await_all();
    scene.disturbed("the leading member killed", rest, |registry| {
        lost = registry.leader();
        registry.kill(lost);
    });
    scene.registry.start_member(lost);
    scene.registry.await_all();
    scene.disturbed("another member killed", rest, |registry| {
        registry.kill((registry.leader() + 1) % MEMBERS);
    });
    Some(scene.table)
}

#[test]
fn the_loss_of_one_member_of_three_is_not_noticed() {
    members(Duration::ZERO);
}

#[test]
fn a_registry_that_is_away_or_has_lost_everything_stops_nobody() {
    let Some(mut scene) = Scene::start("registry-away") else { return };
    scene.all_down(OUTAGE, Duration::ZERO);
    scene.all_forgotten(Duration::from_secs(1), Duration::ZERO);
}

#[test]
#[ignore = "takes a minute: ./dev soak registry_members"]
fn soak_registry_members_are_lost() {
    if let Some(table) = members(OUTAGE) {
        table.finish();
    }
}

#[test]
#[ignore = "takes a quarter of an hour: ./dev soak registry_away"]
fn soak_registry_away_for_long() {
    let Some(mut scene) = Scene::start("registry-away") else { return };
    scene.all_down(Duration::from_secs(120), GRACE);
    scene.all_forgotten(OUTAGE, GRACE);
    scene.all_down(Duration::from_secs(600), GRACE);
    scene.table.finish();
}
