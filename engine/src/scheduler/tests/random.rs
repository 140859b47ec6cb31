//! The scheduler under random calls: its books balance after each, and everybody gets an end.

use std::collections::BTreeSet;

use super::*;

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
        let fits = request.check(self.scheduler.context_max());
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
