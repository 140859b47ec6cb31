//! Two plans in flight: the second is made before the first one's samples are known.

use super::{
    device::{Device, sample},
    *,
};

/// A caller that keeps `depth` plans in flight, as the engine loop does.
struct Loop {
    depth: usize,
    flights: VecDeque<StepOutput>,
    /// A line for each plan when it is made, and for each end when it is known.
    text: String,
}

impl Loop {
    fn new(depth: usize) -> Self {
        Self { depth, flights: VecDeque::new(), text: String::new() }
    }

    /// Plans what can be planned, then takes over the oldest plan's output; `None` when there was
    /// none.
    fn turn(
        &mut self,
        s: &mut Scheduler,
        mut run: impl FnMut(&StepPlan) -> StepOutput,
    ) -> Option<Vec<Update>> {
        while self.flights.len() < self.depth
            && let Some(plan) = s.schedule()
        {
            self.text += &format!("{}\n", line(&plan));
            self.flights.push_back(run(&plan));
        }
        let updates = s.commit(self.flights.pop_front()?).unwrap();
        for update in &updates {
            if let Some(end) = &update.end {
                self.text += &format!("| {} {end:?}\n", update.sequence);
            }
        }
        Some(updates)
    }

    /// Until nothing is left: what was written.
    fn trace(mut self, s: &mut Scheduler) -> String {
        while self.turn(s, |plan| run(plan, |_, at| token_at(at))).is_some() {}
        assert!(s.is_idle());
        self.text
    }
}

#[test]
fn a_decode_is_planned_before_its_token_is_known() {
    let mut s = Scheduler::new(config(16, 64));
    s.submit(request(vec![1; 3], 3)).unwrap();
    // The third token is the last: nothing is computed for it.
    assert_eq!(Loop::new(2).trace(&mut s), "0:0+3\n0:3+?\n0:4+?\n| 0 Length\n");
    assert_eq!(s.stats().decode_tokens, 2);
    assert_eq!(s.stats().blocks_free, 16);
}

#[test]
fn a_stop_is_seen_one_step_late_and_costs_one_token() {
    let mut s = Scheduler::new(config(16, 64));
    s.submit(request(vec![1; 15], 10)).unwrap();
    s.submit(request(vec![2; 4], 4)).unwrap();
    let stops = |id, at| if id == 0 { EOS } else { token_at(at) };
    let mut l = Loop::new(2);
    let updates = l.turn(&mut s, |plan| run(plan, stops)).unwrap();
    assert_eq!((ids(&updates[0].tokens), &updates[0].end), (vec![EOS], &Some(End::Stop)));
    assert_eq!(l.text, "0:0+15 1:0+4\n0:15+? 1:4+?\n| 0 Stop\n");
    assert_eq!(s.stats().blocks_free, 15, "it holds none any more");
    // What the second plan sampled for it is dropped; the runners forget it with the third.
    let third = s.schedule().unwrap();
    assert_eq!((line(&third), third.released.clone()), ("1:5+?".into(), vec![0]));
    let second = l.flights.pop_front().unwrap();
    assert_eq!(second.sampled.len(), 2);
    let updates = s.commit(second).unwrap();
    assert_eq!(updates.iter().map(|update| update.sequence).collect::<Vec<_>>(), [1]);
    s.commit(run(&third, stops)).unwrap();
    assert_eq!(Loop::new(2).trace(&mut s), "1:6+1\n| 1 Length\n");
    assert_eq!(s.stats().decode_tokens, 1 + 3, "the token in vain was computed");
    assert_eq!((s.stats().finished, s.stats().blocks_free), (2, 16));
}

#[test]
fn the_block_of_a_token_in_vain_is_there() {
    let mut s = Scheduler::new(config(16, 64));
    s.submit(request(vec![1; 16], 10)).unwrap();
    let first = s.schedule().unwrap();
    let second = s.schedule().unwrap();
    assert_eq!((line(&second), second.chunks[0].blocks.len()), ("0:16+?".into(), 1));
    assert_eq!(s.stats().blocks_free, 14);
    s.commit(run(&first, |_, _| EOS)).unwrap();
    assert_eq!(s.stats().blocks_free, 16);
    // The next plan may write to that block: it runs after the one that is in flight.
    assert_eq!(s.commit(run(&second, |_, at| token_at(at))), Ok(vec![]));
    assert!(s.is_idle());
}

