//! Plans that cannot be right are refused before anything runs, with what is wrong.

use crate::common::{load, open};
use engine::plan::{Chunk, SamplingParams, StepPlan, Tokens, Want};
use kernels::plain::Plain;
use model::{ModelError, RunnerOptions};
use models::{Driven, GREEDY, Group, OPTIONS};
use std::sync::Arc;

fn group(name: &str, options: RunnerOptions) -> Group<Plain> {
    load(&Arc::new(open(name)), 1, options, || Plain)
}

fn chunk(id: u64, len: usize) -> Chunk {
    let prompt: Vec<u32> = (0..len as u32).collect();
    Driven::new(id, &prompt, GREEDY, (0..16).collect()).chunk(len, Want::Sample)
}

/// The tokens that a chunk names, to be changed.
fn named(chunk: &mut Chunk) -> &mut Vec<u32> {
    match &mut chunk.tokens {
        Tokens::Known(tokens) => tokens,
        Tokens::LastSampled => panic!("it names none"),
    }
}

#[track_caller]
fn refused(group: &mut Group<Plain>, chunks: Vec<Chunk>, because: &str) {
    match group.step(chunks) {
        Err(ModelError::Plan { reason, .. }) if reason.contains(because) => {}
        other => panic!("expected a refusal because {because:?}, not {other:?}"),
    }
}

#[test]
fn refusals_say_what_is_wrong() {
    let options = RunnerOptions { step_tokens_max: 40, sequences_max: 2, ..OPTIONS };
    let mut group = group("qwen2_mha_hd64", options);
    let mut one = |because: &str, change: &dyn Fn(&mut Chunk)| {
        let mut chunk = chunk(1, 20);
        change(&mut chunk);
        refused(&mut group, vec![chunk], because);
    };
    one("without tokens", &|c| named(c).clear());
    one("the vocabulary ends at 384", &|c| named(c)[3] = 384);
    one("the vocabulary ends at 384", &|c| c.next = Some(u32::MAX));
    one("the vocabulary ends at 384", &|c| c.admission.as_mut().unwrap().tokens[0] = 400);
    one("the context is 240", &|c| c.start = 230);
    one("the context is 240", &|c| c.start = usize::MAX);
    one("1 blocks for 20 tokens", &|c| c.blocks.truncate(1));
    one("the pool has 64", &|c| c.blocks[1] = 64);
    one("block 1 twice", &|c| c.blocks[0] = 1);
    one("16 blocks, the context fills 15", &|c| c.blocks = (0..16).collect());
    one("did not sample", &|c| (c.start, c.tokens) = (19, Tokens::LastSampled));
    one("never admitted", &|c| c.admission = None);
    one("30 of them the prompt", &|c| c.admission.as_mut().unwrap().prompt_len = 30);
    one("41 tokens, at most 40", &|c| *named(c) = vec![1; 41]);
    refused(&mut group, vec![chunk(1, 5), chunk(1, 5)], "two chunks");
    refused(&mut group, vec![chunk(1, 1), chunk(2, 1), chunk(3, 1)], "3 sequences, at most 2");
    refused(&mut group, vec![chunk(1, 5), chunk(2, 5)], "sequence 2 writes to block 0");

    let lost = StepPlan { number: 5, ..StepPlan::default() };
    assert!(matches!(group.run(lost), Err(ModelError::Plan { number: 5, .. })));
    // Nothing was run and nothing is lost: the plan that comes next is welcome.
    assert_eq!(group.step(vec![chunk(1, 20)]).unwrap().sampled.len(), 1);
    let mut gap = chunk(1, 22);
    (gap.start, gap.admission) = (21, None);
    named(&mut gap).truncate(1);
    refused(&mut group, vec![gap.clone()], "block 0 twice");
    gap.blocks.clear();
    refused(&mut group, vec![gap.clone()], "continues at 21 with 20 tokens cached");
    gap.start = 20;
    let released = StepPlan { number: 1, chunks: vec![gap.clone()], released: vec![1] };
    assert!(matches!(group.run(released), Err(ModelError::Plan { number: 1, .. })));
    assert_eq!(group.step(vec![gap]).unwrap().sampled.len(), 1);
}

