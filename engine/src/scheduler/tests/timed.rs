//! Steps sized by time, on machines whose time is computed.

use super::*;

const TARGET: f64 = 0.25;

/// What a step costs: `fixed` seconds, and for each token `token` seconds and `key` for each token
/// before it.
#[derive(Clone, Copy)]
struct Machine {
    fixed: f64,
    token: f64,
    key: f64,
}

/// 400 tokens a second, as a small model on two cores.
const QUICK: Machine = Machine { fixed: 0.02, token: 0.0025, key: 3e-7 };
/// A model of 8 B on one thread.
const SLOW: Machine = Machine { fixed: 0.5, token: 0.1, key: 1e-5 };

impl Machine {
    fn seconds(&self, plan: &StepPlan) -> f64 {
        let cost = |chunk: &Chunk| {
            let (start, len) = (chunk.start as f64, chunk.tokens.len() as f64);
            len * (self.token + self.key * (start + len / 2.0))
        };
        self.fixed + plan.chunks.iter().map(cost).sum::<f64>()
    }

    /// Runs one step; its plan and its seconds.
    fn step(&self, s: &mut Scheduler) -> Option<(StepPlan, f64)> {
        let plan = s.schedule()?;
        let seconds = self.seconds(&plan);
        s.measure(Duration::from_secs_f64(seconds));
        s.commit(run(&plan, |_, at| token_at(at))).unwrap();
        Some((plan, seconds))
    }
}

fn timed() -> Scheduler {
    let config = config(8192, 512);
    Scheduler::new(SchedulerConfig {
        step_target: Some(Duration::from_secs_f64(TARGET)),
        sequences_max: 64,
        ..config
    })
}

fn tokens_of(plan: &StepPlan, id: SequenceId) -> usize {
    plan.chunks.iter().filter(|c| c.sequence == id).map(|c| c.tokens.len()).sum()
}

#[test]
fn steps_beside_a_decode_take_the_target() {
    let mut s = timed();
    s.submit(request(vec![1; 4], 100_000)).unwrap();
    QUICK.step(&mut s).unwrap();
    s.submit(request(vec![2; 30_000], 1)).unwrap();
    let (mut steps, mut longest) = (0, 0.0f64);
    while s.stats().prompt_tokens < 30_004 || s.running.contains_key(&1) {
        let (plan, seconds) = QUICK.step(&mut s).unwrap();
        assert_eq!(tokens_of(&plan, 0), 1, "the decode goes on in every step");
        longest = longest.max(seconds);
        // The first few are small; the last is what was left.
        let settled = steps > 4 && s.running.contains_key(&1);
        assert!(!settled || seconds > 0.6 * TARGET, "step {steps}: {seconds} s, {}", line(&plan));
        steps += 1;
    }
    assert!(longest < 1.25 * TARGET, "{longest} s");
}

#[test]
fn steps_without_decodes_are_longer_but_bounded() {
    let mut s = timed();
    s.submit(request(vec![2; 30_000], 1)).unwrap();
    let plans: Vec<_> = std::iter::from_fn(|| QUICK.step(&mut s)).collect();
    let (plan, _) = &plans[8];
    assert_eq!(tokens_of(plan, 0) % BLOCK_TOKENS, 0, "whole blocks");
    for (plan, seconds) in &plans[8..plans.len() - 1] {
        assert!((0.6..=0.85).contains(seconds), "{seconds} s, {}", line(plan));
    }
    assert_eq!(line(&plans[0].0), "0:0+16", "nothing is known of the machine");
}

#[test]
fn a_short_request_beside_a_long_prefill_has_its_token_soon() {
    for (machine, bound) in [(QUICK, 1.25), (SLOW, 3.0)] {
        let mut s = timed();
        s.submit(request(vec![1; 20_000], 1)).unwrap();
        for _ in 0..20 {
            machine.step(&mut s).unwrap();
        }
        // It comes just after a step has begun.
        let (_, mut waited) = machine.step(&mut s).unwrap();
        s.submit(request(vec![2; 4], 10)).unwrap();
        let (plan, seconds) = machine.step(&mut s).unwrap();
        waited += seconds;
        assert_eq!(tokens_of(&plan, 1), 4);
        assert!(tokens_of(&plan, 0) > 0, "the long one goes on");
        assert!(waited < bound, "{waited} s");
    }
}

#[test]
fn a_slow_machine_gets_the_least() {
    let mut s = timed();
    s.submit(request(vec![1; 4], 1000)).unwrap();
    s.submit(request(vec![2; 200], 1)).unwrap();
    for _ in 0..3 {
        SLOW.step(&mut s).unwrap();
    }
    let (plan, seconds) = SLOW.step(&mut s).unwrap();
    assert_eq!(tokens_of(&plan, 1), 8);
    assert!(seconds < 1.5, "{seconds} s");
}

#[test]
fn a_cached_prefix_does_not_surprise() {
    let mut s = timed();
    // Its first turn is computed; then many short prompts teach what tokens without a context cost.
    s.submit(request(vec![1; 30_000], 1)).unwrap();
    while QUICK.step(&mut s).is_some() {}
    for token in 0..10 {
        s.submit(request(vec![10 + token; 600], 1)).unwrap();
        while QUICK.step(&mut s).is_some() {}
    }
    s.submit(request(vec![2; 4], 1000)).unwrap();
    QUICK.step(&mut s).unwrap();
    s.submit(request([vec![1; 30_000], vec![3; 2000]].concat(), 1)).unwrap();
    let (plan, seconds) = QUICK.step(&mut s).unwrap();
    assert_eq!(plan.chunks[1].start, 30_000);
    assert!(seconds < 2.0 * TARGET, "{seconds} s");
}

#[test]
fn one_halt_of_the_machine_is_forgotten_soon() {
    let mut s = timed();
    s.submit(request(vec![1; 4], 1000)).unwrap();
    s.submit(request(vec![2; 20_000], 1)).unwrap();
    for _ in 0..10 {
        QUICK.step(&mut s).unwrap();
    }
    let before = tokens_of(&QUICK.step(&mut s).unwrap().0, 1);
    let plan = s.schedule().unwrap();
    s.measure(Duration::from_secs(20));
    s.commit(run(&plan, |_, at| token_at(at))).unwrap();
    let halted = tokens_of(&QUICK.step(&mut s).unwrap().0, 1);
    assert!(halted * 4 > before, "{before} tokens, then {halted}");
    for _ in 0..4 {
        QUICK.step(&mut s).unwrap();
    }
    let after = tokens_of(&QUICK.step(&mut s).unwrap().0, 1);
    assert!(after * 10 > before * 9, "{before} tokens, then {after}");
}

#[test]
fn short_prompts_do_not_make_the_machine_look_slow() {
    let mut s = timed();
    s.submit(request(vec![1; 4000], 1)).unwrap();
    while QUICK.step(&mut s).is_some() {}
    for token in 0..20 {
        s.submit(request(vec![token; 3], 1)).unwrap();
        while QUICK.step(&mut s).is_some() {}
    }
    s.submit(request(vec![2; 4000], 1)).unwrap();
    let (plan, _) = QUICK.step(&mut s).unwrap();
    assert!(tokens_of(&plan, 21) >= 256, "{}", line(&plan));
}

#[test]
fn without_a_target_time_does_not_matter() {
    let mut s = Scheduler::new(config(8192, 512));
    s.submit(request(vec![1; 2048], 1)).unwrap();
    while let Some((plan, _)) = SLOW.step(&mut s) {
        assert_eq!(plan.chunks[0].tokens.len(), 512);
    }
}
