//! The real driver code on a machine of fake cards (`emulate::machine`): checks of ops, whole
//! models, and the binaries themselves. What it computes is what the emulation computes.

use cuda::{Cuda, CudaConfig, Driver, Gpu, GpuConfig};
use emulate::{Emulator, PLAIN, Schedule, library, on_machine};
use engine::plan::Want;
use model::Checkpoint;
use models::{Driven, GREEDY, Group, OPTIONS, continuations, folder};
use std::{process::Command, sync::Arc, time::Duration};

fn card(config: CudaConfig) -> Cuda<Gpu> {
    let gpu = Gpu::open(GpuConfig::with_limit(0, Duration::from_secs(200)));
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

/// What the binary beside the tests' own folder answers; it must be built with the feature `cuda`.
fn lockstep(name: &str, cards: usize) -> serde_json::Value {
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
    for cards in [1, 2] {
        assert_eq!(lockstep(name, cards), serde_json::json!(wanted), "{cards} cards");
    }
}