#[test]
fn a_sequence_cancelled_in_flight_leaves_nothing() {
    let mut s = Scheduler::new(config(16, 64));
    let id = s.submit(request(vec![1; 20], 10)).unwrap();
    let first = s.schedule().unwrap();
    let second = s.schedule().unwrap();
    s.cancel(id);
    assert_eq!(s.commit(run(&first, |_, at| token_at(at))), Ok(vec![]));
    assert_eq!(s.schedule(), None);
    assert_eq!(s.stats().blocks_free, 16);
    assert!(!s.is_idle(), "a plan is in flight");
    assert_eq!(s.commit(run(&second, |_, at| token_at(at))), Ok(vec![]));
    assert!(s.is_idle());
    assert_eq!(s.stats().cancelled, 1);
    s.submit(request(vec![2; 2], 1)).unwrap();
    assert_eq!(s.schedule().unwrap().released, [id]);
}

#[test]
fn a_sequence_preempted_in_flight_keeps_the_token_that_comes() {
    let mut s = Scheduler::new(config(3, 64));
    s.submit(request(vec![1; 14], 6)).unwrap();
    s.submit(request(vec![2; 15], 4)).unwrap();
    let text = Loop::new(2).trace(&mut s);
    // The third plan wants a block for each: the older gets the last one. The younger's token of
    // the second plan, in flight, comes while it waits.
    let expected = concat!(
        "0:0+14 1:0+15\n0:14+? 1:15+?\n0:15+? 1:16+?\n0:16+?\n0:17+?\n0:18+?\n",
        "| 0 Length\n1:16+2\n| 1 Length\n",
    );
    assert_eq!(text, expected);
    assert_eq!((s.stats().preemptions, s.stats().blocks_free), (1, 3));
}

#[test]
fn a_sequence_may_end_while_it_is_preempted() {
    let mut s = Scheduler::new(config(16, 64));
    s.submit(request(vec![1; 4], 2)).unwrap();
    s.submit(request(vec![2; 4], 1)).unwrap();
    let first = s.schedule().unwrap();
    s.preempt_youngest();
    let second = s.schedule().unwrap();
    assert_eq!((line(&second), s.stats().waiting), ("0:4+?".into(), 1), "its token is to come");
    let updates = s.commit(run(&first, |_, at| token_at(at))).unwrap();
    assert_eq!((ids(&updates[1].tokens), &updates[1].end), (vec![104], &Some(End::Length)));
    s.commit(run(&second, |_, at| token_at(at))).unwrap();
    assert!(s.is_idle());
    s.submit(request(vec![3; 4], 1)).unwrap();
    assert_eq!(s.schedule().unwrap().released, [1, 0]);
}

#[test]
fn a_prefix_is_found_as_soon_as_it_is_planned() {
    let mut s = Scheduler::new(config(16, 64));
    s.submit(request((0..40).collect(), 2)).unwrap();
    let first = s.schedule().unwrap();
    s.submit(request((0..40).collect(), 1)).unwrap();
    let second = s.schedule().unwrap();
    assert_eq!(line(&second), "0:40+? 1:32+8");
    assert_eq!(second.chunks[1].blocks[..2], first.chunks[0].blocks[..2]);
    for plan in [first, second] {
        s.commit(run(&plan, |_, at| token_at(at))).unwrap();
    }
    assert!(s.is_idle());
    assert_eq!(s.stats().blocks_free, 16);
}

#[test]
fn a_prefix_outlives_the_one_who_was_to_compute_it() {
    let mut s = Scheduler::new(config(16, 64));
    let mut device = Device::new(16);
    let writer = s.submit(request((0..40).collect(), 2)).unwrap();
    let first = s.schedule().unwrap();
    s.cancel(writer);
    s.submit(request((0..40).collect(), 1)).unwrap();
    // The plan that computes it is on its way whoever asked for it.
    let second = s.schedule().unwrap();
    assert_eq!(line(&second), "1:32+8");
    for plan in [first, second] {
        s.commit(device.run(&plan, None)).unwrap();
    }
    assert!(s.is_idle());
}

