//! Schedules as traces: each line is a step, `sequence:start+tokens`.

mod device;
mod overlap;
mod random;
mod timed;

use std::collections::HashMap;

use super::*;
use crate::{
    EngineError,
    plan::{SamplingParams, StepOutput, TokenLogprob, Tokens, Want},
    sequence::{End, Update},
};

const GREEDY: SamplingParams = SamplingParams::GREEDY;
/// The stop id of these tests.
const EOS: u32 = 9;

fn config(blocks: u32, step_tokens_max: usize) -> SchedulerConfig {
    SchedulerConfig {
        blocks,
        step_tokens_max,
        step_target: None,
        sequences_max: 4,
        waiting_max: 8,
        context_max: 1 << 20,
        prefix_reuse_max: None,
    }
}

fn request(prompt: Vec<u32>, max_tokens: usize) -> Request {
    Request {
        prompt,
        generated: Vec::new(),
        params: GREEDY,
        max_tokens,
        stop_ids: vec![EOS],
        score_prompt: false,
    }
}

fn known(token: u32) -> TokenLogprob {
    TokenLogprob { token, logprob: None, top: Vec::new() }
}

/// What the fake model samples after `position` tokens: never EOS.
fn token_at(position: usize) -> u32 {
    100 + position as u32
}

/// Runs a plan as a group would, sampling by `sample(sequence, length so far)`.
fn run(plan: &StepPlan, sample: impl Fn(SequenceId, usize) -> u32) -> StepOutput {
    let mut output = StepOutput { number: plan.number, ..StepOutput::default() };
    for chunk in &plan.chunks {
        if let Want::Score { .. } = chunk.want {
            let following = chunk.tokens.known()[1..].iter().copied().chain(chunk.next);
            output.scored.push((chunk.sequence, following.map(known).collect()));
        }
        if matches!(chunk.want, Want::Sample | Want::Score { sample: true }) {
            output.sampled.push((chunk.sequence, known(sample(chunk.sequence, chunk.end()))));
        }
    }
    output
}

/// `+?` is a token that was not known yet.
fn line(plan: &StepPlan) -> String {
    let chunk = |c: &Chunk| match &c.tokens {
        Tokens::Known(tokens) => format!("{}:{}+{}", c.sequence, c.start, tokens.len()),
        Tokens::LastSampled => format!("{}:{}+?", c.sequence, c.start),
    };
    plan.chunks.iter().map(chunk).collect::<Vec<_>>().join(" ")
}

/// Runs until nothing is left. Each line is a step: `sequence:start+tokens`, and ` | ` what ended.
fn trace(s: &mut Scheduler) -> String {
    let mut text = String::new();
    while let Some(plan) = s.schedule() {
        text += &line(&plan);
        for update in s.commit(run(&plan, |_, at| token_at(at))).unwrap() {
            if let Some(end) = update.end {
                text += &format!(" | {} {end:?}", update.sequence);
            }
        }
        text += "\n";
    }
    assert!(s.is_idle());
    text
}

/// Runs until nothing is left; all updates of each sequence merged.
fn finish(s: &mut Scheduler) -> BTreeMap<SequenceId, Update> {
    let mut merged: BTreeMap<SequenceId, Update> = BTreeMap::new();
    while let Some(plan) = s.schedule() {
        for update in s.commit(run(&plan, |_, at| token_at(at))).unwrap() {
            match merged.get_mut(&update.sequence) {
                Some(earlier) => earlier.merge(update),
                None => drop(merged.insert(update.sequence, update)),
            }
        }
    }
    merged
}

fn ids(tokens: &[TokenLogprob]) -> Vec<u32> {
    tokens.iter().map(|token| token.token).collect()
}

#[test]
fn a_long_prompt_is_prefilled_in_chunks_beside_decodes() {
    let mut s = Scheduler::new(config(16, 8));
    s.submit(request(vec![1; 3], 3)).unwrap();
    s.submit(request(vec![2; 14], 2)).unwrap();
    assert_eq!(
        trace(&mut s),
        "0:0+3 1:0+5\n0:3+1 1:5+7\n0:4+1 1:12+2 | 0 Length\n1:14+1 | 1 Length\n"
    );
    assert_eq!(s.stats().blocks_free, 16);
}

