//! The forward pass against the reference implementations, on every family and every rank count.

use crate::{
    cases::{Continuation, NAMES, continuations, prompts},
    common::{Driven, GREEDY, Group, OPTIONS, exact, open},
};
use emulate::{Emulator, Schedule};
use engine::plan::Want;
use kernels::{
    Backend,
    cuda::{Cuda, CudaConfig, KvFormat, PrefillKernel, WeightFormat},
    plain::Plain,
};
use model::Checkpoint;
use std::{path::Path, sync::Arc};

/// How near the reference a backend comes.
#[derive(Clone, Copy)]
struct Closeness {
    /// Of every logit; their standard deviation is about 1.
    logits: f32,
    /// The root of the mean square over a prompt's logits.
    rms: f32,
    /// Below this distance of the two best logits, either may win.
    margin: f64,
}

const F32: Closeness = Closeness { logits: 1e-3, rms: 2e-4, margin: 0.002 };
/// Activations and cache in bf16, rounded to 8 bits at every step of the way. Measured: at most
/// 0.173 off, 0.029 in the root of the mean square; other tokens only at margins up to 0.055.
const BF16: Closeness = Closeness { logits: 0.2, rms: 0.035, margin: 0.06 };
/// Weights, and activations where they meet them, in e4m3: rounded to 4 bits. Measured: 1.65 and
/// 0.318; other tokens up to 0.457. Sixteen times bf16's rounding, and about as much further off.
const FP8_WEIGHTS: Closeness = Closeness { logits: 1.8, rms: 0.35, margin: 0.5 };
/// Keys and values in e4m3. Measured: 0.79 and 0.137; other tokens up to 0.344.
const FP8_CACHE: Closeness = Closeness { logits: 0.9, rms: 0.15, margin: 0.4 };
/// One of each family.
const FAMILIES: [&str; 3] = ["qwen1_plain_hd128", "qwen2_gqa2_hd128", "qwen3_gqa4_hd128_tied"];

/// Every rank count up to 3 that the model can be split over.
fn world_sizes(checkpoint: &Checkpoint) -> Vec<usize> {
    (1..=3).filter(|&world_size| checkpoint.shard(0, world_size).is_ok()).collect()
}

fn check<B: Backend>(names: &[&str], device: fn() -> B, close: Closeness) {
    for name in names {
        let checkpoint = Arc::new(open(name));
        let world_sizes = world_sizes(&checkpoint);
        assert!(world_sizes.contains(&2), "{name} cannot be split");
        for world_size in world_sizes {
            let mut group = Group::load(&checkpoint, world_size, OPTIONS, device);
            let case = format!("{name} on {world_size} ranks");
            check_logits(&mut group, name, (close, &case));
            check_continuations(&mut group, name, (close, &case));
        }
    }
}

/// Logits at every position of every prompt, in one chunk and in several.
fn check_logits<B: Backend>(group: &mut Group<B>, name: &str, (close, case): (Closeness, &str)) {
    let mut id = 0;
    for (chunk, prompt) in
        [256, 7].iter().flat_map(|c| prompts(name).into_iter().map(move |p| (*c, p)))
    {
        id += 1;
        // Blocks in no order, so that nothing depends on one.
        let blocks = (0..16).map(|i| (i * 7 + 3) % 64).collect();
        let mut sequence = Driven::new(id, &prompt.ids, GREEDY, blocks);
        let mut logits = Vec::new();
        while sequence.remaining() > 0 {
            let output = group.step(vec![sequence.chunk(chunk, Want::Logits)]).unwrap();
            logits.extend(output.logits.into_iter().flat_map(|(_, rows)| rows));
        }
        assert_eq!(logits.len(), prompt.logits.len(), "{case}");
        let off = || logits.iter().zip(&prompt.logits).map(|(a, b)| (a - b).abs());
        let worst = off().fold(0.0f32, |worst, off| if off > worst { off } else { worst });
        let rms = (off().map(|off| off * off).sum::<f32>() / logits.len() as f32).sqrt();
        // A NaN is no maximum, but it is in the mean.
        assert!(
            worst <= close.logits && rms <= close.rms,
            "{case}, prompt of {}, chunks of {chunk}: logits are {worst} off, {rms} in the mean",
            prompt.ids.len()
        );
    }
}

/// All greedy continuations side by side: prompts in chunks, then token by token. Where a token
/// differs that may, the reference's goes on.
fn check_continuations<B: Backend>(
    group: &mut Group<B>,
    name: &str,
    (close, case): (Closeness, &str),
) {
    let expected = continuations(name);
    let sequence = |(index, continuation): (usize, &Continuation)| {
        let blocks = (0..12).map(|i| index as u32 + 5 * i).collect();
        Driven::new(1000 + index as u64, &continuation.prompt, GREEDY, blocks)
    };
    let mut sequences: Vec<Driven> = expected.iter().enumerate().map(sequence).collect();
    let answer = |s: &Driven| s.tokens.len() - s.prompt_len;
    while sequences.iter().any(|s| answer(s) < 32) {
        let unfinished = sequences.iter_mut().filter(|s| s.tokens.len() - s.prompt_len < 32);
        let chunks = unfinished.map(|s| s.chunk(16, Want::Sample)).collect();
        for (id, sampled) in group.step(chunks).unwrap().sampled {
            let index = sequences.iter().position(|s| s.id == id).unwrap();
            let (sequence, expected) = (&mut sequences[index], &expected[index]);
            let at = answer(sequence);
            let (wanted, margin) = (expected.tokens[at], expected.margins[at]);
            assert!(
                sampled.token == wanted || margin <= close.margin,
                "{case}, prompt of {}: token {at} is {}, not {wanted}, margin {margin}",
                sequence.prompt_len,
                sampled.token,
            );
            sequence.tokens.push(wanted);
        }
    }
}

#[test]
fn the_plain_backend_agrees_with_the_reference_implementations() {
    check(&NAMES, || Plain, F32);
}

#[test]
fn the_cpu_backend_agrees_with_the_reference_implementations() {
    check(&NAMES, exact, F32);
}

fn emulated(config: CudaConfig) -> Cuda<Emulator> {
    let emulator = Emulator::load(Path::new(emulate::PLAIN), Schedule::InTurn).unwrap();
    Cuda::new(emulator, CudaConfig { prefill: PrefillKernel::Mma, ..config })
}

#[test]
fn the_cuda_kernels_agree_with_the_reference_implementations() {
    check(&NAMES, || emulated(CudaConfig::default()), BF16);
}

#[test]
fn cuda_weights_in_fp8_come_near_the_reference_implementations() {
    let device = || emulated(CudaConfig { weights: WeightFormat::Fp8, ..CudaConfig::default() });
    check(&FAMILIES, device, FP8_WEIGHTS);
}

#[test]
fn cuda_caches_in_fp8_come_near_the_reference_implementations() {
    let device = || emulated(CudaConfig { kv_format: KvFormat::Fp8, ..CudaConfig::default() });
    check(&FAMILIES, device, FP8_CACHE);
}
