//! Real groups over small checkpoints: whatever else runs, a sequence's results are the same bits.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use cpu::Precision;
use engine::{Request, Scheduler, SchedulerConfig, Update, plan::SamplingParams};
use model::Numbers;
use tokio::time::timeout;
use worker::{Engine, Group, GroupConfig, Metrics, News, WorkerError};

const PATIENCE: Duration = Duration::from_secs(60);

fn checkpoint(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/public").join(name)
}

fn config(name: &str, ranks: usize, precision: Precision) -> GroupConfig {
    GroupConfig {
        ranks,
        threads_per_rank: Some(1),
        precision,
        context_max: Some(512),
        kv_memory: Some(64 << 20),
        ..GroupConfig::new(checkpoint(name))
    }
}

fn group(config: GroupConfig) -> Group {
    Group::start(config, &mut |_| {}).unwrap()
}

/// A prompt of its own for each number, and sampling that reaches beyond the likeliest token.
fn request(number: u32, prompt: usize, max_tokens: usize) -> Request {
    Request {
        prompt: (0..prompt as u32).map(|at| (at * 31 + number * 17 + 7) % 370).collect(),
        generated: Vec::new(),
        params: SamplingParams {
            temperature: 0.8,
            top_p: 0.95,
            top_k: 40,
            min_p: 0.0,
            repetition_penalty: 1.1,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: u64::from(number),
            logit_bias: Vec::new(),
            ban: None,
            logprobs: Some(3),
        },
        max_tokens,
        stop_ids: Vec::new(),
        score_prompt: false,
    }
}

/// Runs requests together; the updates of each, merged, and how often a sequence was preempted.
fn run_all(
    group: &mut Group,
    next_plan: &mut u64,
    bounds: SchedulerConfig,
    requests: &[Request],
) -> (Vec<Update>, u64) {
    let mut scheduler = Scheduler::new(bounds);
    for request in requests {
        scheduler.submit(request.clone()).unwrap();
    }
    let mut merged: BTreeMap<u64, Update> = BTreeMap::new();
    while let Some(mut plan) = scheduler.schedule() {
        // One group serves several schedulers: its own count of plans goes on.
        let number = std::mem::replace(&mut plan.number, *next_plan);
        *next_plan += 1;
        group.executor.launch(plan).unwrap();
        let mut output = group.executor.finish().unwrap();
        output.number = number;
        for update in scheduler.commit(output).unwrap() {
            match merged.get_mut(&update.sequence) {
                Some(earlier) => earlier.merge(update),
                None => drop(merged.insert(update.sequence, update)),
            }
        }
    }
    let stats = scheduler.stats();
    assert_eq!(stats.blocks_free, stats.blocks_total);
    (merged.into_values().collect(), stats.preemptions)
}

/// A token, its logprob as bits, and the likeliest with theirs.
type Bits = (u32, u32, Vec<(u32, u32)>);

/// What is known of every position.
fn bits(update: &Update) -> Vec<Bits> {
    let known = update.tokens.iter().chain(&update.scores);
    known
        .map(|token| {
            let top = token.top.iter().map(|&(id, logprob)| (id, logprob.to_bits()));
            (token.token, token.logprob.unwrap().to_bits(), top.collect())
        })
        .collect()
}

