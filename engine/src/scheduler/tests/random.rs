//! The scheduler under random calls, with one plan in flight and with two: its books balance after
//! each, every sequence reads its own keys, and everybody gets the same answer to its end.

use std::collections::BTreeSet;

use super::{
    device::{Device, sample},
    *,
};

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
    device: Device,
    random: Random,
    /// Plans that are in flight when all that can be are, and those that are now.
    depth: usize,
    flights: VecDeque<StepOutput>,
    /// Requests not ended yet, and the tokens that came.
    open: BTreeMap<SequenceId, (Request, Vec<u32>)>,
    ended: usize,
}

/// What a request is answered, and how that ends.
fn answer(request: &Request, context_max: usize) -> (Vec<u32>, End) {
    let mut tokens = [&request.prompt[..], &request.generated].concat();
    let brought = tokens.len();
    loop {
        let generated = &tokens[request.prompt.len()..];
        let full = generated.len() >= request.max_tokens || tokens.len() >= context_max;
        let end = match generated.last() {
            Some(&EOS) => End::Stop,
            _ if full => End::Length,
            _ => {
                tokens.push(sample(&tokens));
                continue;
            }
        };
        return (tokens.split_off(brought), end);
    }
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
        let depth = 1 + random.below(PLANS_IN_FLIGHT_MAX);
        let device = Device::new(config.blocks as usize);
        let scheduler = Scheduler::new(config);
        let (flights, open) = (VecDeque::new(), BTreeMap::new());
        Self { scheduler, device, random, depth, flights, open, ended: 0 }
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

    /// Plans what can be planned and takes one plan's output; false when there was nothing to do.
    fn step(&mut self, disturb: bool) -> bool {
        while self.flights.len() < self.depth && self.launch(disturb) {}
        if disturb && self.random.below(8) == 0 {
            self.cancel();
        }
        let Some(output) = self.flights.pop_front() else {
            self.audit();
            assert!(self.scheduler.is_idle(), "work, but no plan");
            return false;
        };
        self.scheduler.measure(Duration::from_millis(self.random.below(2000) as u64));
        let updates = self.scheduler.commit(output).unwrap();
        self.audit();
        for update in updates {
            let (request, tokens) = self.open.get_mut(&update.sequence).expect("an open request");
            tokens.extend(ids(&update.tokens));
            let (expected, end) = answer(request, self.scheduler.context_max());
            assert!(expected.starts_with(tokens), "tokens in order, none twice");
            match update.end {
                None => {}
                Some(End::Failed(_)) => self.close(update.sequence),
                Some(ended) => {
                    assert_eq!((tokens.len(), ended), (expected.len(), end));
                    self.close(update.sequence);
                }
            }
        }
        true
    }

    /// Plans a step and has it run; false when there is none.
    fn launch(&mut self, disturb: bool) -> bool {
        let eldest = self.scheduler.running.values().find(|s| !s.cancelled);
        let eldest = eldest.filter(|s| s.remaining() > 0).map(|s| s.id);
        let Some(plan) = self.scheduler.schedule() else { return false };
        self.check(&plan, eldest);
        let fails = disturb && self.random.below(100) == 0;
        let output = self.device.run(&plan, fails.then(|| plan.chunks[0].sequence));
        self.flights.push_back(output);
        self.audit();
        true
    }

    fn close(&mut self, id: SequenceId) {
        self.open.remove(&id);
        self.ended += 1;
    }

    fn check(&self, plan: &StepPlan, eldest: Option<SequenceId>) {
        let config = &self.scheduler.config;
        assert!(!plan.chunks.is_empty());
        assert!(plan.chunks.len() <= config.sequences_max);
        let tokens: usize = plan.chunks.iter().map(|chunk| chunk.tokens.len()).sum();
        assert!(tokens <= config.step_tokens_max);
        for chunk in &plan.chunks {
            assert!(!chunk.tokens.is_empty() && chunk.end() <= config.context_max);
            assert!(self.depth > 1 || chunk.tokens != Tokens::LastSampled);
        }
        let goes_on = |id| plan.chunks.iter().any(|chunk| chunk.sequence == id);
        assert!(eldest.is_none_or(goes_on), "the oldest always goes on");
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
    let mut each = [Stats::default(); PLANS_IN_FLIGHT_MAX];
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
        let sum = &mut each[world.depth - 1];
        sum.preemptions += stats.preemptions;
        sum.prefix_hit_tokens += stats.prefix_hit_tokens;
        sum.failed += stats.failed;
    }
    for sum in each {
        let enough = sum.preemptions > 150 && sum.prefix_hit_tokens > 5000 && sum.failed > 100;
        assert!(enough, "{sum:?}");
    }
}
