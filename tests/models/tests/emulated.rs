//! The CUDA backend in emulation against the reference implementations.

use cuda::{Cuda, CudaConfig, PrefillKernel};
use emulate::{Emulator, PLAIN, Schedule, library};
use engine::plan::Want;
use model::Checkpoint;
use models::{Driven, GREEDY, Group, OPTIONS, folder};
use std::sync::Arc;

fn models(check: &str, prefill: PrefillKernel) {
    let library = library(PLAIN);
    let device = |config| {
        let emulator = Emulator::load(&library, Schedule::InTurn).expect("it loads");
        Cuda::new(emulator, CudaConfig { prefill, ..config })
    };
    let mut checks = models::checks().into_iter();
    let check = checks.find(|one| one.name == check).expect("a check of this name");
    assert_eq!((check.run)(&device), Ok(()), "{}", check.name);
}

#[test]
fn models_agree_with_the_reference_implementations() {
    models("models in bf16", PrefillKernel::Mma);
}

#[test]
fn models_agree_with_them_by_wgmma_too() {
    models("models in bf16", PrefillKernel::Wgmma);
}

#[test]
fn quantised_models_and_mixtures_of_experts_agree_with_them() {
    models("quantised models and mixtures of experts", PrefillKernel::Mma);
}

#[test]
fn models_with_weights_in_fp8_come_near_them() {
    models("models with weights in fp8", PrefillKernel::Wgmma);
}

#[test]
fn models_with_caches_in_fp8_come_near_them() {
    models("models with caches in fp8", PrefillKernel::Mma);
    models("models with caches in fp8", PrefillKernel::Wgmma);
}

/// Two sequences of one prompt in one plan, the second behind blocks that the first one writes.
#[test]
fn a_step_reads_what_it_writes_itself() {
    let library = library(PLAIN);
    let checkpoint = Checkpoint::open(&folder("qwen2_gqa2_hd128").unwrap()).unwrap();
    let checkpoint = Arc::new(checkpoint);
    for prefill in [PrefillKernel::Mma, PrefillKernel::Wgmma] {
        let emulator = Emulator::load(&library, Schedule::InTurn).expect("it loads");
        let device = Cuda::new(emulator, CudaConfig { prefill, ..checks::BF16 });
        let mut group = Group::load(&checkpoint, OPTIONS, vec![device], models::staged).unwrap();
        let prompt: Vec<u32> = (0..40).map(|at| (at * 31 + 7) % 300).collect();
        let whole = Driven::new(1, &prompt, GREEDY, vec![0, 1, 2]);
        // Behind 32 shared tokens: a chunk of several, and one token as in a decode.
        let behind = |id: u64, len: usize| {
            let mut sequence = Driven::new(id, &prompt[..len], GREEDY, vec![0, 1, id as u32 + 8]);
            sequence.computed = 32;
            sequence
        };
        let mut run = |sequences: Vec<Driven>| -> Vec<Vec<u32>> {
            let chunks = sequences.into_iter().map(|mut s| s.chunk(256, Want::Logits));
            let output = group.step(chunks.collect()).unwrap();
            let rows = output.logits.into_iter().map(|(_, rows)| rows);
            rows.map(|rows| rows.into_iter().map(f32::to_bits).collect()).collect()
        };
        let at_once = run(vec![behind(2, 33), whole, behind(3, 40)]);
        let (one, several) = (run(vec![behind(4, 33)]), run(vec![behind(5, 40)]));
        assert_eq!((&at_once[0], &at_once[2]), (&one[0], &several[0]), "{prefill:?}");
        let rows = at_once[1].len() / 40 * 8;
        assert_eq!(at_once[1][4 * rows..], several[0], "{prefill:?}");
    }
}
