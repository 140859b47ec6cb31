//! Ranks that are processes: they serve as threads do, and their end is noticed, named and clean.

#[path = "common/rank.rs"]
mod rank;

use std::{
    fs,
    io::{BufRead, BufReader, ErrorKind},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::Ordering,
    thread,
    time::{Duration, Instant},
};

use cpu::Precision;
use engine::{
    Request, Scheduler,
    plan::{ExecutorError, SamplingParams, TokenLogprob},
};
use rank::{pid, rank_script, script, signal};
use tempfile::TempDir;
use worker::{Group, GroupConfig, RankMode, WorkerError};

fn config(rank_mode: RankMode, ranks: usize, program: PathBuf) -> GroupConfig {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/public");
    GroupConfig {
        ranks,
        threads_per_rank: Some(1),
        precision: Precision::Exact,
        context_max: Some(256),
        kv_memory: Some(16 << 20),
        rank_mode,
        rank_program: Some(program),
        ..GroupConfig::new(root.join("qwen2_gqa4_tied_sharded"))
    }
}

fn start(config: GroupConfig) -> Result<Group, WorkerError> {
    Group::start(config, &mut |_| {})
}

/// Waits for a process that somebody else reaps.
fn ended(pid: &str, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        let path = format!("/proc/{pid}/stat");
        match fs::read_to_string(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return true,
            _ => thread::sleep(Duration::from_millis(20)),
        }
    }
    false
}

/// Waits for a process that nobody may reap.
fn is_over(pid: &str, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        let state = fs::read_to_string(format!("/proc/{pid}/stat"));
        // The name stands in parentheses, the state behind it.
        if !state.is_ok_and(|stat| !stat.contains(") Z ")) {
            return true;
        }
        thread::sleep(Duration::from_millis(20));
    }
    false
}

fn request(max_tokens: usize) -> Request {
    Request {
        prompt: (0..40).map(|at| (at * 31 + 7) % 370).collect(),
        generated: Vec::new(),
        params: SamplingParams {
            temperature: 0.9,
            seed: 5,
            logprobs: Some(2),
            ..SamplingParams::GREEDY
        },
        max_tokens,
        stop_ids: Vec::new(),
        score_prompt: false,
    }
}

/// One of the model's files.
const WEIGHTS: &str = "model-00001-of-00003.safetensors";

/// A group and the scheduler of all its plans.
struct Served(Group, Scheduler);

impl Served {
    fn start(config: GroupConfig) -> Self {
        let group = start(config).unwrap();
        let scheduler = Scheduler::new(group.info.scheduler_config(1));
        Self(group, scheduler)
    }

    /// The group as at the start.
    fn recover(&mut self, wanted: &dyn Fn() -> bool) -> Result<(), ExecutorError> {
        self.0.executor.recover(wanted)?;
        self.1 = Scheduler::new(self.0.info.scheduler_config(1));
        Ok(())
    }
}

fn answer(Served(group, scheduler): &mut Served) -> Vec<TokenLogprob> {
    scheduler.submit(request(20)).unwrap();
    let mut tokens = Vec::new();
    while let Some(plan) = scheduler.schedule() {
        group.executor.launch(plan).unwrap();
        let output = group.executor.finish().unwrap();
        for update in scheduler.commit(output).unwrap() {
            tokens.extend(update.tokens);
        }
    }
    tokens
}

/// Step after step, until the group fails.
fn serve(Served(group, scheduler): &mut Served) -> ExecutorError {
    loop {
        let Some(plan) = scheduler.schedule() else {
            scheduler.submit(request(200)).unwrap();
            continue;
        };
        let ran = group.executor.launch(plan).and_then(|()| group.executor.finish());
        match ran {
            Ok(output) => drop(scheduler.commit(output).unwrap()),
            Err(error) => return error,
        }
    }
}

/// As the engine's loop with nothing to do, until the group fails.
fn idle(Served(group, _): &mut Served) -> ExecutorError {
    loop {
        match group.executor.idle() {
            Ok(()) => thread::sleep(Duration::from_millis(500)),
            Err(error) => return error,
        }
    }
}

