//! The processes of ranks, as the process sees them that started them: what they say, how they end,
//! and how they are ended.

use std::{
    collections::VecDeque,
    io::{self, BufRead, BufReader, Read},
    path::PathBuf,
    process::{Child, ChildStderr, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use cluster::{Reign, telemetry};
use collective::{Beats, TcpDoor};

use super::{
    failures::RankFailures,
    leader::Followers,
    process::{RANK_TOKEN_VARIABLE, RankConfig},
};
use crate::WorkerError;

/// How long a rank may take to end after it was told to.
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// Between two looks at what ends without telling.
const POLL: Duration = Duration::from_millis(20);
/// Of what a rank said, its last lines explain its end.
const LAST_LINES: usize = 5;
/// A longer line is cut into several.
const LINE_BYTES: u64 = 4096;

struct RankProcess {
    rank: usize,
    child: Arc<Mutex<Child>>,
    watcher: JoinHandle<()>,
}

/// The ranks of a group that this process has started.
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
    /// Starts a rank and watches it.
    pub fn spawn(
        &mut self,
        place: &RankConfig,
        program: Option<PathBuf>,
        failures: &RankFailures,
    ) -> Result<(), WorkerError> {
        let rank = place.rank;
        let program = match program {
            Some(program) => program,
            None => std::env::current_exe().map_err(WorkerError::io("finding this executable"))?,
        };
        let mut command = Command::new(&program);
        command
            .args(["rank", "--rank", &rank.to_string()])
            .args(["--world-size", &place.world_size.to_string()])
            .args(["--leader", &place.leader.to_string()])
            .args(["--epoch", &place.epoch.to_string()])
            .env(RANK_TOKEN_VARIABLE, &place.token)
            .env(telemetry::FORMAT_VARIABLE, telemetry::format().name())
            .stdin(Stdio::piped())
            .stderr(Stdio::piped());
        if let Some(model) = &place.model {
            command.arg("--model").arg(model);
        }
        if let Some(tls) = &place.tls {
            let (identity, ca) = tls.files();
            command.arg("--cluster-cert").arg(&identity.cert);
            command.arg("--cluster-key").arg(&identity.key).arg("--cluster-ca").arg(ca);
        }
        let mut child =
            command.spawn().map_err(WorkerError::io(format!("starting {}", program.display())))?;
        let stderr = child.stderr.take();
        let child = Arc::new(Mutex::new(child));
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
        let watcher = thread::Builder::new().name(format!("rank-{rank}")).spawn(watch);
        let watcher = match watcher {
            Ok(watcher) => watcher,
            Err(error) => {
                end(&child);
                return Err(WorkerError::io("starting a thread that watches a rank")(error));
            }
        };
        self.processes.push(RankProcess { rank, child, watcher });
        Ok(())
    }

    /// Ends a rank from any thread, stopped or not; does nothing for ranks of other processes.
    pub fn killer(&self) -> impl Fn(usize) + Send + Sync + use<> {
        let children: Vec<_> =
            self.processes.iter().map(|process| (process.rank, process.child.clone())).collect();
        move |rank| {
            children.iter().filter(|(of, _)| *of == rank).for_each(|(_, child)| end(child));
        }
    }

    /// Until these ranks have ended, and until they are expected to.
    pub fn keep(&mut self, beats: Beats, reign: Option<Reign>, door: TcpDoor) {
        (self.beats, self.reign, self.door) = (Some(beats), reign, Some(door));
    }

    /// Whether all have ended.
    pub fn are_over(&self) -> bool {
        self.processes.iter().all(|process| process.watcher.is_finished())
    }
}

impl Followers for RankProcesses {
    fn expect_end(&mut self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.beats.iter().for_each(Beats::expect_end);
        (self.reign, self.door) = (None, None);
    }

    fn shutdown(&mut self) {
        self.expect_end();
        let deadline = Instant::now() + STOP_LIMIT;
        for RankProcess { child, watcher, .. } in self.processes.drain(..) {
            while !watcher.is_finished() && Instant::now() < deadline {
                thread::sleep(POLL);
            }
            if !watcher.is_finished() {
                end(&child);
            }
            // It does not panic, and its report is no longer needed.
            let _watched = watcher.join();
        }
        self.beats = None;
    }
}

impl Drop for RankProcesses {
    fn drop(&mut self) {
        self.expect_end();
        // Whoever is left was never part of a group that works.
        for process in &self.processes {
            end(&process.child);
        }
        self.shutdown();
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
