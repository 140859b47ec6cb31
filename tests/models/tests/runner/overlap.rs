//! Real models under the scheduler: two plans in flight answer as one does, and a prompt that comes
//! often at once is computed once, with the bits that each would have computed for itself.

use crate::common::{exact, fast, load, open};
use engine::{
    Request, Scheduler, SchedulerConfig,
    plan::{SamplingParams, StepOutput, TokenLogprob, Tokens},
};
use kernels::{Backend, plain::Plain};
use models::{GREEDY, Group, OPTIONS};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

/// Tokens of each answer that does not stop before.
const ANSWER: usize = 48;

const BOUNDS: SchedulerConfig = SchedulerConfig {
    blocks: OPTIONS.blocks as u32,
    step_tokens_max: OPTIONS.step_tokens_max,
    step_target: None,
    sequences_max: 8,
    waiting_max: 32,
    context_max: OPTIONS.context_max,
    prefix_reuse_max: None,
};

/// What came of some requests.
struct Answered {
    /// Scores and tokens of each.
    tokens: BTreeMap<u64, Vec<TokenLogprob>>,
    prefix_hit_tokens: u64,
    preemptions: u64,
    /// Tokens that were planned before they were known.
    unknown: usize,
}

/// Runs `requests` with `depth` plans in flight.
fn run<B: Backend>(
    group: &mut Group<B>,
    bounds: &SchedulerConfig,
    depth: usize,
    requests: &[Request],
) -> Answered {
    let mut scheduler = Scheduler::new(bounds.clone());
    for request in requests {
        scheduler.submit(request.clone()).unwrap();
    }
    let (mut tokens, mut unknown) = (BTreeMap::<u64, Vec<TokenLogprob>>::new(), 0);
    let mut flights: VecDeque<StepOutput> = VecDeque::new();
    loop {
        while flights.len() < depth
            && let Some(plan) = scheduler.schedule()
        {
            let chunks = plan.chunks.iter();
            unknown += chunks.filter(|chunk| chunk.tokens == Tokens::LastSampled).count();
            flights.push_back(group.run(plan).unwrap());
        }
        let Some(output) = flights.pop_front() else { break };
        for update in scheduler.commit(output).unwrap() {
            let of = tokens.entry(update.sequence).or_default();
            of.extend(update.scores.into_iter().chain(update.tokens));
        }
    }
    assert!(scheduler.is_idle());
    let stats = scheduler.stats();
    assert_eq!(stats.blocks_free, stats.blocks_total);
    let (prefix_hit_tokens, preemptions) = (stats.prefix_hit_tokens, stats.preemptions);
    Answered { tokens, prefix_hit_tokens, preemptions, unknown }
}

fn request(number: u32, prompt: u32, max_tokens: usize) -> Request {
    Request {
        prompt: (0..prompt).map(|at| (at * 31 + prompt * 17 + 7) % 300).collect(),
        generated: Vec::new(),
        params: SamplingParams {
            temperature: 0.9,
            repetition_penalty: 1.1,
            seed: u64::from(number),
            logprobs: Some(3),
            ..GREEDY
        },
        max_tokens,
        stop_ids: (0..6).map(|stop| stop * 50 + number).collect(),
        score_prompt: number % 5 == 4,
    }
}

fn check_depths<B: Backend>(name: &str, device: fn() -> B) {
    let checkpoint = Arc::new(open(name));
    let requests: Vec<Request> =
        (0..12).map(|number| request(number, 5 + 9 * (number / 2), ANSWER)).collect();
    let (mut preemptions, mut stopped) = (0, 0);
    for (blocks, step_tokens_max) in [(64, 256), (7, 24), (12, 7)] {
        let bounds = SchedulerConfig { blocks, step_tokens_max, ..BOUNDS };
        let [one, two] = [1, 2].map(|depth| {
            let mut group = load(&checkpoint, 1, OPTIONS, device);
            run(&mut group, &bounds, depth, &requests)
        });
        assert_eq!(one.tokens.len(), 12);
        assert_eq!(one.tokens, two.tokens, "{name}: {blocks} blocks");
        assert!(one.unknown == 0 && two.unknown > 100, "{} and {}", one.unknown, two.unknown);
        preemptions += two.preemptions;
        stopped += two.tokens.values().filter(|tokens| tokens.len() < ANSWER).count();
    }
    assert!(preemptions > 0 && stopped > 3, "{preemptions} preempted, {stopped} stopped");
}

#[test]
fn two_plans_in_flight_answer_with_the_bits_of_one() {
    check_depths("qwen2_gqa2_hd128", || Plain);
    check_depths("qwen3_gqa4_hd128_tied", exact);
    check_depths("llama_smollm2", fast);
}

/// `n` choices of one prompt in one plan: all but the first read blocks that the same plan writes.
fn check_choices<B: Backend>(name: &str, world_size: usize, device: fn() -> B) {
    let checkpoint = Arc::new(open(name));
    let choices: Vec<Request> = (0..4).map(|seed| request(seed, 70, 12)).collect();
    // The last two prompts are twice as long and begin as the others.
    let mut longer = choices[2..].to_vec();
    longer.iter_mut().for_each(|longer| longer.prompt.extend(0..70));
    let requests = [choices, longer].concat();
    let mut group = load(&checkpoint, world_size, OPTIONS, device);
    let together = run(&mut group, &BOUNDS, 1, &requests);
    assert_eq!(together.prefix_hit_tokens, 3 * 64 + 64 + 128, "{name}");
    for (number, request) in requests.iter().enumerate() {
        let mut group = load(&checkpoint, world_size, OPTIONS, device);
        let alone = run(&mut group, &BOUNDS, 1, std::slice::from_ref(request));
        assert_eq!(alone.tokens[&0], together.tokens[&(number as u64)], "{name}: {number}");
    }
}

#[test]
fn choices_of_one_prompt_share_what_their_own_plan_computes() {
    check_choices("qwen2_gqa2_hd128", 1, || Plain);
    check_choices("qwen2_swa_on", 1, exact);
    check_choices("llama_smollm2", 1, fast);
    check_choices("qwen2_gqa4_tied_sharded", 2, fast);
}
