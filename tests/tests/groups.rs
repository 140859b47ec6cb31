//! Two groups of two ranks, of which one is lost every few seconds: no request fails, and pauses
//! are short.

use std::{
    thread,
    time::{Duration, Instant},
};

use tests::{Answer, Cluster, FaultTable, Load, Process, Streams, repeatable, seconds, signal};

/// How many, and how long they rest between two requests.
const CLIENTS: (usize, Duration) = (8, Duration::ZERO);
const TOKENS: usize = 1000;
/// Between two losses.
const PERIOD: Duration = Duration::from_secs(5);
const GROUP: [&str; 2] = ["--tp", "2"];
const DEADLINE: Duration = Duration::from_secs(600);

struct Groups {
    cluster: Cluster,
    groups: [Process; 2],
    /// Stopped ones keep their connections open for as long as they are here.
    lost: Vec<Process>,
    wanted: Vec<Answer>,
    table: FaultTable,
}

impl Groups {
    fn start() -> Option<Self> {
        let cluster = Cluster::with_etcd()?;
        let groups = [cluster.worker(&GROUP), cluster.worker(&GROUP)];
        cluster.expect(&[&groups[0], &groups[1]]);
        let wanted = Streams::open(cluster.http(), &repeatable("", TOKENS)).join().answers;
        assert!(wanted.iter().all(|answer| answer.error.is_none()), "{wanted:?}");
        let columns = ["fault", "losses", "requests", "failed", "median pause", "99 %", "longest"];
        let table = FaultTable::with("groups", &columns);
        Some(Self { cluster, groups, lost: Vec::new(), wanted, table })
    }

    /// A group's leader gets a signal, and a successor starts at once; or its other rank does, and
    /// the group forms anew by itself.
    fn lose(&mut self, number: usize, name: &str) {
        let group = &self.groups[number % 2];
        if number / 2 % 2 == 1 {
            return signal(group.children()[0], name);
        }
        group.signal(name);
        let next = self.cluster.worker(&GROUP);
        self.lost.push(std::mem::replace(&mut self.groups[number % 2], next));
        // The one before has been gone for long: its streams went on.
        if self.lost.len() > 2 {
            self.lost.remove(0);
        }
    }

    /// So many requests, and a loss in every period of theirs.
    fn endure(&mut self, name: &str, requests: usize, pause_max: Duration) {
        let bodies = repeatable("", TOKENS);
        let load = Load::start(self.cluster.http(), CLIENTS, &bodies, &self.wanted, requests);
        let (began, mut losses) = (Instant::now(), 0);
        while !load.is_over() {
            assert!(began.elapsed() < DEADLINE, "{} of {requests} asked", load.asked());
            match PERIOD * (losses as u32 + 1) < began.elapsed() + PERIOD / 2 {
                true => {
                    self.lose(losses, name);
                    losses += 1;
                }
                false => thread::sleep(Duration::from_millis(20)),
            }
        }
        let outcome = load.finish();
        let took = began.elapsed();
        outcome.check(name);
        let [median, most, longest] = [50, 99, 100].map(|percent| outcome.percentile(percent));
        println!("{requests} requests in {took:?}, {losses} losses");
        let what = match name {
            "KILL" => "a leader or another rank killed every 5 s, in turn",
            _ => "a leader or another rank stopped every 5 s, in turn",
        };
        let counts = [losses, requests].map(|count| count.to_string());
        let pauses = [median, most, longest].map(seconds);
        self.table.cells(&[what, &counts[0], &counts[1], "0", &pauses[0], &pauses[1], &pauses[2]]);
        assert_eq!(outcome.pauses.len(), requests);
        assert!(losses >= 2, "the load was over after {took:?}");
        assert!(most <= pause_max, "{what}: {most:?}");
    }
}

const KILLED: (&str, Duration) = ("KILL", Duration::from_secs(3));
const STOPPED: (&str, Duration) = ("STOP", Duration::from_secs(6));

#[test]
fn clients_of_two_groups_do_not_notice_losses() {
    let Some(mut groups) = Groups::start() else { return };
    groups.endure(KILLED.0, 100, KILLED.1);
    groups.endure(STOPPED.0, 100, STOPPED.1);
}

#[test]
#[ignore = "takes minutes: ./dev soak groups"]
fn soak_groups_are_lost_every_five_seconds() {
    let Some(mut groups) = Groups::start() else { return };
    groups.endure(KILLED.0, 800, KILLED.1);
    groups.endure(STOPPED.0, 800, STOPPED.1);
    groups.table.finish();
}
