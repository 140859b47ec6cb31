//! Groups on CUDA cards, on a machine of fake ones (`emulate::machine`): ranks as threads and as
//! processes, what is refused, and ranks that die or hang.
#![cfg(feature = "cuda")]

#[path = "common/rank.rs"]
mod rank;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use cuda::{CudaConfig, KvFormat};
use emulate::on_machine;
use engine::{
    Request, Scheduler,
    plan::{ExecutorError, SamplingParams},
};
use rank::{pid, rank_script, signal};
use worker::{Device, Group, GroupConfig, NcclUse, RankMode, WorkerError};

fn device(nccl: NcclUse) -> Device {
    Device::Cuda { first: 0, config: CudaConfig::default(), share: false, nccl }
}

fn config(rank_mode: RankMode, ranks: usize) -> GroupConfig {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/public");
    GroupConfig {
        ranks,
        device: device(NcclUse::Auto),
        context_max: Some(128),
        kv_memory: Some(8 << 20),
        step_tokens_max: Some(64),
        sequences_max: 4,
        // A fake card on a busy machine.
        step_deadline: Some(Duration::from_secs(60)),
        rank_mode,
        ..GroupConfig::new(root.join("qwen2_gqa4_tied_sharded"))
    }
}

fn start(config: GroupConfig) -> Result<Group, WorkerError> {
    Group::start(config, &mut |_| {})
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
        let rank_program = Some(rank_script(&dir));
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
        let (cuda, nccl) = (CudaConfig::default(), NcclUse::Auto);
        let device = Device::Cuda { first: 0, config: cuda, share: true, nccl };
        let mut shared = start(GroupConfig { device, ..config(RankMode::Threads, 2) }).unwrap();
        assert_eq!(answer(&mut shared).unwrap().len(), 2);
    });
}

#[test]
fn cards_that_do_not_reach_each_other_are_refused_without_nccl() {
    const NAME: &str = "cards_that_do_not_reach_each_other_are_refused_without_nccl";
    on_machine(NAME, 2, &[("FAKE_NO_PEERS", "1")], || {
        let missing = NcclUse::At("/nowhere/libnccl.so.2".into());
        for (nccl, why) in [(NcclUse::Off, "turned off"), (missing, "rank 0: no NCCL (")] {
            let error =
                refused(GroupConfig { device: device(nccl), ..config(RankMode::Threads, 2) });
            assert!(
                error.contains("cannot reach the memory") && error.contains("NVLink"),
                "{error}"
            );
            assert!(error.contains(why) && error.contains("--nccl"), "{error}");
        }
    });
}

#[test]
fn a_meeting_by_nccl_that_fails_is_told_where_there_is_no_other_way() {
    const NAME: &str = "a_meeting_by_nccl_that_fails_is_told_where_there_is_no_other_way";
    let settings = [("FAKE_NO_PEERS", "1"), ("FAKE_NCCL", "init-fails")];
    on_machine(NAME, 2, &settings, || {
        let error = refused(config(RankMode::Threads, 2));
        assert!(error.contains("NVLink") && error.contains("no socket interface"), "{error}");
    });
}

/// Connections are made and code is loaded before the first step, which has no time for them.
#[test]
fn what_nccl_cannot_do_shows_before_the_first_step() {
    const NAME: &str = "what_nccl_cannot_do_shows_before_the_first_step";
    let settings = [("FAKE_NO_PEERS", "1"), ("FAKE_NCCL", "fails-after:0")];
    on_machine(NAME, 2, &settings, || {
        let error = refused(config(RankMode::Threads, 2));
        assert!(error.contains("a rank closed its connection"), "{error}");
    });
}

/// No sum of these is large enough for NCCL, and nobody asks for its library.
#[test]
fn cards_that_reach_each_other_need_no_nccl() {
    const NAME: &str = "cards_that_reach_each_other_need_no_nccl";
    on_machine(NAME, 2, &[("FAKE_NCCL", "init-fails")], || {
        let missing = device(NcclUse::At("/nowhere/libnccl.so.2".into()));
        for device in [device(NcclUse::Auto), device(NcclUse::Off), missing] {
            let mut group = start(GroupConfig { device, ..config(RankMode::Threads, 2) }).unwrap();
            assert_eq!(answer(&mut group).unwrap().len(), 2);
        }
    });
}

#[test]
fn ranks_answer_by_nccl_as_threads_and_as_processes() {
    const NAME: &str = "ranks_answer_by_nccl_as_threads_and_as_processes";
    on_machine(NAME, 2, &[("FAKE_NO_PEERS", "1")], || {
        let dir = tempfile::tempdir().unwrap();
        let rank_program = Some(rank_script(&dir));
        let processes = GroupConfig { rank_program, ..config(RankMode::Processes, 2) };
        let mut processes = start(processes).unwrap();
        let mut threads = start(config(RankMode::Threads, 2)).unwrap();
        let answered = answer(&mut processes).unwrap();
        assert!(answered.iter().all(|tokens| tokens.len() == 4), "{answered:?}");
        assert_eq!(answered, answer(&mut threads).unwrap());
    });
}

