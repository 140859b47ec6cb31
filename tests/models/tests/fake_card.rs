//! The real driver code on a machine of fake cards (`emulate::machine`): checks of ops, whole
//! models, and the binaries themselves. What it computes is what the emulation computes.

use collective::{Cards, CardsConfig, Collective, CollectiveError, HostCollective, Threads};
use cuda::{Cuda, CudaConfig, Driver, Gpu, GpuConfig, NCCL_LIBRARY, PeerConfig};
use emulate::{Emulator, PLAIN, Schedule, library, on_machine};
use engine::plan::Want;
use kernels::{AddNorm, Tensor};
use model::Checkpoint;
use models::{Driven, GREEDY, Group, OPTIONS, PATIENCE, continuations, folder};
use std::{process::Command, sync::Arc, thread, time::Duration};

fn card(config: CudaConfig) -> Cuda<Gpu> {
    nth_card(0, config)
}

fn nth_card(ordinal: usize, config: CudaConfig) -> Cuda<Gpu> {
    let gpu = Gpu::open(GpuConfig::with_limit(ordinal, Duration::from_secs(200)));
    Cuda::new(gpu.expect("a card"), config)
}

fn emulator(config: CudaConfig) -> Cuda<Emulator> {
    let emulator = Emulator::load(&library(PLAIN), Schedule::InTurn).expect("it loads");
    Cuda::new(emulator, config)
}

#[test]
fn ops_agree_with_the_oracle() {
    on_machine("ops_agree_with_the_oracle", 1, &[], || {
        // Those that take no minutes.
        let rooms = [
            checks::elementwise::checks(),
            checks::every_rows::checks(),
            checks::fp8::checks(),
            checks::linear::checks(),
            checks::norm::checks(),
            checks::decode::checks(),
        ];
        for check in rooms.into_iter().flatten() {
            assert_eq!((check.run)(&card), Ok(()), "{}", check.name);
        }
    });
}

/// The emulation takes its time.
const TOKENS: usize = 4;

fn prompt(name: &str) -> Vec<u32> {
    let prompt = &continuations(name).unwrap()[0].prompt;
    prompt[..prompt.len().min(9)].to_vec()
}

/// Greedy tokens, and the bits of every logit on the way.
fn answer<D: Driver>(name: &str, device: Cuda<D>) -> (Vec<u32>, Vec<u32>) {
    let checkpoint = Arc::new(Checkpoint::open(&folder(name).unwrap()).unwrap());
    let mut group = Group::load(&checkpoint, OPTIONS, vec![device], models::staged).unwrap();
    let prompt = &prompt(name)[..];
    let logits = Driven::new(1, prompt, GREEDY, (20..40).collect()).chunk(256, Want::Logits);
    let output = group.step(vec![logits]).unwrap();
    let bits = output.logits.iter().flat_map(|(_, rows)| rows).map(|x| x.to_bits()).collect();
    let mut sequence = Driven::new(2, prompt, GREEDY, (0..20).collect());
    for _ in 0..TOKENS {
        let output = group.step(vec![sequence.chunk(256, Want::Sample)]).unwrap();
        sequence.tokens.push(output.sampled[0].1.token);
    }
    (sequence.tokens[prompt.len()..].to_vec(), bits)
}

#[test]
fn models_answer_as_in_the_emulation() {
    on_machine("models_answer_as_in_the_emulation", 1, &[], || {
        for name in ["qwen2_gqa2_hd128", "qwen2_gptq_int4"] {
            let (on_card, emulated) =
                (answer(name, card(checks::BF16)), answer(name, emulator(checks::BF16)));
            assert_eq!(on_card.0, emulated.0, "{name}");
            assert!(on_card.1 == emulated.1, "{name}: other logits");
        }
    });
}

const COLS: usize = 1032;
const FEW: usize = 1;
const MANY: usize = 40;

/// A residual sum of few rows and one of many, with the norm behind it, on one of the ranks.
fn residual_sums(host: Threads, config: &CardsConfig) -> Result<[Vec<f32>; 2], CollectiveError> {
    let rank = host.rank();
    let device = nth_card(rank, checks::BF16);
    let mut cards = Cards::new(&device, host, config)?;
    assert_eq!(cards.warning(), None);
    let noise = |seed: usize, rows: usize| {
        let values = checks::rounded(&checks::noise(seed as u64, rows * COLS));
        Tensor::from_host(&device, COLS, &values)
    };
    let weight = noise(7, 1)?;
    let mut sum = |rows: usize| {
        let (mut delta, mut x) = (noise(rank, rows)?, noise(5, rows)?);
        let mut out = Tensor::zeros(&device, rows, COLS)?;
        let then = AddNorm { x: &mut x, out: &mut out, weight: &weight, eps: 1e-6 };
        cards.all_reduce_add_norm(&device, &mut delta, then)?;
        cards.check(&device)?;
        let mut values = vec![0.0; 2 * rows * COLS];
        let (first, second) = values.split_at_mut(rows * COLS);
        kernels::Backend::read_floats(&device, first, &x.data)?;
        kernels::Backend::read_floats(&device, second, &out.data)?;
        Ok::<_, CollectiveError>(values)
    };
    Ok([sum(FEW)?, sum(MANY)?])
}