fn batch_invariance(name: &str, ranks: usize, precision: Precision) {
    let mut group = group(config(name, ranks, precision));
    let roomy = SchedulerConfig { blocks: 256, ..group.info.scheduler_config(64) };
    let mut plans = 0;
    let mut run = |bounds: SchedulerConfig, requests: &[Request]| {
        run_all(&mut group, &mut plans, bounds, requests)
    };
    let one = request(1, 70, 20);
    let alone = bits(&run(roomy.clone(), std::slice::from_ref(&one)).0[0]);
    assert_eq!(alone.len(), 20);

    let mut crowd: Vec<Request> =
        (2..17).map(|number| request(number, 5 + 9 * number as usize, 24)).collect();
    crowd.insert(7, one.clone());
    assert_eq!(bits(&run(roomy.clone(), &crowd).0[7]), alone, "among 15 others");

    let chunked = SchedulerConfig { step_tokens_max: 13, ..roomy.clone() };
    assert_eq!(bits(&run(chunked, &crowd).0[7]), alone, "in chunks");

    let tight = SchedulerConfig { blocks: 9, context_max: 144, ..roomy.clone() };
    let elder = request(30, 40, 60);
    let (updates, preemptions) = run(tight, &[elder, one.clone()]);
    assert!(preemptions > 0);
    assert_eq!(bits(&updates[1]), alone, "preempted");

    // The same prompt again in one scheduler: the second starts behind cached blocks.
    let spaced = SchedulerConfig { sequences_max: 1, ..roomy.clone() };
    let (updates, _) = run(spaced, &[one.clone(), one.clone()]);
    assert!(updates[1].cached_tokens >= 64, "{}", updates[1].cached_tokens);
    assert_eq!(bits(&updates[1]), alone, "behind a cached prefix");

    let generated: Vec<u32> = alone[..8].iter().map(|token| token.0).collect();
    let resumed = Request { generated, ..one };
    assert_eq!(bits(&run(roomy, &[resumed]).0[0]), alone[8..], "resumed elsewhere");
}

#[test]
fn a_sequence_gives_the_same_bits_in_any_company() {
    for precision in [Precision::Fast, Precision::Exact] {
        batch_invariance("llama_smollm2", 1, precision);
        batch_invariance("qwen2_gqa4_tied_sharded", 2, precision);
    }
}

/// A ban is a matter of positions: it holds behind a prompt that came in chunks and after the
/// sequence went elsewhere.
#[test]
fn banned_tokens_stay_out_of_the_beginning_wherever_it_runs() {
    const BAN: usize = 12;
    let mut group = group(config("qwen2_gqa4_tied_sharded", 1, Precision::Fast));
    let bounds = SchedulerConfig { blocks: 256, ..group.info.scheduler_config(64) };
    let mut plans = 0;
    let mut run = |request: &Request, step_tokens_max: usize| {
        let bounds = SchedulerConfig { step_tokens_max, ..bounds.clone() };
        bits(&run_all(&mut group, &mut plans, bounds, std::slice::from_ref(request)).0[0])
    };
    let mut greedy = request(1, 40, 24);
    greedy.params.temperature = 0.0;
    let liked: Vec<u32> = run(&greedy, 64).iter().map(|token| token.0).collect();
    greedy.stop_ids = liked.clone();
    assert_eq!(run(&greedy, 64).len(), 1, "the first token stops it");
    greedy.params.logit_bias = liked.iter().map(|&token| (token, 50.0)).collect();
    greedy.params.ban(40 + BAN, liked.clone());
    let held = run(&greedy, 64);
    assert_eq!(held.len(), BAN + 1, "it stops as soon as it may");
    assert!(held[..BAN].iter().all(|token| !liked.contains(&token.0)));
    assert_eq!(run(&greedy, 7), held, "in chunks");
    for cut in [1, BAN - 1, BAN] {
        let generated = held[..cut].iter().map(|token| token.0).collect();
        assert_eq!(run(&Request { generated, ..greedy.clone() }, 64), held[cut..], "{cut}");
    }
}

