//! Decode steps that are captured and run again: the same bits, few launches, one copy.

use collective::Collective;
use cuda::{Cuda, CudaConfig};
use emulate::{Counts, Emulator, PLAIN, Schedule, library};
use engine::{
    Request, Scheduler, SchedulerConfig,
    plan::{PLANS_IN_FLIGHT_MAX, SamplingParams, StepOutput, StepPlan, TokenLogprob, Tokens, Want},
};
use model::Checkpoint;
use models::{Driven, Group, Link, OPTIONS, folder, peer_memory, staged};
use std::{collections::VecDeque, sync::Arc};

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

/// Some requests through a scheduler with up to `depth` plans in flight: what each was answered,
/// how many tokens were planned unknown, and how often a plan was launched behind another.
fn scheduled(ranks: usize, depth: usize, blocks: u32) -> (Vec<Vec<TokenLogprob>>, usize, usize) {
    let (devices, _) = devices(ranks, true);
    let options = model::RunnerOptions { sequences_max: 4, ..OPTIONS };
    // With heads for each.
    let name = if ranks < 3 { "qwen2_gqa2_hd128" } else { "qwen3_gqa4_hd128_tied" };
    let mut group = Group::load(&checkpoint(name), options, devices, peer_memory).unwrap();
    let mut scheduler = Scheduler::new(SchedulerConfig {
        blocks,
        step_tokens_max: 40,
        step_target: None,
        sequences_max: 4,
        waiting_max: 16,
        context_max: 240,
        prefix_reuse_max: None,
    });
    // As many as many ranks have time for.
    let (requests, max_tokens) = if ranks < 3 { (8u32, 40) } else { (6, 16) };
    for number in 0..requests {
        let params = SamplingParams {
            temperature: 0.8,
            // Steps of these wait for the one before: what they choose hangs on it.
            repetition_penalty: if number == 2 { 1.2 } else { 1.0 },
            seed: u64::from(number),
            logprobs: Some(2),
            ..SamplingParams::GREEDY
        };
        let prompt = 33 + 9 * number.saturating_sub(3);
        let request = Request {
            prompt: (0..prompt).map(|at| (at * 31 + prompt) % 300).collect(),
            generated: Vec::new(),
            params,
            max_tokens,
            stop_ids: vec![7 * number],
            score_prompt: number == 5,
        };
        scheduler.submit(request).unwrap();
    }
    let (mut answers, mut unknown, mut behind) = (vec![Vec::new(); requests as usize], 0, 0);
    let (mut launched, mut ready) = (VecDeque::<StepPlan>::new(), VecDeque::new());
    loop {
        while launched.len() + ready.len() < depth.min(PLANS_IN_FLIGHT_MAX)
            && let Some(plan) = scheduler.schedule()
        {
            unknown += plan.chunks.iter().filter(|c| c.tokens == Tokens::LastSampled).count();
            if group.leader.in_flight() > 0 && !group.leader.follows(&plan) {
                ready.push_back(group.leader.finish().unwrap());
                launched.pop_front();
            }
            behind += group.leader.in_flight();
            group.launch(&plan).unwrap();
            launched.push_back(plan);
        }
        let output = match ready.pop_front() {
            Some(output) => output,
            None if launched.pop_front().is_some() => group.leader.finish().unwrap(),
            None => break,
        };
        for update in scheduler.commit(output).unwrap() {
            let of: &mut Vec<TokenLogprob> = &mut answers[update.sequence as usize];
            of.extend(update.scores.into_iter().chain(update.tokens));
        }
    }
    assert!(scheduler.is_idle());
    let preemptions = scheduler.stats().preemptions;
    assert_eq!(preemptions > 0, blocks < 12, "{ranks} ranks, {blocks} blocks, {preemptions}");
    (answers, unknown, behind)
}

/// Requests on `ranks` ranks with so many blocks, one plan after another and two in flight.
fn a_step_behind_another_has_the_bits_of_one_alone(ranks: usize, blocks: u32) {
    let (alone, none, never) = scheduled(ranks, 1, blocks);
    let (behind, some, often) = scheduled(ranks, 2, blocks);
    assert_eq!(alone, behind, "{ranks} ranks, {blocks} blocks");
    assert_eq!((none, never), (0, 0));
    assert!(some > 20 && often > 10, "{some} unknown tokens, {often} plans behind others");
}

