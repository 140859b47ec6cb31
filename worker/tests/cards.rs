//! Groups on CUDA cards, on a machine of fake ones (`emulate::machine`): ranks as threads and as
//! processes, what is refused, and ranks that die or hang. The rank program is this test binary.
#![cfg(feature = "cuda")]

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use cuda::{CudaConfig, KvFormat};
use emulate::on_machine;
use engine::{
    Request, Scheduler,
    plan::{ExecutorError, SamplingParams},
};
use worker::{
    Device, Group, GroupConfig, RANK_TOKEN_VARIABLE, RankConfig, RankMode, WorkerError, run_rank,
};

const PLACE_VARIABLE: &str = "LOCKSTEP_TEST_PLACE";

/// Not a test of its own: what the script below starts.
#[test]
#[ignore = "serves as a rank of the other tests"]
fn serve_as_rank() {
    let Ok(place) = std::env::var(PLACE_VARIABLE) else { return };
    let mut words = place.split(' ');
    let mut word = || words.next().expect("rank, world size, leader");
    let config = RankConfig {
        rank: word().parse().unwrap(),
        world_size: word().parse().unwrap(),
        leader: word().parse().unwrap(),
        token: std::env::var(RANK_TOKEN_VARIABLE).unwrap(),
    };
    run_rank(config).unwrap();
}