#[test]
fn processes_answer_as_threads_do_and_end_with_their_group() {
    let dir = TempDir::new().unwrap();
    let program = rank_script(&dir);
    for ranks in [1, 2, 3] {
        let mut processes = Served::start(config(RankMode::Processes, ranks, program.clone()));
        let mut threads = Served::start(config(RankMode::Threads, ranks, program.clone()));
        assert_eq!(answer(&mut processes), answer(&mut threads), "{ranks} ranks");
        processes.0.executor.idle().unwrap();
        drop(processes);
        for rank in 1..ranks {
            assert!(ended(&pid(&dir, rank), Duration::from_millis(100)), "rank {rank} was reaped");
        }
    }
}

/// Bytes that a process has read from files and links so far.
fn bytes_read(pid: &str) -> u64 {
    let told = fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
    let line = told.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap();
    line.parse().unwrap()
}

/// Rank 1 of 3 gets a signal while the others are `busy`: the group fails within `limit`, for the
/// `reason`; formed anew it answers as before, with what the other ranks have loaded.
fn fails(name: &str, busy: fn(&mut Served) -> ExecutorError, limit: Duration, reason: &str) {
    let dir = TempDir::new().unwrap();
    let mut group = Served::start(config(RankMode::Processes, 3, rank_script(&dir)));
    let answered = answer(&mut group);
    assert_eq!(answered.len(), 20);
    let ranks = [1, 2].map(|rank| pid(&dir, rank));
    let (error, took) = thread::scope(|scope| {
        let serving = scope.spawn(|| (busy(&mut group), Instant::now()));
        thread::sleep(Duration::from_millis(700));
        let began = Instant::now();
        signal(&ranks[0], name);
        let (error, ended) = serving.join().unwrap();
        (error.0, ended - began)
    });
    eprintln!("{name}: {took:?}: {error}");
    assert!(error.contains("rank 1") && error.contains(reason), "{error}");
    assert!(took < limit, "{took:?}");

    let (began, read) = (Instant::now(), bytes_read(&ranks[1]));
    group.recover(&|| true).unwrap();
    eprintln!("{name}: there again after {:?}", began.elapsed());
    assert!(ended(&ranks[0], Duration::from_millis(100)), "{} was reaped", ranks[0]);
    let again = [1, 2].map(|rank| pid(&dir, rank));
    assert!(again[0] != ranks[0] && again[1] == ranks[1], "{ranks:?}, {again:?}");
    assert_eq!(group.0.epoch.load(Ordering::Relaxed), 2);
    let loaded = fs::metadata(config(RankMode::Processes, 3, "".into()).model.join(WEIGHTS));
    let (read, loaded) = (bytes_read(&ranks[1]) - read, loaded.unwrap().len());
    assert!(read < loaded / 4, "rank 2 has read {read} bytes, of {loaded} of the model");
    assert_eq!(answer(&mut group), answered);
    drop(group);
    for rank in &again {
        assert!(ended(rank, Duration::from_millis(100)), "{rank} was reaped");
    }
}

// A killed rank is noticed in half a second at most, a silent one in less than three: the rest is
// for machines that do much else.

#[test]
fn a_killed_rank_fails_a_busy_group_by_name() {
    fails("-KILL", serve, Duration::from_secs(5), "signal: 9");
}

#[test]
fn a_killed_rank_fails_an_idle_group_by_name() {
    fails("-KILL", idle, Duration::from_secs(5), "signal: 9");
}

#[test]
fn a_stopped_rank_fails_a_busy_group_by_name() {
    fails("-STOP", serve, Duration::from_secs(8), "not been heard of for 2 s");
}

#[test]
fn a_stopped_rank_fails_an_idle_group_by_name() {
    fails("-STOP", idle, Duration::from_secs(8), "not been heard of for 2 s");
}

#[test]
fn a_rank_that_was_stopped_for_a_second_goes_on() {
    let dir = TempDir::new().unwrap();
    let mut group = Served::start(config(RankMode::Processes, 2, rank_script(&dir)));
    let wanted = answer(&mut group);
    let rank = pid(&dir, 1);
    signal(&rank, "-STOP");
    let answered = thread::scope(|scope| {
        let answering = scope.spawn(|| answer(&mut group));
        thread::sleep(Duration::from_secs(1));
        signal(&rank, "-CONT");
        answering.join().unwrap()
    });
    assert_eq!(answered, wanted);
    // Nothing of it is told later.
    thread::sleep(Duration::from_secs(3));
    group.0.executor.idle().unwrap();
}

