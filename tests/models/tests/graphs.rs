//! Decode steps that are captured and run again: the same bits, few launches, one copy.

use collective::Collective;
use cuda::{Cuda, CudaConfig};
use emulate::{Counts, Emulator, PLAIN, Schedule, library};
use engine::plan::{SamplingParams, StepOutput, Want};
use model::Checkpoint;
use models::{Driven, Group, Link, OPTIONS, folder, peer_memory, staged};
use std::sync::Arc;

fn checkpoint(name: &str) -> Arc<Checkpoint> {
    Arc::new(Checkpoint::open(&folder(name).unwrap()).unwrap())
}

fn devices(count: usize, captures: bool) -> (Vec<Cuda<Emulator>>, Counts) {
    let library = library(PLAIN);
    let device = |_| {
        let emulator = Emulator::load(&library, Schedule::InTurn).expect("it loads");
        let emulator = if captures { emulator } else { emulator.without_capture() };
        Cuda::new(emulator, CudaConfig::default())
    };
    let devices: Vec<_> = (0..count).map(device).collect();
    let counts = devices[0].driver().counts();
    (devices, counts)
}

/// Answers of sequences that come and go, so that steps are of many sizes, some of them more than
/// twice: greedy and drawn, with penalties and logprobs.
fn answers<C: Collective<Cuda<Emulator>>>(
    name: &str,
    ranks: usize,
    captures: bool,
    link: Link<Cuda<Emulator>, C>,
) -> (Vec<StepOutput>, Counts) {
    let (devices, counts) = devices(ranks, captures);
    let mut group = Group::load(&checkpoint(name), OPTIONS, devices, link).unwrap();
    let sequence = |index: usize| {
        let params = SamplingParams {
            temperature: if index.is_multiple_of(2) { 0.0 } else { 0.8 },
            repetition_penalty: 1.2,
            seed: index as u64,
            logprobs: Some(2),
            ..SamplingParams::GREEDY
        };
        let prompt: Vec<u32> =
            (0..5 + 9 * index).map(|at| (at * 31 + index) as u32 % 300).collect();
        let blocks = (0..6).map(|block| (index * 6 + block) as u32).collect();
        Driven::new(index as u64, &prompt, params, blocks)
    };
    let mut sequences: Vec<Driven> = (0..6).map(sequence).collect();
    let mut outputs = Vec::new();
    for step in 0..14 {
        // One more each step, and later one fewer.
        let there = 1 + step.min(5) - usize::from(step > 9) * (step - 9);
        let chunks = sequences.iter_mut().take(there).map(|s| s.chunk(64, Want::Sample));
        let output = group.step(chunks.collect()).unwrap();
        assert_eq!(output.failed, []);
        for (id, sampled) in &output.sampled {
            sequences[*id as usize].tokens.push(sampled.token);
        }
        outputs.push(output);
    }
    (outputs, counts)
}

#[test]
fn captured_steps_have_the_bits_of_others() {
    for name in ["qwen2_gqa2_hd128", "qwen3_gqa4_hd128_tied", "qwen1_ntk_logn", "qwen2_moe"] {
        let (eager, none) = answers(name, 1, false, staged);
        let (captured, counts) = answers(name, 1, true, staged);
        assert_eq!(eager, captured, "{name}");
        assert_eq!(none.replays(), 0);
        assert!(counts.replays() > 2 && counts.captured().len() >= 2, "{name}");
    }
}

#[test]
fn ranks_capture_their_exchanges_too() {
    let (eager, _) = answers("qwen2_gqa2_hd128", 2, false, peer_memory);
    let (captured, counts) = answers("qwen2_gqa2_hd128", 2, true, peer_memory);
    assert_eq!(eager, captured);
    assert!(counts.replays() > 2);
}
