//! A sequence's numbers are its own: bit for bit the same whatever runs beside it, however its
//! prompt is cut, whether it was computed twice, and on any number of ranks.

use crate::common::{exact, fast, fast_avx2, fast_portable, load, open};
use engine::plan::{BLOCK_TOKENS, Chunk, SamplingParams, TokenLogprob, Want};
use kernels::{Backend, plain::Plain};
use model::Checkpoint;
use models::{Driven, GREEDY, Group, NAMES, OPTIONS};
use std::sync::Arc;

const ANSWER: usize = 12;

fn params(seed: u64) -> SamplingParams {
    SamplingParams {
        temperature: 0.8,
        top_p: 0.95,
        top_k: 50,
        repetition_penalty: 1.1,
        presence_penalty: 0.2,
        seed,
        logprobs: Some(5),
        ..GREEDY
    }
}

/// A prompt of `len` tokens that depends on `seed`.
fn prompt(len: usize, seed: usize) -> Vec<u32> {
    (0..len).map(|i| ((i * i * 31 + i * 7 + seed * 131 + 5) % 300) as u32).collect()
}

/// `count` blocks from `first` on, in falling order.
fn blocks(first: u32, count: u32) -> Vec<u32> {
    (first..first + count).rev().collect()
}

/// Runs `sequences` side by side until each has its answer; what was sampled for the first.
fn generate<B: Backend>(
    group: &mut Group<B>,
    sequences: &mut [Driven],
    chunk: usize,
) -> Vec<TokenLogprob> {
    let first = sequences[0].id;
    let mut answer = Vec::new();
    while sequences.iter().any(|s| s.tokens.len() - s.prompt_len < ANSWER) {
        let unfinished = sequences.iter_mut().filter(|s| s.tokens.len() - s.prompt_len < ANSWER);
        let chunks: Vec<Chunk> = unfinished.map(|s| s.chunk(chunk, Want::Sample)).collect();
        let output = group.step(chunks).unwrap();
        assert_eq!(output.failed, []);
        for (id, sampled) in output.sampled {
            let sequence = sequences.iter_mut().find(|s| s.id == id).unwrap();
            sequence.tokens.push(sampled.token);
            if id == first {
                answer.push(sampled);
            }
        }
    }
    answer
}

/// The same request alone, in chunks, among 15 others, behind a cached prefix and preempted.
fn check_invariance<B: Backend>(name: &str, world_size: usize, device: fn() -> B) {
    let checkpoint = Arc::new(open(name));
    let mut group = load(&checkpoint, world_size, OPTIONS, device);
    let prompt_ids = prompt(45, 1);
    let driven = |id| Driven::new(id, &prompt_ids, params(7), blocks(0, 4));

    let alone = generate(&mut group, &mut [driven(1)], 256);
    assert_eq!(alone.len(), ANSWER);
    for (id, chunk) in [(2, 1), (3, 7), (4, 16), (5, 33)] {
        let chunked = generate(&mut group, &mut [driven(id)], chunk);
        assert_eq!(alone, chunked, "{name}: in chunks of {chunk}");
    }

    let mut many = vec![driven(10)];
    many.extend((1..16).map(|other| {
        let id = 10 + other as u64;
        let prompt = prompt(1 + other * 2, other);
        Driven::new(id, &prompt, params(id), blocks(1 + 3 * other as u32, 3))
    }));
    let among = generate(&mut group, &mut many, 12);
    assert_eq!(alone, among, "{name}: among 15 others");

    // The first two blocks are those of sequence 1's prompt, computed by the last `driven`.
    let mut cached = driven(40);
    cached.computed = 2 * BLOCK_TOKENS;
    assert_eq!(alone, generate(&mut group, &mut [cached], 256), "{name}: behind a cached prefix");

    let mut preempted = driven(50);
    let mut answer = Vec::new();
    while answer.len() < 5 {
        let output = group.step(vec![preempted.chunk(20, Want::Sample)]).unwrap();
        for (_, sampled) in output.sampled {
            preempted.tokens.push(sampled.token);
            answer.push(sampled);
        }
    }
    preempted.preempt(blocks(30, 4));
    answer.extend(generate(&mut group, &mut [preempted], 9));
    assert_eq!(alone, answer, "{name}: preempted and computed again");
}

