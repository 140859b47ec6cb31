//! Ranks as processes of their own: a rank that dies or hangs can be seen, named and ended.
//!
//! Rank 0 is the worker's process. It starts the others from its own executable, hands them a
//! secret through the environment and everything else over the control link, and watches them: what
//! a rank said last is part of the reason when it ends. A rank's standard input is held open by its
//! parent; when that closes, the parent is gone, and the rank ends too.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, BufRead, BufReader, Read},
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::{Child, ChildStderr, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{RecvTimeoutError, sync_channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use cluster::telemetry;
use collective::{CollectiveError, HostCollective, Tcp, TcpDoor};
use engine::plan::Executor;
use model::{Checkpoint, ModelError};

use super::{
    LoadProgress,
    devices::{Devices, Task, on_devices},
    failures::RankFailures,
    follower::{LOAD_DEADLINE, RankOptions, follow, load, meet, open},
    leader::{Followers, lead},
    sizing::Sizing,
};
use crate::WorkerError;

/// The environment variable that brings a rank its group's secret.
pub const RANK_TOKEN_VARIABLE: &str = "LOCKSTEP_RANK_TOKEN";

/// How long ranks and leader look for each other.
const JOIN_DEADLINE: Duration = Duration::from_secs(30);
/// How long a rank may take to end after it was told to.
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// Between two looks at what ends without telling.
const POLL: Duration = Duration::from_millis(20);
/// Of what a rank said, its last lines explain its end.
const LAST_LINES: usize = 5;
/// A longer line is cut into several.
const LINE_BYTES: u64 = 4096;

/// The place of one rank that is a process.
#[derive(Clone, Debug)]
pub struct RankConfig {
    /// At least 1: rank 0 is the leader.
    pub rank: usize,
    pub world_size: usize,
    /// Where rank 0 listens.
    pub leader: SocketAddr,
    /// The group's secret.
    pub token: String,
}

/// Serves as one rank until the leader says stop; blocks the calling thread. What to load, the
/// leader says. Ends the process when standard input closes: then the parent is gone.
///
/// Errors: the leader cannot be reached or is lost, or the model cannot be loaded.
pub fn run_rank(config: RankConfig) -> Result<(), WorkerError> {
    thread::Builder::new()
        .name("parent".into())
        .spawn(end_with_parent)
        .map_err(WorkerError::io("starting the thread that watches the parent"))?;
    let place = (config.rank, config.world_size);
    let mut control = Tcp::connect(&config.leader.to_string(), place, &config.token, JOIN_DEADLINE)
        .map_err(ModelError::from)?;
    control.set_data_deadline(LOAD_DEADLINE);
    let mut message = Vec::new();
    control.broadcast(&mut message, JOIN_DEADLINE).map_err(ModelError::from)?;
    let (options, data): (RankOptions, SocketAddr) = postcard::from_bytes(&message)
        .map_err(|error| WorkerError::Config(format!("the leader's options: {error}")))?;
    let data = Tcp::connect(&data.to_string(), place, &config.token, JOIN_DEADLINE)
        .map_err(ModelError::from)?;
    let checkpoint = open(&options.model, options.random)?;
    let (device, cpu) = (options.device.clone(), options.cpu);
    let follower = Follower { control, data, checkpoint, options };
    on_devices(&device, config.world_size, cpu, follower)
}

/// A rank that has joined, and has nothing loaded yet.
struct Follower {
    control: Tcp,
    data: Tcp,
    checkpoint: Checkpoint,
    options: RankOptions,
}

impl Task for Follower {
    type Out = ();

    fn on<D: Devices>(mut self, devices: D) -> Result<(), WorkerError> {
        let progress: LoadProgress<'_> = &mut |_| {};
        let mut runner = load(&devices, self.data, &self.checkpoint, &self.options, progress)?;
        meet(&mut self.control)?;
        follow(&mut runner, &mut self.control, self.options.step_deadline)
    }
}

/// Exits the process once the parent closes its standard input.
fn end_with_parent() {
    // An error says the same as the end: nobody holds the other side.
    let _closed = io::copy(&mut io::stdin(), &mut io::sink());
    telemetry::exit(1);
}

/// Starts and watches the other ranks; this process is rank 0.
pub(super) fn start<D: Devices>(
    sizing: &Sizing,
    devices: D,
    progress: LoadProgress<'_>,
) -> Result<Box<dyn Executor>, WorkerError> {
    let ranks = sizing.config.ranks;
    let token = secret()?;
    let (control_door, leader) = open_door()?;
    let (data_door, data) = open_door()?;
    let failures = RankFailures::default();
    let mut followers = RankProcesses { processes: Vec::new(), stopping: Arc::default() };
    for rank in 1..ranks {
        let place = RankConfig { rank, world_size: ranks, leader, token: token.clone() };
        followers.spawn(&place, sizing.config.rank_program.clone(), &failures)?;
    }
    let joined = || -> Result<_, WorkerError> {
        let mut control = accept(control_door, ranks, &token, &failures)?;
        control.set_data_deadline(LOAD_DEADLINE);
        let mut message = postcard::to_stdvec(&(&sizing.options, data))
            .map_err(|error| WorkerError::Config(format!("options for the ranks: {error}")))?;
        control.broadcast(&mut message, JOIN_DEADLINE).map_err(ModelError::from)?;
        let data = accept(data_door, ranks, &token, &failures)?;
        let options = &sizing.options;
        let runner = load(&devices, data, &sizing.checkpoint, options, progress)?;
        meet(&mut control)?;
        Ok((control, runner))
    };
    let (control, runner) = joined().map_err(|error| failures.or_cause(error))?;
    lead(runner, control, failures, followers, devices.compute_beside_the_host())
}

fn open_door() -> Result<(TcpDoor, SocketAddr), WorkerError> {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let failed = |source| WorkerError::Bind { addr: any, source };
    let door = Tcp::listen(any).map_err(failed)?;
    let addr = door.local_addr().map_err(failed)?;
    Ok((door, addr))
}

/// Waits for all ranks, or for the first that ends instead of coming.
fn accept(
    door: TcpDoor,
    ranks: usize,
    token: &str,
    failures: &RankFailures,
) -> Result<Tcp, WorkerError> {
    let (sender, receiver) = sync_channel(1);
    let token = token.to_owned();
    // Ends by itself at the deadline, whether or not anybody still waits.
    thread::spawn(move || {
        let joined = door.accept(ranks, &token, JOIN_DEADLINE);
        // Nobody waits any more where a rank ended meanwhile.
        let _unwanted = sender.send(joined).is_err();
    });
    loop {
        match receiver.recv_timeout(POLL) {
            Ok(joined) => return Ok(joined.map_err(ModelError::from)?),
            Err(RecvTimeoutError::Disconnected) => {
                let reason = CollectiveError::Device("accepting ranks ended early".into());
                return Err(ModelError::from(reason).into());
            }
            Err(RecvTimeoutError::Timeout) => {
                if let Some(reason) = failures.describe(Duration::ZERO) {
                    return Err(WorkerError::Group(reason));
                }
            }
        }
    }
}

/// 128 random bits in hexadecimal.
fn secret() -> Result<String, WorkerError> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut bytes))
        .map_err(WorkerError::io("drawing the ranks' secret from /dev/urandom"))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

