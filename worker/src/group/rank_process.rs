//! The processes of ranks, as the process sees them that started them: what they say, how they end,
//! and how they are ended.

use std::{
    collections::VecDeque,
    io::{self, BufRead, BufReader, Read, Write},
    path::PathBuf,
    process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use cluster::{Reign, telemetry};
use collective::{Beats, TcpDoor};

use super::{
    failures::RankFailures,
    leader::Followers,
    place::{Place, heard_of},
};
use crate::WorkerError;

/// How long a rank may take to end after it was told to.
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// How long one that is lost may take: long enough to say why.
const LOST_LIMIT: Duration = Duration::from_millis(500);
/// How long a rank may take to say that it has heard where its group meets.
const HEAR_LIMIT: Duration = Duration::from_secs(2);
const START_LIMIT: Duration = Duration::from_secs(30);
/// Between two looks at what ends without telling.
const POLL: Duration = Duration::from_millis(20);
/// Of what a rank said, its last lines explain its end.
const LAST_LINES: usize = 5;
/// A longer line is cut into several.
const LINE_BYTES: u64 = 4096;

struct RankProcess {
    rank: usize,
    child: Arc<Mutex<Child>>,
    /// Tells it where the group meets; its end ends the rank.
    stdin: Option<ChildStdin>,
    /// The last epoch that it was told of, and when, and the last that it has heard of.
    told: (u64, Instant),
    heard: Arc<AtomicU64>,
    watcher: JoinHandle<()>,
}

impl RankProcess {
    /// Whether it has not read for too long what it was told: its process is stopped.
    fn is_deaf(&self) -> bool {
        let ((epoch, at), heard) = (self.told, self.heard.load(Ordering::SeqCst));
        // One that has just been started is not yet there.
        let limit = if heard == 0 { START_LIMIT } else { HEAR_LIMIT };
        heard < epoch && at.elapsed() > limit
    }

    /// Ends what does not end by itself by then.
    fn end_by(&mut self, deadline: Instant) {
        while !self.watcher.is_finished() && Instant::now() < deadline {
            thread::sleep(POLL);
        }
        end(&self.child);
    }
}

/// What all ranks of this process are started with.
pub(super) struct Spawning {
    pub world_size: usize,
    /// The checkpoint on this machine; `None`: where the leader has it.
    pub model: Option<PathBuf>,
    /// As `GroupConfig::rank_program`.
    pub program: Option<PathBuf>,
    /// With it their links to the leader are TLS.
    pub tls: Option<tls::Cluster>,
    /// Hear of each rank that ends.
    pub failures: RankFailures,
}

/// The ranks of a group that this process has started, from one epoch to the next.
#[derive(Default)]
pub(super) struct RankProcesses {
    processes: Vec<RankProcess>,
    /// From now on a rank that ends has not failed.
    stopping: Arc<AtomicBool>,
    beats: Option<Beats>,
    reign: Option<Reign>,
    /// Open for as long as the reign lasts: whoever wants to lead next sees there that it does.
    door: Option<TcpDoor>,
}

impl RankProcesses {
    /// Sees that `rank` runs, and tells it where its group meets.
    pub fn bring(
        &mut self,
        rank: usize,
        place: &Place,
        spawning: &Spawning,
    ) -> Result<(), WorkerError> {
        self.processes.retain(|process| !process.watcher.is_finished());
        let known = self.processes.iter().position(|process| process.rank == rank);
        let at = match known {
            Some(at) => at,
            None => {
                self.spawn(rank, spawning)?;
                self.processes.len() - 1
            }
        };
        let process = &mut self.processes[at];
        if process.told.0 == place.epoch {
            return Ok(());
        }
        process.told = (place.epoch, Instant::now());
        let line = format!("{place}\n");
        let told = process.stdin.as_mut().map(|stdin| stdin.write_all(line.as_bytes()));
        if let Some(Err(error)) = told {
            // Whoever watches it hears why it has ended.
            tracing::debug!(rank, %error, "a rank does not listen");
        }
        Ok(())
    }

    /// Starts a rank and watches it.
    fn spawn(&mut self, rank: usize, spawning: &Spawning) -> Result<(), WorkerError> {
        let Spawning { world_size, model, program, tls, failures } = spawning;
        let program = match program {
            Some(program) => program.clone(),
            None => std::env::current_exe().map_err(WorkerError::io("finding this executable"))?,
        };
        let mut command = Command::new(&program);
        command
            .args(["rank", "--rank", &rank.to_string()])
            .args(["--world-size", &world_size.to_string()])
            .env(telemetry::FORMAT_VARIABLE, telemetry::format().name())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if let Some(model) = model {
            command.arg("--model").arg(model);
        }
        if let Some(tls) = tls {
            let (identity, ca) = tls.files();
            command.arg("--cluster-cert").arg(&identity.cert);
            command.arg("--cluster-key").arg(&identity.key).arg("--cluster-ca").arg(ca);
        }
        let mut child =
            command.spawn().map_err(WorkerError::io(format!("starting {}", program.display())))?;
        let (stdin, stdout, stderr) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let child = Arc::new(Mutex::new(child));
        let heard = Arc::new(AtomicU64::new(0));
        let watch = {
            let (child, failures) = (Arc::clone(&child), failures.clone());
            let stopping = Arc::clone(&self.stopping);
            move || {
                let said = stderr.map(|stderr| relay(rank, stderr)).unwrap_or_default();
                let end = wait(&child);
                if !stopping.load(Ordering::SeqCst) {
                    failures.report(rank, describe_end(end, said));
                }
            }
        };
        let listen = {
            let heard = Arc::clone(&heard);
            move || stdout.into_iter().for_each(|stdout| hear(stdout, &heard))
        };
        let started = thread::Builder::new()
            .name(format!("hears-{rank}"))
            .spawn(listen)
            .and_then(|_| thread::Builder::new().name(format!("rank-{rank}")).spawn(watch));
        let watcher = match started {
            Ok(watcher) => watcher,
            Err(error) => {
                end(&child);
                return Err(WorkerError::io("starting a thread that watches a rank")(error));
            }
        };
        let told = (0, Instant::now());
        self.processes.push(RankProcess { rank, child, stdin, told, heard, watcher });
        Ok(())
    }

    /// Leaves an epoch that has failed: whoever is `lost` ends, the others may go on.
    pub fn leave(&mut self, lost: &[usize]) {
        (self.beats, self.reign, self.door) = (None, None, None);
        let deadline = Instant::now() + LOST_LIMIT;
        for process in self.processes.iter_mut().filter(|process| lost.contains(&process.rank)) {
            process.end_by(deadline);
        }
        self.reap(|process| lost.contains(&process.rank));
    }

    /// Ends those that have not read what they were told; they are then reported.
    pub fn end_deaf(&mut self) {
        self.processes.iter().filter(|process| process.is_deaf()).for_each(|p| end(&p.child));
    }

    /// Waits for the processes that were ended.
    fn reap(&mut self, ended: impl Fn(&RankProcess) -> bool) {
        for process in self.processes.extract_if(.., |process| ended(process)) {
            // It does not panic, and its report is known or not needed.
            let _watched = process.watcher.join();
        }
    }

    /// Ends a rank from any thread, stopped or not; does nothing for ranks of other processes.
    pub fn killer(&self) -> impl Fn(usize) + Send + Sync + use<> {
        let children: Vec<_> =
            self.processes.iter().map(|process| (process.rank, process.child.clone())).collect();
        move |rank| {
            children.iter().filter(|(of, _)| *of == rank).for_each(|(_, child)| end(child));
        }
    }

    /// Until these ranks have ended, or leave, or are expected to end.
    pub fn keep(&mut self, beats: Beats, reign: Option<Reign>, door: TcpDoor) {
        (self.beats, self.reign, self.door) = (Some(beats), reign, Some(door));
    }

    /// The ranks whose processes run.
    pub fn running(&self) -> Vec<usize> {
        let running = self.processes.iter().filter(|process| !process.watcher.is_finished());
        running.map(|process| process.rank).collect()
    }

    fn expect_end(&mut self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.beats.iter().for_each(Beats::expect_end);
        (self.reign, self.door) = (None, None);
    }

    /// Returns once all have ended, by themselves where they were `told` to.
    fn shutdown(&mut self, told: bool) {
        self.expect_end();
        if !told {
            self.processes.iter_mut().for_each(|process| process.stdin = None);
        }
        let deadline = Instant::now() + STOP_LIMIT;
        self.processes.iter_mut().for_each(|process| process.end_by(deadline));
        self.reap(|_| true);
        self.beats = None;
    }
}

impl Drop for RankProcesses {
    fn drop(&mut self) {
        self.expect_end();
        // Whoever is left was never part of a group that works.
        self.processes.iter().for_each(|process| end(&process.child));
        self.shutdown(false);
    }
}

/// The processes of a group, which its leaders have one after the other.
#[derive(Clone, Default)]
pub(super) struct Shared(Arc<Mutex<RankProcesses>>);

impl Shared {
    pub fn with<T>(&self, work: impl FnOnce(&mut RankProcesses) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Followers for Shared {
    fn expect_end(&mut self) {
        self.with(RankProcesses::expect_end);
    }

    fn shutdown(&mut self, told: bool) {
        self.with(|processes| processes.shutdown(told));
    }
}

/// Notes each epoch that a rank says it has heard of, until it says no more.
fn hear(stdout: ChildStdout, heard: &AtomicU64) {
    let mut lines = BufReader::new(stdout);
    let mut line = Vec::new();
    let mut read = |line: &mut Vec<u8>| lines.by_ref().take(LINE_BYTES).read_until(b'\n', line);
    while read(&mut line).is_ok_and(|read| read > 0) {
        if let Some(epoch) = heard_of(&String::from_utf8_lossy(&line)) {
            heard.fetch_max(epoch, Ordering::SeqCst);
        }
        line.clear();
    }
}

/// Passes on what a rank says, until it says no more; keeps the last lines. Never waits for whoever
/// reads this process's own lines: the rank would wait in turn.
fn relay(rank: usize, stderr: ChildStderr) -> VecDeque<String> {
    let mut last = VecDeque::with_capacity(LAST_LINES);
    let mut lines = BufReader::new(stderr);
    let mut line = Vec::new();
    let mut read = |line: &mut Vec<u8>| lines.by_ref().take(LINE_BYTES).read_until(b'\n', line);
    // An error is the end of what can be heard; the process is waited for next.
    while read(&mut line).is_ok_and(|read| read > 0) {
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        let text = telemetry::forward(rank, &text);
        if last.len() == LAST_LINES {
            last.pop_front();
        }
        last.push_back(text);
        line.clear();
    }
    last
}

/// Waits without keeping others from ending the process.
fn wait(child: &Mutex<Child>) -> io::Result<ExitStatus> {
    loop {
        let state = child.lock().unwrap_or_else(PoisonError::into_inner).try_wait()?;
        match state {
            Some(status) => return Ok(status),
            None => thread::sleep(POLL),
        }
    }
}

fn end(child: &Mutex<Child>) {
    let killed = child.lock().unwrap_or_else(PoisonError::into_inner).kill();
    if let Err(error) = killed {
        tracing::debug!(%error, "a rank's process could not be ended");
    }
}

fn describe_end(end: io::Result<ExitStatus>, said: VecDeque<String>) -> String {
    let end = match end {
        Ok(status) => format!("its process ended ({status})"),
        Err(error) => format!("its process cannot be waited for ({error})"),
    };
    if said.is_empty() {
        return end;
    }
    format!("{end}; it said: {}", said.into_iter().collect::<Vec<_>>().join(" / "))
}