#[test]
fn a_step_behind_another_has_its_own_bits() {
    a_step_behind_another_has_the_bits_of_one_alone(1, 40);
}

#[test]
fn a_step_behind_another_has_its_own_bits_where_sequences_are_preempted() {
    a_step_behind_another_has_the_bits_of_one_alone(1, 6);
}

#[test]
fn a_step_behind_another_has_its_own_bits_on_two_ranks() {
    a_step_behind_another_has_the_bits_of_one_alone(2, 40);
}

#[test]
fn a_step_behind_another_has_its_own_bits_on_three_ranks() {
    a_step_behind_another_has_the_bits_of_one_alone(3, 40);
}

/// What goes to the device and comes from it in a captured step.
#[test]
fn a_step_is_one_copy_two_small_kernels_and_one_graph() {
    let (devices, counts) = devices(1, true);
    let mut group = Group::load(&checkpoint("qwen2_gqa2_hd128"), OPTIONS, devices, staged).unwrap();
    let sequence = |id: u64| {
        let blocks = (0..4).map(|block| id as u32 * 4 + block).collect();
        Driven::new(id, &[1, 2, 3 + id as u32], SamplingParams::GREEDY, blocks)
    };
    let mut sequences: Vec<Driven> = (0..3).map(sequence).collect();
    let mut step = |count: usize| {
        let (writes, bytes) = (counts.writes(), counts.written_bytes());
        let (launches, replays) = (counts.launches(), counts.replays());
        let chunks = sequences.iter_mut().take(count).map(|s| s.chunk(8, Want::Sample));
        for (id, sampled) in group.step(chunks.collect()).unwrap().sampled {
            sequences[id as usize].tokens.push(sampled.token);
        }
        let (launches, replays) = (counts.launches() - launches, counts.replays() - replays);
        (counts.writes() - writes, counts.written_bytes() - bytes, launches, replays)
    };
    let prefill = step(3);
    assert_eq!((prefill.0, prefill.3), (1, 0), "one copy, and no graph of a prompt");
    step(3);
    let (copies, bytes, launches, replays) = step(3);
    // Where rows and sequences are, and two kernels that choose greedily.
    assert_eq!((copies, launches, replays), (1, 1 + 2, 1));
    // 72 bytes ask for a token; 16 are a sequence, 4 an id and a row, 8 the work.
    assert!(bytes <= 3 * (72 + 16 + 4 + 4 + 8) + 5 * 16, "{bytes} bytes");
    // Of 64 tokens, one in 16 begins a block.
    let blocks = (0..20).map(|_| step(3)).filter(|(_, _, launches, _)| *launches == 2 + 2).count();
    assert_eq!(blocks, 1);
}

/// What a layer launches in a captured decode step: rotation, store and attention are one kernel,
/// and so are gate, up and silu.
#[test]
fn a_layer_of_a_captured_step_is_seven_kernels() {
    const LAYER: [&str; 7] = [
        "skinny_linear_bf16_t8",
        // Without "rope_d128" before it.
        "attention_decode_d128_bf16",
        "skinny_linear_bf16_t8",
        "add_rms_norm_1024",
        // silu(gate) · up, without "silu_mul_bf16" behind it.
        "skinny_linear_bf16_t8",
        "skinny_linear_bf16_t8",
        // The next layer's norm, where there is one.
        "add_rms_norm_1024",
    ];
    let (_, counts) = answers("qwen2_gqa2_hd128", 1, true, staged);
    let captured = counts.captured();
    assert!(!captured.is_empty());
    for graph in captured {
        let (first, rest) = graph.split_at(2);
        assert_eq!(first, ["gather_bf16", "rms_norm_1024"]);
        let (layers, end) = rest.split_at(2 * LAYER.len() - 1);
        assert_eq!(layers, &[LAYER, LAYER].concat()[..2 * LAYER.len() - 1]);
        assert_eq!(end, ["add_bf16", "gather_bf16", "rms_norm_1024", "a product"]);
    }
}