/// Scores of a whole prompt at once, in chunks, and beside another.
fn check_scores<B: Backend>(name: &str, device: fn() -> B) {
    let checkpoint = Arc::new(open(name));
    let mut group = load(&checkpoint, 1, OPTIONS, device);
    let ids = prompt(150, 3);
    let mut scores = |id: u64, chunk: usize, beside: bool| {
        let mut sequence = Driven::new(id, &ids, params(1), blocks(0, 10));
        let mut other = Driven::new(id + 100, &ids[1..], params(2), blocks(20, 10));
        let mut scored = Vec::new();
        while sequence.remaining() > 0 {
            let mut chunks = vec![sequence.chunk(chunk, Want::Score { sample: true })];
            if beside {
                chunks.insert(0, other.chunk(chunk, Want::Score { sample: true }));
            }
            let output = group.step(chunks).unwrap();
            scored.extend(output.scored.into_iter().filter(|s| s.0 == id).flat_map(|s| s.1));
            scored.extend(output.sampled.into_iter().filter(|s| s.0 == id).map(|s| s.1));
        }
        scored
    };
    let whole = scores(1, 256, false);
    assert_eq!(whole.len(), 150);
    let following: Vec<u32> = whole[..149].iter().map(|scored| scored.token).collect();
    assert_eq!(following, ids[1..]);
    assert_eq!(whole, scores(2, 13, false), "{name}: scores in chunks");
    assert_eq!(whole, scores(3, 100, true), "{name}: scores beside others");
}

/// Logits of a prompt, then tokens and logprobs of an answer, on each number of ranks.
fn check_sharding<B: Backend>(name: &str, device: fn() -> B) {
    let checkpoint = Arc::new(open(name));
    let ids = prompt(60, 5);
    let answers = |world_size: usize| {
        let mut group = load(&checkpoint, world_size, OPTIONS, device);
        let mut sequence = Driven::new(1, &ids, params(1), blocks(0, 4));
        let mut output = group.step(vec![sequence.chunk(256, Want::Logits)]).unwrap();
        let logits = output.logits.swap_remove(0).1;
        let bits: Vec<u32> = logits.into_iter().map(f32::to_bits).collect();
        let answering = Driven::new(2, &ids, params(7), blocks(10, 5));
        (bits, generate(&mut group, &mut [answering], 25))
    };
    let one = answers(1);
    for world_size in (2..=4).filter(|&n| checkpoint.shard(0, n).is_ok()) {
        let (logits, answer) = answers(world_size);
        let off = one.0.iter().zip(&logits).filter(|(a, b)| a != b).count();
        assert_eq!(off, 0, "{name} on {world_size} ranks: logits differ");
        assert_eq!(one.1, answer, "{name} on {world_size} ranks");
    }
}

const FAMILIES: [&str; 10] = [
    "qwen1_ntk_logn",
    "qwen2_gqa4_tied_sharded",
    "qwen2_swa_on",
    "qwen3_gqa4_hd128_tied",
    "llama_smollm2",
    "qwen2_moe",
    "qwen3_moe",
    "qwen2_gptq_int4",
    "qwen2_awq_int4",
    "qwen3_fp8_block128",
];

#[test]
fn a_sequence_is_the_same_alone_and_in_company() {
    for name in FAMILIES {
        check_invariance(name, 1, || Plain);
        check_invariance(name, 1, exact);
        check_invariance(name, 1, fast);
    }
}

#[test]
fn a_sequence_is_the_same_whatever_the_instructions_and_ranks() {
    for name in ["llama_smollm2", "qwen2_gptq_int4", "qwen3_moe"] {
        check_invariance(name, 2, || Plain);
        check_invariance(name, 3, exact);
        check_invariance(name, 2, fast);
        check_invariance(name, 1, fast_avx2);
        check_invariance(name, 1, fast_portable);
    }
}

#[test]
fn scores_are_the_same_however_a_prompt_is_cut() {
    check_scores("qwen2_yarn4", || Plain);
    check_scores("qwen2_yarn4", exact);
    check_scores("qwen2_yarn4", fast);
}

#[test]
fn sharded_equals_unsharded_bit_for_bit() {
    for name in NAMES {
        check_sharding(name, || Plain);
        check_sharding(name, exact);
        check_sharding(name, fast);
    }
}

#[test]
fn every_vocabulary_holds_the_prompts() {
    let vocab = |name: &&str| Checkpoint::config(&open(name)).vocab;
    assert!(NAMES.iter().map(vocab).all(|vocab| vocab > 300));
}