#[test]
fn a_rank_that_hangs_is_ended_with_its_group() {
    let dir = TempDir::new().unwrap();
    let group = start(config(RankMode::Processes, 2, rank_script(&dir))).unwrap();
    let hanging = pid(&dir, 1);
    signal(&hanging, "-STOP");
    drop(group);
    assert!(ended(&hanging, Duration::from_millis(100)));
}

#[test]
fn a_rank_that_cannot_start_says_why_through_the_leader() {
    let dir = TempDir::new().unwrap();
    let program = script(&dir, "echo no such library >&2\nexit 3");
    let begun = Instant::now();
    let error = start(config(RankMode::Processes, 2, program)).err().expect("no group").to_string();
    assert!(error.contains("no such library") && error.contains("exit status: 3"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    let missing = config(RankMode::Processes, 2, dir.path().join("missing"));
    let error = start(missing).err().expect("no group").to_string();
    assert!(error.contains("missing"), "{error}");
}

#[test]
fn a_group_that_is_not_wanted_any_more_is_not_waited_for() {
    let dir = TempDir::new().unwrap();
    let mut group = Served::start(config(RankMode::Processes, 2, rank_script(&dir)));
    let alive = pid(&dir, 1);
    signal(&alive, "-KILL");
    idle(&mut group);
    // Whoever is started now comes late.
    script(&dir, "exec sleep 20");
    let began = Instant::now();
    let error = group.recover(&|| began.elapsed() < Duration::from_secs(1)).unwrap_err().0;
    assert!(error.contains("to end"), "{error}");
    drop(group);
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

const LEADER_VARIABLE: &str = "LOCKSTEP_TEST_LEADER";

/// Not a test of its own: what the next one starts and stops.
#[test]
#[ignore = "leads the ranks of the next test"]
fn serve_as_leader() {
    let Ok(program) = std::env::var(LEADER_VARIABLE) else { return };
    let mut group = Served::start(config(RankMode::Processes, 3, program.into()));
    let answered = answer(&mut group);
    println!("ready");
    eprintln!("ended: {}", idle(&mut group).0);
    group.recover(&|| true).unwrap();
    eprintln!("again: {}", answer(&mut group) == answered);
}

#[test]
fn ranks_leave_a_leader_that_is_stopped_for_long_and_come_back_when_it_goes_on() {
    let dir = TempDir::new().unwrap();
    let mut leader = this_test("serve_as_leader")
        .env(LEADER_VARIABLE, rank_script(&dir))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(leader.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().ends_with("ready")), "the group is there");
    let (id, ranks) = (leader.id().to_string(), [1, 2].map(|rank| pid(&dir, rank)));
    signal(&id, "-STOP");
    thread::sleep(Duration::from_secs(12));
    signal(&id, "-CONT");
    let said = leader.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.contains("it has left the group") && said.contains("again: true"), "{said}");
    assert_eq!(ranks, [1, 2].map(|rank| pid(&dir, rank)), "the same processes");
    for rank in &ranks {
        assert!(is_over(rank, Duration::from_secs(10)), "{rank} goes on without its leader");
    }
}

fn this_test(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", name, "--nocapture"]).stdin(Stdio::piped());
    command
}

#[test]
fn a_rank_ends_with_its_parent() {
    let mut rank = this_test("rank::serve_as_rank")
        // Nobody tells it where its group meets: the rank would wait for that.
        .env(rank::PLACE_VARIABLE, "1 2")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    drop(rank.stdin.take());
    let deadline = Instant::now() + Duration::from_secs(5);
    let status = loop {
        if let Some(status) = rank.try_wait().unwrap() {
            break status;
        }
        assert!(Instant::now() < deadline, "the rank outlives its parent");
        thread::sleep(Duration::from_millis(20));
    };
    assert!(!status.success());
}
