//! Schedules as traces: each line is a step, `sequence:start+tokens`.

mod timed;

use std::collections::BTreeSet;

use super::*;
use crate::plan::SamplingParams;

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
        let stop = chunk.start + chunk.tokens.len();
        if let Want::Score { .. } = chunk.want {
            let following = chunk.tokens[1..].iter().copied().chain(chunk.next);
            output.scored.push((chunk.sequence, following.map(known).collect()));
        }
        if matches!(chunk.want, Want::Sample | Want::Score { sample: true }) {
            output.sampled.push((chunk.sequence, known(sample(chunk.sequence, stop))));
        }
    }
    output
}

fn line(plan: &StepPlan) -> String {
    let chunk = |c: &Chunk| format!("{}:{}+{}", c.sequence, c.start, c.tokens.len());
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
fn a_block_is_shared_only_once_it_is_computed() {
    let mut s = Scheduler::new(config(16, 64));
    s.submit(request(vec![5; 32], 2)).unwrap();
    s.submit(request(vec![5; 32], 2)).unwrap();
    let plan = s.schedule().unwrap();
    assert_eq!(line(&plan), "0:0+32 1:0+32");
    assert!(plan.chunks[0].blocks.iter().all(|id| !plan.chunks[1].blocks.contains(id)));
    s.commit(run(&plan, |_, at| token_at(at))).unwrap();
    let plan = s.schedule().unwrap();
    assert_eq!(plan.chunks[0].blocks[..2], plan.chunks[1].blocks[..2], "equal blocks merge");
    s.commit(run(&plan, |_, at| token_at(at))).unwrap();
    assert_eq!(s.stats().blocks_free, 16);
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
    assert_eq!(s.schedule(), None, "one plan in flight");
    let other = StepOutput { number: 7, ..StepOutput::default() };
    assert!(matches!(s.commit(other), Err(EngineError::Desync { number: 7, .. })));
    let mut s = Scheduler::new(config(16, 64));
    s.submit(request(vec![1; 4], 2)).unwrap();
    let empty = StepOutput { number: s.schedule().unwrap().number, ..StepOutput::default() };
    assert!(matches!(s.commit(empty), Err(EngineError::Desync { .. })));
    assert!(matches!(s.commit(run(&plan, |_, at| token_at(at))), Err(EngineError::Desync { .. })));
}

/// SplitMix64: enough for choosing test cases.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % bound as u64) as usize
    }
}

