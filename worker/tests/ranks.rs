//! Ranks that are processes: they serve as threads do, and their end is noticed, named and clean.

#[path = "common/rank.rs"]
mod rank;

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    process::{Command, Stdio},
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
use worker::{Group, GroupConfig, RANK_TOKEN_VARIABLE, RankMode, WorkerError};

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

fn answer(group: &mut Group) -> Vec<TokenLogprob> {
    let request = Request {
        prompt: (0..40).map(|at| (at * 31 + 7) % 370).collect(),
        generated: Vec::new(),
        params: SamplingParams {
            temperature: 0.9,
            seed: 5,
            logprobs: Some(2),
            ..SamplingParams::GREEDY
        },
        max_tokens: 20,
        stop_ids: Vec::new(),
        score_prompt: false,
    };
    let mut scheduler = Scheduler::new(group.info.scheduler_config(1));
    scheduler.submit(request).unwrap();
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

#[test]
fn processes_answer_as_threads_do_and_end_with_their_group() {
    let dir = TempDir::new().unwrap();
    let program = rank_script(&dir);
    for ranks in [2, 3] {
        let mut processes = start(config(RankMode::Processes, ranks, program.clone())).unwrap();
        let mut threads = start(config(RankMode::Threads, ranks, program.clone())).unwrap();
        assert_eq!(answer(&mut processes), answer(&mut threads), "{ranks} ranks");
        processes.executor.idle().unwrap();
        drop(processes);
        for rank in 1..ranks {
            assert!(ended(&pid(&dir, rank), Duration::from_millis(100)), "rank {rank} was reaped");
        }
    }
}

#[test]
fn a_killed_rank_fails_the_group_at_once_and_by_name() {
    let dir = TempDir::new().unwrap();
    let mut group = start(config(RankMode::Processes, 2, rank_script(&dir))).unwrap();
    assert_eq!(answer(&mut group).len(), 20);
    signal(&pid(&dir, 1), "-KILL");
    let start = Instant::now();
    let ExecutorError(reason) = loop {
        match group.executor.idle() {
            Ok(()) => thread::sleep(Duration::from_millis(20)),
            Err(error) => break error,
        }
        assert!(start.elapsed() < Duration::from_secs(5));
    };
    assert!(reason.contains("rank 1") && reason.contains("signal: 9"), "{reason}");
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
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
fn a_rank_ends_with_its_parent() {
    let mut rank = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "rank::serve_as_rank", "--nocapture"])
        // Nobody listens there: the rank would look for its leader for half a minute.
        .env(rank::PLACE_VARIABLE, "1 2 127.0.0.1:9")
        .env(RANK_TOKEN_VARIABLE, "secret")
        .stdin(Stdio::piped())
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