#[test]
fn nobody_finds_the_blocks_of_a_chunk_that_failed() {
    let mut s = Scheduler::new(config(16, 64));
    let mut device = Device::new(16);
    s.submit(request((0..40).collect(), 2)).unwrap();
    let first = s.schedule().unwrap();
    // Its decode is in flight behind it and fails with it.
    let second = s.schedule().unwrap();
    let updates = s.commit(device.run(&first, Some(0))).unwrap();
    assert!(matches!(updates[0].end, Some(End::Failed(_))));
    assert_eq!(s.commit(device.run(&second, None)), Ok(vec![]));
    assert_eq!((s.stats().blocks_free, s.stats().blocks_cached), (16, 0));
    s.submit(request((0..40).collect(), 1)).unwrap();
    assert_eq!(Loop::new(2).trace(&mut s), "1:0+40\n| 1 Length\n");
    assert_eq!(s.stats().failed, 1);
}

#[test]
fn choices_of_one_prompt_go_on_side_by_side() {
    let mut s = Scheduler::new(config(16, 64));
    for _ in 0..3 {
        s.submit(request((0..36).collect(), 3)).unwrap();
    }
    let text = Loop::new(2).trace(&mut s);
    let expected = concat!(
        "0:0+36 1:32+4 2:32+4\n0:36+? 1:36+? 2:36+?\n0:37+? 1:37+? 2:37+?\n",
        "| 0 Length\n| 1 Length\n| 2 Length\n",
    );
    assert_eq!(text, expected);
}

/// Whatever is short, blocks, tokens or places: each request's answer is its own.
#[test]
fn two_plans_in_flight_answer_as_one_does() {
    for (blocks, step_tokens_max, sequences_max) in [(64, 64, 4), (8, 24, 4), (7, 9, 3), (30, 3, 2)]
    {
        let bounds = SchedulerConfig { sequences_max, ..config(blocks, step_tokens_max) };
        let answers = [1, 2].map(|depth| {
            let mut s = Scheduler::new(bounds.clone());
            let mut device = Device::new(blocks as usize);
            for number in 0..8u32 {
                let prompt = (0..10 + 7 * number).map(|at| at / (1 + number % 3)).collect();
                let score_prompt = number % 4 == 3;
                s.submit(Request { score_prompt, ..request(prompt, 40) }).unwrap();
            }
            let mut merged: BTreeMap<SequenceId, Update> = BTreeMap::new();
            let mut l = Loop::new(depth);
            while let Some(updates) = l.turn(&mut s, |plan| device.run(plan, None)) {
                for mut update in updates {
                    // What is found in the cache depends on who came first.
                    update.cached_tokens = 0;
                    match merged.get_mut(&update.sequence) {
                        Some(earlier) => earlier.merge(update),
                        None => drop(merged.insert(update.sequence, update)),
                    }
                }
            }
            assert_eq!(l.text.contains('?'), depth == 2);
            assert_eq!(s.stats().blocks_free, blocks as usize);
            merged
        });
        assert_eq!(answers[0].len(), 8);
        assert_eq!(answers[0], answers[1]);
        let stopped = answers[0].values().filter(|update| update.end == Some(End::Stop)).count();
        assert!(stopped > 0 && sample(&[1]) != sample(&[2]), "the model says different things");
    }
}

/// The share of time that a device is busy whose steps take 5 ms, beside a scheduler that takes 2
/// ms for each plan.
fn busy(depth: usize) -> f64 {
    const STEP: f64 = 0.005;
    const PLANNING: f64 = 0.002;
    let mut s = Scheduler::new(config(64, 64));
    for token in 0..4 {
        s.submit(request(vec![token; 10], 200)).unwrap();
    }
    let (mut host, mut device, mut worked) = (0.0f64, 0.0f64, 0.0);
    let mut ends = VecDeque::new();
    let mut l = Loop::new(depth);
    loop {
        let turned = l.turn(&mut s, |plan| {
            host += PLANNING;
            device = device.max(host) + STEP;
            worked += STEP;
            ends.push_back(device);
            run(plan, |_, at| token_at(at))
        });
        let Some(end) = ends.pop_front() else { break };
        assert!(turned.is_some());
        host = host.max(end);
    }
    assert!(s.is_idle());
    worked / host
}

#[test]
fn a_device_is_busy_while_the_next_step_is_planned() {
    assert!(busy(2) >= 0.95, "{}", busy(2));
    assert!(busy(1) < 0.75, "{}", busy(1));
}