#[test]
fn a_plan_of_releases_only_runs() {
    let mut group = group("qwen2_mha_hd64", OPTIONS);
    group.step(vec![chunk(1, 20)]).unwrap();
    let plan = StepPlan { number: 1, released: vec![1], ..StepPlan::default() };
    assert_eq!(group.run(plan).unwrap().sampled, []);
    let mut next = chunk(1, 21);
    (next.start, next.admission) = (20, None);
    named(&mut next).truncate(1);
    refused(&mut group, vec![next], "never admitted");
}

#[test]
fn prefixes_are_not_reused_where_the_rotation_depends_on_the_prompt() {
    let mut group = group("qwen1_ntk_logn", OPTIONS);
    assert_eq!(group.leader.prefix_reuse_max(), Some(48));
    let behind_prefix = |len: usize| {
        let mut chunk = chunk(1, len);
        chunk.start = 16;
        named(&mut chunk).drain(..16);
        chunk
    };
    refused(&mut group, vec![behind_prefix(49)], "cached prefix");
    group.step(vec![behind_prefix(48)]).unwrap();
    assert_eq!(self::group("qwen2_mha_hd64", OPTIONS).leader.prefix_reuse_max(), None);
}

#[test]
fn a_request_that_cannot_be_sampled_fails_alone() {
    let mut group = group("qwen2_mha_hd64", OPTIONS);
    let mut bad = chunk(1, 20);
    let params = SamplingParams { logit_bias: vec![(384, 1.0)], ..GREEDY };
    bad.admission.as_mut().unwrap().params = params;
    let mut good = chunk(2, 9);
    good.blocks = vec![20];
    let mut score = bad.clone();
    (score.sequence, score.want) = (3, Want::Score { sample: true });
    score.blocks = vec![30, 31];
    let output = group.step(vec![bad, good, score]).unwrap();
    let failed: Vec<u64> = output.failed.iter().map(|failed| failed.0).collect();
    assert_eq!(failed, [1, 3]);
    assert!(output.failed[0].1.contains("384"), "{:?}", output.failed);
    assert_eq!(output.sampled.iter().map(|sampled| sampled.0).collect::<Vec<_>>(), [2]);
    assert_eq!(output.scored, []);
}

/// One more token of sequence 1, whichever was sampled last.
fn following(start: usize) -> Chunk {
    let mut chunk = chunk(1, start);
    chunk.blocks.drain(..start.div_ceil(16));
    (chunk.start, chunk.admission, chunk.tokens) = (start, None, Tokens::LastSampled);
    chunk
}

#[test]
fn a_token_that_was_sampled_last_need_not_be_named() {
    let answer = |named: bool| {
        let mut group = group("qwen2_mha_hd64", OPTIONS);
        let mut tokens = Vec::new();
        let mut next = chunk(1, 16);
        for start in 16..22 {
            tokens.push(group.step(vec![next]).unwrap().sampled.remove(0).1.token);
            next = following(start);
            if start % 16 == 0 {
                next.blocks.push(9);
            }
            if named {
                next.tokens = Tokens::Known(tokens[tokens.len() - 1..].to_vec());
            }
        }
        tokens
    };
    assert_eq!(answer(false), answer(true));
}

#[test]
fn a_token_that_was_not_sampled_is_refused_where_a_plan_goes_on_with_it() {
    let mut group = group("qwen2_mha_hd64", OPTIONS);
    let mut only_cached = chunk(1, 20);
    only_cached.want = Want::Nothing;
    group.step(vec![only_cached]).unwrap();
    refused(&mut group, vec![following(20)], "did not sample");
    group.step(vec![chunk(1, 20)]).unwrap();
    let mut scored = following(20);
    scored.want = Want::Logits;
    refused(&mut group, vec![scored], "for something else than a sample");
    group.step(vec![following(20)]).unwrap();

    // Ranks that do not sample do not have it: none of the group runs such a plan.
    let checkpoint = Arc::new(open("qwen2_mha_hd64"));
    let mut two = load(&checkpoint, 2, OPTIONS, || Plain);
    two.step(vec![chunk(1, 20)]).unwrap();
    refused(&mut two, vec![following(20)], "a group of 2 ranks needs it");
    two.step(vec![chunk(1, 20)]).unwrap();
}