/// A rank that notes its process id beside the script.
fn rank_script(dir: &Path) -> PathBuf {
    let (exe, path) = (std::env::current_exe().unwrap(), dir.join("rank.sh"));
    let text = format!(
        "#!/bin/sh\necho $$ > {}/pid.$3\n{PLACE_VARIABLE}=\"$3 $5 $7\" exec \"{}\" --ignored \
         --exact serve_as_rank --nocapture\n",
        dir.display(),
        exe.display()
    );
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn config(rank_mode: RankMode, ranks: usize) -> GroupConfig {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/public");
    GroupConfig {
        ranks,
        device: Device::Cuda { first: 0, config: CudaConfig::default(), share: false },
        context_max: Some(128),
        kv_memory: Some(8 << 20),
        step_tokens_max: 64,
        sequences_max: 4,
        // A fake card on a busy machine.
        step_deadline: Some(Duration::from_secs(60)),
        rank_mode,
        ..GroupConfig::new(root.join("qwen2_gqa4_tied_sharded"))
    }
}

fn start(config: GroupConfig) -> Result<Group, WorkerError> {
    Group::start(config, &mut |_, _| {})
}

/// Two requests side by side on a new group; their tokens, or why there are none.
fn answer(group: &mut Group) -> Result<Vec<Vec<u32>>, ExecutorError> {
    go_on(group, &mut Scheduler::new(group.info.scheduler_config(2)))
}

/// As [`answer`], on a group whose plans `scheduler` has made so far.
fn go_on(group: &mut Group, scheduler: &mut Scheduler) -> Result<Vec<Vec<u32>>, ExecutorError> {
    let mut ids = Vec::new();
    for seed in 0..2u32 {
        let request = Request {
            prompt: (0..9).map(|at| (at * 31 + 7 * seed) % 370).collect(),
            generated: Vec::new(),
            params: SamplingParams::GREEDY,
            max_tokens: 4,
            stop_ids: Vec::new(),
            score_prompt: false,
        };
        ids.push(scheduler.submit(request).unwrap());
    }
    let mut tokens = vec![Vec::new(); 2];
    while let Some(plan) = scheduler.schedule() {
        group.executor.launch(plan)?;
        for update in scheduler.commit(group.executor.finish()?).unwrap() {
            let place = ids.iter().position(|id| *id == update.sequence).expect("one of the two");
            tokens[place].extend(update.tokens.iter().map(|token| token.token));
        }
    }
    Ok(tokens)
}

#[test]
fn ranks_with_a_card_each_answer_as_threads_and_as_processes() {
    const NAME: &str = "ranks_with_a_card_each_answer_as_threads_and_as_processes";
    on_machine(NAME, 2, &[], || {
        let dir = tempfile::tempdir().unwrap();
        let rank_program = Some(rank_script(dir.path()));
        let processes = GroupConfig { rank_program, ..config(RankMode::Processes, 2) };
        let mut processes = start(processes).unwrap();
        let mut threads = start(config(RankMode::Threads, 2)).unwrap();
        let answered = answer(&mut processes).unwrap();
        assert!(answered.iter().all(|tokens| tokens.len() == 4), "{answered:?}");
        assert_eq!(answered, answer(&mut threads).unwrap());
        assert!(threads.info.device.contains("cuda:0") && threads.info.device.contains("cuda:1"));
    });
}

fn refused(config: GroupConfig) -> String {
    start(config).map(|group| group.info).expect_err("a refusal").to_string()
}

#[test]
fn a_rank_wants_a_card_of_its_own() {
    on_machine("a_rank_wants_a_card_of_its_own", 1, &[], || {
        let error = refused(config(RankMode::Threads, 2));
        assert!(error.contains("2 ranks and 1 cards") && error.contains("--tp"), "{error}");
        let device = Device::Cuda { first: 0, config: CudaConfig::default(), share: true };
        let mut shared = start(GroupConfig { device, ..config(RankMode::Threads, 2) }).unwrap();
        assert_eq!(answer(&mut shared).unwrap().len(), 2);
    });
}

#[test]
fn cards_that_do_not_reach_each_other_are_refused() {
    const NAME: &str = "cards_that_do_not_reach_each_other_are_refused";
    on_machine(NAME, 2, &[("FAKE_NO_PEERS", "1")], || {
        let error = refused(config(RankMode::Threads, 2));
        assert!(error.contains("cannot reach the memory") && error.contains("NVLink"), "{error}");
    });
}

/// A rank that stands still costs its deadline and little more; one that is gone costs less.
#[test]
fn a_rank_that_hangs_or_dies_ends_the_group_in_time() {
    const NAME: &str = "a_rank_that_hangs_or_dies_ends_the_group_in_time";
    on_machine(NAME, 2, &[], || {
        for signal in ["STOP", "KILL"] {
            let dir = tempfile::tempdir().unwrap();
            let deadline = Duration::from_secs(10);
            let mut group = start(GroupConfig {
                rank_program: Some(rank_script(dir.path())),
                step_deadline: Some(deadline),
                ..config(RankMode::Processes, 2)
            })
            .unwrap();
            let mut scheduler = Scheduler::new(group.info.scheduler_config(2));
            go_on(&mut group, &mut scheduler).unwrap();
            let pid = fs::read_to_string(dir.path().join("pid.1")).unwrap();
            let kill = format!("kill -{signal} {}", pid.trim());
            assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
            let began = Instant::now();
            let error =
                go_on(&mut group, &mut scheduler).expect_err("a rank is missing").to_string();
            let took = began.elapsed();
            // Loaded machines are slow; without a deadline this would not end at all.
            assert!(took < 3 * deadline, "{signal}: {took:?}, {error}");
            assert!(error.contains("rank 1") || error.contains("did not take part"), "{error}");
            drop(group);
        }
    });
}

#[test]
fn a_cache_in_fp8_is_refused_where_keys_have_biases() {
    on_machine("a_cache_in_fp8_is_refused_where_keys_have_biases", 1, &[], || {
        let fp8 = CudaConfig { kv_format: KvFormat::Fp8, ..CudaConfig::default() };
        let device = Device::Cuda { first: 0, config: fp8, share: false };
        let biased = GroupConfig { device, ..config(RankMode::Threads, 1) };
        let error = refused(GroupConfig { device, ..config(RankMode::Threads, 1) });
        assert!(error.contains("biases") && error.contains("--kv-cache fp8"), "{error}");
        let model = biased.model.with_file_name("qwen3_gqa4_hd128_tied");
        assert_eq!(answer(&mut start(GroupConfig { model, ..biased }).unwrap()).unwrap().len(), 2);
    });
}