/// The scheduler in the hands of a random caller, and what must hold whatever the caller does.
struct World {
    scheduler: Scheduler,
    random: Random,
    /// Requests not ended yet, and how many tokens came.
    open: BTreeMap<SequenceId, (Request, Vec<u32>)>,
    ended: usize,
    plans: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let config = SchedulerConfig {
            blocks: 1 + random.below(12) as u32,
            step_tokens_max: 1 + random.below(40),
            step_target: (random.below(2) == 0).then_some(Duration::from_millis(250)),
            sequences_max: 1 + random.below(6),
            waiting_max: 1 + random.below(6),
            context_max: 1 + random.below(200),
            prefix_reuse_max: (random.below(3) == 0).then(|| random.below(60)),
        };
        let scheduler = Scheduler::new(config);
        Self { scheduler, random, open: BTreeMap::new(), ended: 0, plans: 0 }
    }

    fn submit(&mut self) {
        let r = &mut self.random;
        let tokens = |r: &mut Random, len| (0..len).map(|_| r.below(2) as u32).collect::<Vec<_>>();
        let same = r.below(2) == 0;
        let length = r.below(70);
        let prompt = if same { vec![1; length] } else { tokens(r, length) };
        let max_tokens = r.below(120);
        let generated = r.below(max_tokens + 1) / 2;
        let request = Request {
            prompt,
            generated: (0..generated).map(|at| token_at(length + at)).collect(),
            params: GREEDY,
            max_tokens,
            stop_ids: vec![EOS],
            score_prompt: r.below(4) == 0,
        };
        let fits = Sequence::check(&request, self.scheduler.context_max());
        match self.scheduler.submit(request.clone()) {
            Ok(id) => drop(self.open.insert(id, (request, Vec::new()))),
            Err(EngineError::Overloaded(_)) => {
                assert!(self.scheduler.waiting.len() >= self.scheduler.config.waiting_max);
            }
            Err(error) => assert_eq!(Err(error), fits),
        }
    }

    fn cancel(&mut self) {
        let at = self.random.below(self.open.len().max(1));
        if let Some(&id) = self.open.keys().nth(at) {
            self.scheduler.cancel(id);
            self.open.remove(&id);
            self.ended += 1;
        }
    }

    /// One step; false when there was nothing to run.
    fn step(&mut self, disturb: bool) -> bool {
        let Some(plan) = self.scheduler.schedule() else {
            self.audit();
            assert!(self.scheduler.is_idle(), "work, but no plan");
            return false;
        };
        self.check(&plan);
        if disturb && self.random.below(8) == 0 {
            self.cancel();
        }
        let mut output = run(&plan, |_, at| token_at(at));
        if disturb && self.random.below(30) == 0 {
            output.failed.push((plan.chunks[0].sequence, "bad luck".into()));
        }
        self.scheduler.measure(Duration::from_millis(self.random.below(2000) as u64));
        let updates = self.scheduler.commit(output).unwrap();
        self.audit();
        for update in updates {
            let (request, tokens) = self.open.get_mut(&update.sequence).expect("an open request");
            tokens.extend(ids(&update.tokens));
            let (prompt, brought) = (request.prompt.len(), request.generated.len());
            let expected = (0..tokens.len()).map(|at| token_at(prompt + brought + at));
            assert!(tokens.iter().copied().eq(expected), "tokens in order, none twice");
            match update.end {
                None => {}
                Some(End::Failed(_)) => self.close(update.sequence),
                Some(End::Stop) => panic!("nobody sampled a stop id"),
                Some(End::Length) => {
                    let room = self.scheduler.context_max() - prompt;
                    assert_eq!(tokens.len() + brought, request.max_tokens.min(room).max(brought));
                    self.close(update.sequence);
                }
            }
        }
        true
    }

    fn close(&mut self, id: SequenceId) {
        self.open.remove(&id);
        self.ended += 1;
    }

    fn check(&mut self, plan: &StepPlan) {
        let config = &self.scheduler.config;
        assert_eq!(plan.number, self.plans);
        self.plans += 1;
        assert!(!plan.chunks.is_empty());
        assert!(plan.chunks.len() <= config.sequences_max);
        let tokens: usize = plan.chunks.iter().map(|chunk| chunk.tokens.len()).sum();
        assert!(tokens <= config.step_tokens_max);
        let mut writes: HashMap<u32, SequenceId> = HashMap::new();
        for chunk in &plan.chunks {
            let stop = chunk.start + chunk.tokens.len();
            assert!(!chunk.tokens.is_empty());
            assert!(stop <= config.context_max);
            assert!(chunk.blocks.len() * BLOCK_TOKENS >= stop);
            for &block in &chunk.blocks[chunk.start / BLOCK_TOKENS..stop.div_ceil(BLOCK_TOKENS)] {
                assert_eq!(writes.insert(block, chunk.sequence), None, "two write one block");
            }
        }
        for chunk in &plan.chunks {
            let read = &chunk.blocks[..chunk.start / BLOCK_TOKENS];
            assert!(read.iter().all(|block| !writes.contains_key(block)), "read while written");
        }
        let oldest = self.scheduler.running.keys().next().copied();
        let decodes = plan.chunks.iter().any(|chunk| Some(chunk.sequence) == oldest);
        assert!(decodes, "the oldest always goes on");
    }

    fn audit(&self) {
        let mut held: HashMap<u32, u32> = HashMap::new();
        for sequence in self.scheduler.running.values() {
            let mut own = BTreeSet::new();
            for &block in sequence.blocks() {
                assert!(own.insert(block), "a block twice in one sequence");
                *held.entry(block).or_default() += 1;
            }
        }
        assert!(self.scheduler.waiting.values().all(|s| s.blocks().is_empty()));
        assert!(self.scheduler.running.len() <= self.scheduler.config.sequences_max);
        self.scheduler.pool.audit(&held);
    }
}

#[test]
fn whatever_the_caller_does_the_books_balance() {
    let (mut preemptions, mut hits) = (0, 0);
    for seed in 0..3000 {
        let mut world = World::new(seed);
        for _ in 0..world.random.below(120) {
            match world.random.below(10) {
                0..3 => world.submit(),
                3 => world.cancel(),
                _ => drop(world.step(true)),
            }
        }
        let mut steps = 0;
        while world.step(false) {
            steps += 1;
            assert!(steps < 100_000, "seed {seed} does not end");
        }
        assert!(world.open.is_empty(), "seed {seed}: {} never ended", world.open.len());
        let stats = world.scheduler.stats();
        assert_eq!(stats.blocks_free, stats.blocks_total, "seed {seed}");
        assert_eq!(world.ended as u64, stats.finished + stats.failed + stats.cancelled);
        preemptions += stats.preemptions;
        hits += stats.prefix_hit_tokens;
    }
    assert!(preemptions > 500 && hits > 10_000, "{preemptions} preemptions, {hits} hits");
}