/// Ranks change the order of sums: the answer stays where it was clear.
#[test]
fn ranks_agree_on_greedy_answers() {
    let answer = |ranks| {
        let mut group = group(config("qwen2_gqa4_tied_sharded", ranks, Precision::Exact));
        let bounds = group.info.scheduler_config(8);
        let mut greedy = request(3, 40, 24);
        greedy.params.temperature = 0.0;
        let (updates, _) = run_all(&mut group, &mut 0, bounds, &[greedy]);
        updates[0].tokens.clone()
    };
    let one = answer(1);
    for (at, (one, two)) in one.iter().zip(&answer(2)).enumerate() {
        let margin = one.top[0].1 - one.top[1].1;
        if margin < 0.002 && one.token != two.token {
            return;
        }
        assert_eq!(one.token, two.token, "token {at}, margin {margin}");
        assert!((one.logprob.unwrap() - two.logprob.unwrap()).abs() < 1e-3);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_over_two_ranks_answers_and_stops() {
    let group = group(config("qwen2_gqa4_tied_sharded", 2, Precision::Fast));
    let bounds = group.info.scheduler_config(8);
    let engine = Engine::start(group.executor, bounds, Arc::new(Metrics::new("tiny"))).unwrap();
    let mut output = engine.run(request(1, 30, 10)).unwrap();
    let mut tokens = 0;
    while let Some(news) = timeout(PATIENCE, output.next()).await.unwrap() {
        if let News::Update(update) = news.unwrap() {
            tokens += update.tokens.len();
        }
    }
    assert_eq!(tokens, 10);
    tokio::task::spawn_blocking(move || engine.stop()).await.unwrap();
}

#[test]
fn what_cannot_be_is_refused_before_loading() {
    let refused = |config: GroupConfig| match Group::start(config, &mut |_| {}) {
        Ok(_) => panic!("not refused"),
        Err(error) => error,
    };
    let base = || config("llama_smollm2", 1, Precision::Fast);
    let error = refused(GroupConfig { kv_memory: Some(1 << 60), ..base() });
    assert!(matches!(&error, WorkerError::Memory(_)), "{error}");
    assert!(error.to_string().contains("KV cache"), "{error}");
    let error = refused(GroupConfig { context_max: Some(1 << 40), kv_memory: None, ..base() });
    assert!(error.to_string().contains("a smaller --context"), "{error}");
    let error = refused(GroupConfig { kv_memory: Some(10), ..base() });
    assert!(error.to_string().contains("no block"), "{error}");
    let error = refused(GroupConfig { kv_memory: Some(1 << 16), ..base() });
    assert!(error.to_string().contains("--kv-memory"), "{error}");
    let error = refused(GroupConfig { ranks: 64, ..base() });
    assert!(error.to_string().contains("at most"), "{error}");
    let error = refused(GroupConfig { ranks: 0, ..base() });
    assert!(matches!(error, WorkerError::Config(_)), "{error}");
    let error = refused(GroupConfig { model: "/nowhere".into(), ..base() });
    assert!(error.to_string().contains("/nowhere"), "{error}");
}

/// The model was trained on 8,192; who asks for more by name gets it.
#[test]
fn a_context_beyond_the_trained_one_is_allowed_where_asked_for() {
    let base = config("llama_smollm2", 1, Precision::Fast);
    let config = GroupConfig { context_max: Some(10_000), kv_memory: None, ..base };
    let group = Group::start(config, &mut |_| {}).unwrap();
    assert_eq!(group.info.context_max, 10_000);
    assert!(group.info.blocks * 16 >= 10_000);
}

/// What there is of a model before its weights are.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let config = checkpoint("qwen2_mha_hd64").join("config.json");
    std::fs::copy(config, folder.path().join("config.json")).unwrap();
    folder
}

#[test]
fn a_model_of_random_numbers_answers_the_same_on_any_number_of_ranks() {
    let folder = folder();
    let answer = |ranks: usize, numbers: Numbers| {
        let config = GroupConfig {
            model: folder.path().into(),
            random: Some(numbers),
            ..config("", ranks, Precision::Exact)
        };
        let mut group = group(config);
        let bounds = group.info.scheduler_config(64);
        let (updates, _) = run_all(&mut group, &mut 0, bounds, &[request(1, 40, 12)]);
        bits(&updates[0])
    };
    for numbers in [Numbers::Bf16, Numbers::INT4] {
        let one = answer(1, numbers);
        assert_eq!(one.len(), 12);
        assert!(one.iter().all(|(_, logprob, _)| f32::from_bits(*logprob).is_finite()));
        assert_eq!(answer(2, numbers), one, "{numbers:?}");
    }
    let bare = GroupConfig::new(folder.path());
    let error = Group::start(bare, &mut |_| {}).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains(".safetensors"), "{error}");
}