#[test]
fn a_sequence_that_was_not_sampled_fails_with_what_was_planned_behind_it() {
    let mut group = group("qwen2_mha_hd64", OPTIONS);
    let mut bad = chunk(1, 20);
    bad.admission.as_mut().unwrap().params.logit_bias = vec![(384, 1.0)];
    let mut good = chunk(2, 9);
    good.blocks = vec![20];
    assert_eq!(group.step(vec![bad, good]).unwrap().failed.len(), 1);
    let mut goes_on = following(9);
    goes_on.sequence = 2;
    let output = group.step(vec![following(20), goes_on]).unwrap();
    assert_eq!(output.failed, [(1, "no token was sampled at position 20".to_owned())]);
    assert_eq!(output.sampled.iter().map(|sampled| sampled.0).collect::<Vec<_>>(), [2]);
}

#[test]
fn sizes_that_cannot_be_indexed_are_refused() {
    use collective::{Staged, Threads};
    let checkpoint = open("qwen2_mha_hd64");
    for options in [
        RunnerOptions { blocks: 0, ..OPTIONS },
        RunnerOptions { blocks: 1 << 28, ..OPTIONS },
        RunnerOptions { step_tokens_max: 0, ..OPTIONS },
        RunnerOptions { sequences_max: 0, ..OPTIONS },
        RunnerOptions { context_max: 1 << 31, ..OPTIONS },
        RunnerOptions { context_max: usize::MAX, ..OPTIONS },
    ] {
        let rank = Staged::new(Threads::group(1).remove(0));
        let loaded = model::Runner::load(Plain, rank, &checkpoint, options, &mut |_| {});
        assert!(matches!(loaded, Err(ModelError::Options(_))), "{options:?}");
    }
}

#[test]
fn activation_memory_is_told_before_it_is_taken() {
    let checkpoint = open("qwen2_mha_hd64");
    let elements = |options: &RunnerOptions| {
        model::elements(checkpoint.config(), &checkpoint.shard(0, 1).unwrap(), options, 64)
    };
    // A token: 3 H, 3 · 2 · 64 of QKV, 2 · 64 of attention, 3 I. A row of logits: 2 H, and V exact.
    let token = 3 * 128 + 384 + 128 + 3 * 320;
    let rope = 240 * 64;
    // Norms and biases of two layers, and the last norm.
    let vectors = |bias: usize| 2 * (2 * 128 + bias) + 128;
    // Five a token; of each sequence its first row, its length, its table and 15 blocks; the end.
    let ints = 5 * 256 + OPTIONS.sequences_max * (3 + 15) + 1;
    let wanted = model::Elements {
        floats: 256 * token + 64 * 2 * 128 + vectors(384),
        exact: 64 * 384 + rope + OPTIONS.sequences_max,
        ints,
    };
    assert_eq!(elements(&OPTIONS), wanted);
    assert_eq!(wanted.bytes(2), 2 * wanted.floats as u64 + 4 * (wanted.exact + ints) as u64);
    // Half of the heads, H, I and V on one of two ranks, and the four exchanged matrices whole.
    let shard = checkpoint.shard(0, 2).unwrap();
    let token = 2 * 128 + 192 + (64 + 128) + (64 + 128) + 2 * 160 + (160 + 320);
    let wanted = model::Elements {
        floats: 256 * token + 64 * 2 * 128 + vectors(192),
        exact: 64 * (192 + 384) + rope + OPTIONS.sequences_max,
        ints,
    };
    assert_eq!(model::elements(checkpoint.config(), &shard, &OPTIONS, 64), wanted);
    let endless = elements(&RunnerOptions { step_tokens_max: usize::MAX, ..OPTIONS });
    assert_eq!(endless.bytes(4), u64::MAX);
}