#[test]
fn a_short_prompt_shares_the_steps_of_a_long_one() {
    let mut s = Scheduler::new(config(64, 16));
    s.submit(request(vec![1; 100], 1)).unwrap();
    let plan = s.schedule().unwrap();
    s.commit(run(&plan, |_, at| token_at(at))).unwrap();
    // Of equally long ones the first goes first; the shortest of the short ones too.
    s.submit(request(vec![2; 90], 1)).unwrap();
    s.submit(request(vec![3; 20], 1)).unwrap();
    s.submit(request(vec![4; 3], 2)).unwrap();
    let text = trace(&mut s);
    let first: Vec<_> = text.lines().take(4).collect();
    assert_eq!(
        first,
        [
            "3:0+3 2:0+5 0:16+8",
            "3:3+1 2:5+7 0:24+8 | 3 Length",
            "2:12+8 0:32+8 | 2 Length",
            "0:40+16"
        ],
        "{text}"
    );
}

#[test]
fn nobody_is_overtaken_by_one_that_takes_its_blocks() {
    // The first has 7 blocks and may want one more, the second wants 5, the short one 1: that is
    // 14.
    for (blocks, overtakes) in [(15, true), (13, false)] {
        let mut s = Scheduler::new(config(blocks, 16));
        s.submit(request(vec![1; 100], 1)).unwrap();
        let plan = s.schedule().unwrap();
        s.commit(run(&plan, |_, at| token_at(at))).unwrap();
        s.submit(request(vec![2; 80], 1)).unwrap();
        s.submit(request(vec![3; 3], 1)).unwrap();
        let text = trace(&mut s);
        assert_eq!(text.starts_with("2:0+3 0:16+13 | 2 Length"), overtakes, "{blocks}: {text}");
    }
}

#[test]
fn a_full_batch_leaves_the_rest_waiting_in_order() {
    let mut s = Scheduler::new(SchedulerConfig { sequences_max: 2, ..config(16, 8) });
    for token in 1..=3 {
        s.submit(request(vec![token; 2], token as usize)).unwrap();
    }
    assert_eq!(
        trace(&mut s),
        "0:0+2 1:0+2 | 0 Length\n1:2+1 2:0+2 | 1 Length\n2:2+1\n2:3+1 | 2 Length\n"
    );
}

#[test]
fn the_youngest_is_preempted_and_finds_its_full_blocks_again() {
    let mut s = Scheduler::new(config(4, 64));
    s.submit(request(vec![1; 15], 20)).unwrap();
    s.submit(request(vec![2; 30], 10)).unwrap();
    let text = trace(&mut s);
    // The pool is full when sequence 1 needs a third block: it gives way. Sequence 0 then takes the
    // second of its blocks; the first is still in the cache when sequence 1 comes back.
    let preempted = text.lines().filter(|line| line.contains("1:16+") || line.contains("1:0+"));
    assert_eq!(preempted.collect::<Vec<_>>(), ["0:0+15 1:0+30", "1:16+17"], "{text}");
    assert_eq!(s.stats().preemptions, 1);
    assert_eq!(s.stats().blocks_free, 4);
}

#[test]
fn a_preempted_sequence_gives_the_same_tokens() {
    let run_with = |blocks| {
        let mut s = Scheduler::new(config(blocks, 64));
        for token in 1..=4 {
            s.submit(request(vec![token; 20], 40)).unwrap();
        }
        let updates = finish(&mut s);
        (updates, s.stats().preemptions)
    };
    let (roomy, none) = run_with(64);
    let (tight, some) = run_with(6);
    assert_eq!(none, 0);
    assert!(some > 0);
    assert_eq!(roomy, tight);
}

#[test]
fn a_second_equal_prompt_reuses_all_but_its_last_tokens() {
    let mut s = Scheduler::new(config(16, 64));
    s.submit(request((0..40).collect(), 1)).unwrap();
    assert_eq!(trace(&mut s), "0:0+40 | 0 Length\n");
    s.submit(request((0..40).collect(), 1)).unwrap();
    s.submit(request((0..32).collect(), 1)).unwrap();
    assert_eq!(trace(&mut s), "1:32+8 2:16+16 | 1 Length | 2 Length\n");
    assert_eq!(s.stats().prefix_hit_tokens, 32 + 16);
    assert_eq!(s.stats().blocks_free, 16);
}

#[test]
fn an_answer_is_reused_by_the_next_turn() {
    let mut s = Scheduler::new(config(16, 64));
    s.submit(request((0..20).collect(), 13)).unwrap();
    let answer = ids(&finish(&mut s)[&0].tokens);
    let next: Vec<u32> = (0..20).chain(answer).chain([7; 5]).collect();
    s.submit(request(next, 1)).unwrap();
    // 32 of the 33 tokens are computed: the last one sampled never ran.
    assert_eq!(trace(&mut s), "1:32+6 | 1 Length\n");
}