struct RankProcess {
    child: Arc<Mutex<Child>>,
    watcher: JoinHandle<()>,
}

/// The rank processes of a group.
struct RankProcesses {
    processes: Vec<RankProcess>,
    /// From now on a rank that ends has not failed.
    stopping: Arc<AtomicBool>,
}

impl RankProcesses {
    fn spawn(
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
        let mut child = Command::new(&program)
            .args(["rank", "--rank", &rank.to_string()])
            .args(["--world-size", &place.world_size.to_string()])
            .args(["--leader", &place.leader.to_string()])
            .env(RANK_TOKEN_VARIABLE, &place.token)
            .env(telemetry::FORMAT_VARIABLE, telemetry::format().name())
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(WorkerError::io(format!("starting {}", program.display())))?;
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
        self.processes.push(RankProcess { child, watcher });
        Ok(())
    }
}

impl Followers for RankProcesses {
    fn shutdown(&mut self) {
        self.stopping.store(true, Ordering::SeqCst);
        let deadline = Instant::now() + STOP_LIMIT;
        for RankProcess { child, watcher } in self.processes.drain(..) {
            while !watcher.is_finished() && Instant::now() < deadline {
                thread::sleep(POLL);
            }
            if !watcher.is_finished() {
                end(&child);
            }
            // It does not panic, and its report is no longer needed.
            let _watched = watcher.join();
        }
    }
}

impl Drop for RankProcesses {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::SeqCst);
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