/// As every rank has them.
fn on_three_ranks(config: &CardsConfig) -> Result<[Vec<f32>; 2], CollectiveError> {
    thread::scope(|scope| {
        let spawned = Threads::group(3).into_iter();
        let spawned = spawned.map(|host| scope.spawn(|| residual_sums(host, config)));
        let ranks: Vec<_> = spawned.collect();
        let mut each = ranks.into_iter().map(|rank| rank.join().expect("a rank"));
        let first = each.next().expect("three");
        each.for_each(|other| assert_eq!(first, other, "ranks have other bits"));
        first
    })
}

/// Peer memory rounds a sum once; NCCL, as the fake one has it, at each rank: bits tell them apart.
#[test]
fn large_sums_go_by_nccl_and_small_ones_by_peer_memory() {
    on_machine("large_sums_go_by_nccl_and_small_ones_by_peer_memory", 3, &[], || {
        let peers = CardsConfig::peers(PeerConfig::new(3, PATIENCE));
        let with = |crossover_bytes| CardsConfig {
            nccl: Some(NCCL_LIBRARY.into()),
            crossover_bytes,
            sum_bytes_max: MANY * COLS * 2,
            ..peers.clone()
        };
        let ([few_by_peers, many_by_peers], [few_by_nccl, many_by_nccl]) =
            (on_three_ranks(&peers).unwrap(), on_three_ranks(&with(0)).unwrap());
        assert!(few_by_peers != few_by_nccl && many_by_peers != many_by_nccl, "one way alone");
        // As large as the few, and not larger.
        let [few, many] = on_three_ranks(&with(FEW * COLS * 2)).unwrap();
        assert!(few == few_by_peers && many == many_by_nccl, "each sum goes the other way");
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 0.02 * (1.0 + a.abs());
        assert!(many_by_peers.iter().zip(&many_by_nccl).all(near), "the ways differ");
        // What is never of use is not opened.
        let unused =
            CardsConfig { nccl: Some("/nowhere/libnccl.so.2".into()), ..with(MANY * COLS * 2) };
        assert!(on_three_ranks(&unused).unwrap()[1] == many_by_peers);
    });
}

#[test]
fn large_sums_go_by_peer_memory_with_a_warning_where_nccl_fails() {
    const NAME: &str = "large_sums_go_by_peer_memory_with_a_warning_where_nccl_fails";
    on_machine(NAME, 2, &[("FAKE_NCCL", "init-fails")], || {
        let peers = CardsConfig::peers(PeerConfig::new(2, PATIENCE));
        let many = |library: &str| CardsConfig {
            nccl: Some(library.into()),
            sum_bytes_max: (8 << 20) + 1,
            ..peers.clone()
        };
        for (library, why) in
            [(NCCL_LIBRARY, "no socket interface"), ("/nowhere/libnccl.so.2", "no NCCL (")]
        {
            let config = many(library);
            thread::scope(|scope| {
                for host in Threads::group(2) {
                    let config = &config;
                    scope.spawn(move || {
                        let device = nth_card(host.rank(), checks::BF16);
                        let mut cards = Cards::new(&device, host, config).unwrap();
                        let warning = cards.warning().unwrap_or_default().to_owned();
                        assert!(warning.contains("8388608") && warning.contains(why), "{warning}");
                        let mut x = Tensor::from_host(&device, 8, &[1.0; 8]).unwrap();
                        cards.all_reduce_sum(&device, &mut x).unwrap();
                        cards.check(&device).unwrap();
                        let mut got = [0.0; 8];
                        kernels::Backend::read_floats(&device, &mut got, &x.data).unwrap();
                        assert_eq!(got, [2.0; 8]);
                    });
                }
            });
        }
    });
}

/// What the binary beside the tests' own folder answers; it must be built with the feature `cuda`.
fn lockstep(name: &str, cards: usize, settings: &[(&str, &str)]) -> serde_json::Value {
    let this = std::env::current_exe().expect("the test's own path");
    let lockstep = this.ancestors().nth(2).expect("a build folder").join("lockstep");
    let ids: Vec<String> = prompt(name).iter().map(u32::to_string).collect();
    let done = Command::new(lockstep)
        .args(["run", "--device", "cuda", "--max-tokens", "4", "--ignore-eos", "--json"])
        .args(["--prompt-ids", &ids.join(","), "--kv-memory", "64M"])
        .args(["--temperature", "0", "--repetition-penalty", "1"])
        .args(["--tp", &cards.to_string(), "--model"])
        .arg(folder(name).unwrap())
        .envs(emulate::machine(cards))
        .envs(settings.iter().copied())
        .output()
        .expect("lockstep runs");
    let (out, errors) =
        (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{errors}");
    let answered: serde_json::Value = serde_json::from_str(&out).expect("an object of JSON");
    answered["token_ids"].clone()
}

#[test]
#[ignore = "needs the binary built with the feature cuda"]
fn lockstep_answers_on_one_card_and_on_two_as_in_the_emulation() {
    let name = "qwen2_gqa2_hd128";
    let (wanted, _) = answer(name, emulator(checks::BF16));
    for (cards, settings) in [(1, &[][..]), (2, &[]), (2, &[("FAKE_NO_PEERS", "1")])] {
        let answered = lockstep(name, cards, settings);
        assert_eq!(answered, serde_json::json!(wanted), "{cards} cards {settings:?}");
    }
}