#[test]
fn a_prompt_that_comes_often_at_once_is_computed_once() {
    let mut s = Scheduler::new(config(16, 128));
    for _ in 0..4 {
        s.submit(request((0..40).collect(), 2)).unwrap();
    }
    let plan = s.schedule().unwrap();
    assert_eq!(line(&plan), "0:0+40 1:32+8 2:32+8 3:32+8");
    let tables: Vec<_> = plan.chunks.iter().map(|chunk| &chunk.blocks).collect();
    for (at, table) in tables.iter().enumerate() {
        assert_eq!((table.len(), &table[..2]), (3, &tables[0][..2]));
        assert!(tables[..at].iter().all(|other| other[2] != table[2]), "one each that is written");
    }
    s.commit(run(&plan, |_, at| token_at(at))).unwrap();
    assert_eq!(s.stats().prefix_hit_tokens, 3 * 32);
    trace(&mut s);
    assert_eq!(s.stats().blocks_free, 16);
}

#[test]
fn a_chunk_brings_only_the_blocks_that_are_new() {
    let mut s = Scheduler::new(config(16, 20));
    s.submit(request(vec![1; 30], 20)).unwrap();
    let mut counts = Vec::new();
    while let Some(plan) = s.schedule() {
        counts.push(plan.chunks[0].blocks.len());
        s.commit(run(&plan, |_, at| token_at(at))).unwrap();
    }
    // All known tokens' at admission; then one for position 32 and one for 48.
    assert_eq!(counts.iter().take(5).collect::<Vec<_>>(), [&2, &0, &0, &0, &1]);
    assert_eq!(counts.iter().sum::<usize>(), 4);
    assert_eq!(counts.len(), 2 + 19);
}

#[test]
fn no_prefix_is_shared_beyond_its_limit() {
    let limited = SchedulerConfig { prefix_reuse_max: Some(32), ..config(32, 128) };
    let mut s = Scheduler::new(limited);
    for length in [40, 40, 32, 32, 40] {
        s.submit(request(vec![1; length], 1)).unwrap();
        finish(&mut s);
    }
    assert_eq!(s.stats().prefix_hit_tokens, 16, "only the second prompt of 32 shares");
}

#[test]
fn scores_come_for_every_prompt_token_but_the_first() {
    let mut s = Scheduler::new(config(16, 6));
    let prompt: Vec<u32> = (10..30).collect();
    let scored = Request { score_prompt: true, ..request(prompt.clone(), 2) };
    s.submit(scored.clone()).unwrap();
    s.submit(Request { max_tokens: 0, ..scored.clone() }).unwrap();
    s.submit(Request { generated: vec![40, 41], max_tokens: 3, ..scored }).unwrap();
    let updates = finish(&mut s);
    for (id, tokens) in [(0, vec![120, 121]), (1, vec![]), (2, vec![122])] {
        let update = &updates[&id];
        assert_eq!(ids(&update.scores), prompt[1..], "sequence {id}");
        assert_eq!(ids(&update.tokens), tokens, "sequence {id}");
        assert_eq!(update.cached_tokens, 0, "sequence {id}");
        assert_eq!(update.end, Some(End::Length), "sequence {id}");
    }
}

#[test]
fn a_score_is_told_once_though_the_sequence_was_preempted() {
    let mut s = Scheduler::new(config(4, 8));
    let prompt: Vec<u32> = (10..40).collect();
    s.submit(request(vec![1; 15], 20)).unwrap();
    let scored = Request { score_prompt: true, ..request(prompt.clone(), 4) };
    s.submit(scored).unwrap();
    let updates = finish(&mut s);
    assert!(s.stats().preemptions > 0);
    assert_eq!(ids(&updates[&1].scores), prompt[1..]);
    assert_eq!(ids(&updates[&1].tokens), [130, 131, 132, 133]);
}

#[test]
fn a_resumed_sequence_goes_on_after_what_it_brings() {
    let mut s = Scheduler::new(config(16, 64));
    let resumed = Request { generated: vec![50, 51], ..request(vec![1; 4], 4) };
    s.submit(resumed.clone()).unwrap();
    let plan = s.schedule().unwrap();
    let admission = plan.chunks[0].admission.as_ref().unwrap();
    assert_eq!(admission.tokens, [1, 1, 1, 1, 50, 51]);
    assert_eq!(admission.prompt_len, 4);
    s.commit(run(&plan, |_, at| token_at(at))).unwrap();
    assert_eq!(trace(&mut s), "0:6+1 | 0 Length\n");
    s.submit(Request { generated: vec![50, EOS], ..resumed.clone() }).unwrap();
    s.submit(Request { generated: vec![50; 4], ..resumed }).unwrap();
    assert_eq!(trace(&mut s), "1:0+6 2:0+8 | 1 Stop | 2 Length\n");
}