/// Of ranks other than 0, with these variables too.
fn script_with(dir: &tempfile::TempDir, variables: &str) -> PathBuf {
    let program = rank_script(dir);
    // What a rank said last is told: without a backtrace, that is its error.
    let exported = format!("#!/bin/sh\nexport RUST_BACKTRACE=0 {variables}\n");
    let script = fs::read_to_string(&program).unwrap().replace("#!/bin/sh\n", &exported);
    fs::write(&program, script).unwrap();
    program
}

/// One rank that does not reach the others is enough for all to take NCCL, with the same tokens.
#[test]
fn all_ranks_exchange_by_nccl_where_one_does_not_reach_the_others() {
    const NAME: &str = "all_ranks_exchange_by_nccl_where_one_does_not_reach_the_others";
    on_machine(NAME, 2, &[], || {
        let dir = tempfile::tempdir().unwrap();
        let program = script_with(&dir, "FAKE_NO_PEERS=1");
        let by = |nccl| GroupConfig {
            device: device(nccl),
            rank_program: Some(program.clone()),
            ..config(RankMode::Processes, 2)
        };
        let error = refused(by(NcclUse::Off));
        assert!(error.contains("rank 1: device 1 cannot reach"), "{error}");
        let mut by_nccl = start(by(NcclUse::Auto)).unwrap();
        let mut by_peers = start(config(RankMode::Threads, 2)).unwrap();
        assert_eq!(answer(&mut by_nccl).unwrap(), answer(&mut by_peers).unwrap());
    });
}

#[test]
fn the_rank_whose_nccl_does_not_fit_is_named() {
    const NAME: &str = "the_rank_whose_nccl_does_not_fit_is_named";
    on_machine(NAME, 2, &[("FAKE_NO_PEERS", "1")], || {
        for (version, wanted) in [
            ("21705", "nor by NCCL: rank 1: NCCL in libnccl.so.2 is release 2.17.5"),
            ("22800", "rank 0 has release 22707 and rank 1 22800"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let program = script_with(&dir, &format!("FAKE_NCCL=version:{version}"));
            let rank_program = Some(program);
            let error = refused(GroupConfig { rank_program, ..config(RankMode::Processes, 2) });
            assert!(error.contains(wanted), "{error}");
        }
    });
}

fn end_and_form_again() {
    end_in_time(|group, wanted| {
        // The rank that lives goes on with what it has loaded.
        group.executor.recover(&|| true).unwrap();
        assert_eq!(group.epoch.load(Ordering::Relaxed), 2);
        assert_eq!(answer(group).unwrap(), wanted);
    });
}

/// A device that waits in NCCL for a rank that is gone has hung by the time that is given up.
fn end_for_good() {
    end_in_time(|group, _| {
        let error = group.executor.recover(&|| true).unwrap_err().to_string();
        assert!(error.contains("out of use"), "{error}");
    });
}

/// A rank that stands still costs its deadline and little more; one that is gone costs less.
fn end_in_time(then: fn(&mut Group, &[Vec<u32>])) {
    let wanted = answer(&mut start(config(RankMode::Threads, 2)).unwrap()).unwrap();
    for name in ["-STOP", "-KILL"] {
        let dir = tempfile::tempdir().unwrap();
        let deadline = Duration::from_secs(10);
        let mut group = start(GroupConfig {
            rank_program: Some(rank_script(&dir)),
            step_deadline: Some(deadline),
            ..config(RankMode::Processes, 2)
        })
        .unwrap();
        let mut scheduler = Scheduler::new(group.info.scheduler_config(2));
        // The prompt, and a token: steps of each kind have run, and have no code to load.
        for _ in 0..3 {
            go_on(&mut group, &mut scheduler).unwrap();
        }
        signal(&pid(&dir, 1), name);
        let began = Instant::now();
        let error = go_on(&mut group, &mut scheduler).expect_err("a rank is missing").to_string();
        let took = began.elapsed();
        // Loaded machines are slow; without a deadline this would not end at all.
        assert!(took < 3 * deadline, "{name}: {took:?}, {error}");
        let told = ["rank 1", "did not take part", "has not finished within"];
        assert!(told.iter().any(|told| error.contains(told)), "{error}");
        then(&mut group, &wanted);
        let began = Instant::now();
        drop(group);
        assert!(began.elapsed() < deadline, "{name}: {:?}", began.elapsed());
    }
}

#[test]
fn a_rank_that_hangs_or_dies_ends_the_group_in_time() {
    const NAME: &str = "a_rank_that_hangs_or_dies_ends_the_group_in_time";
    on_machine(NAME, 2, &[], end_and_form_again);
}

#[test]
fn a_rank_that_hangs_or_dies_ends_the_group_in_time_by_nccl() {
    const NAME: &str = "a_rank_that_hangs_or_dies_ends_the_group_in_time_by_nccl";
    on_machine(NAME, 2, &[("FAKE_NO_PEERS", "1")], end_for_good);
}

#[test]
fn a_cache_in_fp8_answers_where_keys_have_biases() {
    on_machine("a_cache_in_fp8_answers_where_keys_have_biases", 1, &[], || {
        let fp8 = CudaConfig { kv_format: KvFormat::Fp8, ..CudaConfig::default() };
        let device = Device::Cuda { first: 0, config: fp8, share: false, nccl: NcclUse::Auto };
        let biased = GroupConfig { device, ..config(RankMode::Threads, 1) };
        assert_eq!(answer(&mut start(biased).unwrap()).unwrap().len(), 2);
    });
}