#[test]
fn a_stop_id_ends_the_answer_and_is_part_of_it() {
    let mut s = Scheduler::new(config(16, 64));
    let id = s.submit(request(vec![1; 4], 10)).unwrap();
    let plan = s.schedule().unwrap();
    let updates = s.commit(run(&plan, |_, _| EOS)).unwrap();
    assert_eq!(ids(&updates[0].tokens), [EOS]);
    assert_eq!(updates[0].end, Some(End::Stop));
    assert_eq!(s.schedule(), None);
    // The runners get it with the next plan.
    s.submit(request(vec![1; 4], 1)).unwrap();
    assert_eq!(s.schedule().unwrap().released, [id]);
}

#[test]
fn the_context_ends_an_answer() {
    let mut s = Scheduler::new(SchedulerConfig { context_max: 10, ..config(16, 64) });
    s.submit(request(vec![1; 7], 100)).unwrap();
    assert_eq!(finish(&mut s)[&0].tokens.len(), 3);
    let mut small = Scheduler::new(config(1, 64));
    assert_eq!(small.context_max(), 16, "no more than the pool holds");
    small.submit(request(vec![1; 10], 100)).unwrap();
    assert_eq!(finish(&mut small)[&0].tokens.len(), 6);
}

#[test]
fn what_can_never_run_is_refused() {
    let mut s = Scheduler::new(config(2, 64));
    let refused = |result: Result<SequenceId, EngineError>| result.unwrap_err().to_string();
    assert_eq!(
        refused(s.submit(request(vec![1; 32], 1))),
        "prompt of 32 + 1 tokens exceeds the context of 32; shorten the prompt"
    );
    assert!(s.submit(request(vec![1; 32], 0)).is_ok());
    assert!(refused(s.submit(request(vec![], 1))).contains("empty"));
    let more = Request { generated: vec![1; 2], ..request(vec![1], 1) };
    assert!(refused(s.submit(more)).contains("max_tokens"));
}

#[test]
fn a_full_queue_refuses() {
    let mut s = Scheduler::new(config(16, 64));
    for _ in 0..8 {
        s.submit(request(vec![1], 1)).unwrap();
    }
    assert_eq!(s.submit(request(vec![1], 1)), Err(EngineError::Overloaded(8)));
}

#[test]
fn cancelling_frees_the_blocks_at_the_next_step() {
    let mut s = Scheduler::new(config(16, 64));
    let running = s.submit(request(vec![1; 20], 10)).unwrap();
    let plan = s.schedule().unwrap();
    let waiting = s.submit(request(vec![2; 20], 10)).unwrap();
    s.cancel(running);
    s.cancel(waiting);
    assert_eq!(s.stats().blocks_free, 14, "the step in flight still writes to them");
    assert_eq!(s.commit(run(&plan, |_, at| token_at(at))), Ok(vec![]));
    assert_eq!(s.schedule(), None);
    assert_eq!(s.stats().blocks_free, 16);
    assert!(s.is_idle());
    assert_eq!(s.stats().cancelled, 2);
    s.submit(request(vec![3; 2], 1)).unwrap();
    assert_eq!(s.schedule().unwrap().released, [running], "the other was never introduced");
}

#[test]
fn a_failed_sequence_ends_alone() {
    let mut s = Scheduler::new(config(16, 64));
    let bad = s.submit(request(vec![1; 4], 2)).unwrap();
    let good = s.submit(request(vec![2; 4], 2)).unwrap();
    let plan = s.schedule().unwrap();
    let mut output = run(&plan, |_, at| token_at(at));
    output.sampled.retain(|(id, _)| *id != bad);
    output.failed.push((bad, "logits are not numbers".into()));
    let updates = s.commit(output).unwrap();
    assert_eq!(updates[0].end, Some(End::Failed("logits are not numbers".into())));
    assert_eq!(updates[1].sequence, good);
    assert_eq!(trace(&mut s), "1:4+1 | 1 Length\n");
    assert_eq!(s.stats().failed, 1);
}

#[test]
fn an_output_of_another_step_is_refused() {
    let mut s = Scheduler::new(config(16, 64));
    s.submit(request(vec![1; 4], 2)).unwrap();
    let plan = s.schedule().unwrap();
    let later = s.schedule().unwrap();
    assert_eq!(s.schedule(), None, "two plans in flight");
    let later = run(&later, |_, at| token_at(at));
    assert!(matches!(s.commit(later), Err(EngineError::Desync { number: 1, .. })));
    let mut s = Scheduler::new(config(16, 64));
    s.submit(request(vec![1; 4], 2)).unwrap();
    let empty = StepOutput { number: s.schedule().unwrap().number, ..StepOutput::default() };
    assert!(matches!(s.commit(empty), Err(EngineError::Desync { .. })));
    assert!(matches!(s.commit(run(&plan, |_, at| token_at(at))), Err(EngineError::Desync { .. })));
}
