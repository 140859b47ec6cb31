//! Decides which tokens run next and which KV blocks they use.
//!
//! Pure and synchronous: no clock, no I/O, no device. Every decision is a function of the calls
//! made so far, so a test can replay any schedule.
//!
//! Decodes go first, then prompts, as `prefill` shares them out, all under one budget of tokens
//! and, where steps are to take a certain time, under one that is learned (`sizer`). A sequence
//! gets the blocks of all its known tokens when it is admitted and one more whenever it has filled
//! those. When none is left the youngest running sequence gives its blocks back and is computed
//! again later, so the oldest always goes on. Nothing is admitted that could not run alone in an
//! empty pool: a plan without chunks never exists.
//!
//! A second plan may be made while the first is in flight: then a decode's token is the one that
//! the first plan samples, whatever that is. A sequence that turns out to have ended with it has
//! one token computed in vain, and what comes back for it is dropped (`commit`). Plans run in
//! order, so blocks are shared and reused from one to the next as if each were done when made.

mod commit;
mod positions;
mod prefill;
mod sizer;

pub use positions::Position;

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use crate::{
    EngineError,
    blocks::{BlockPool, PrefixChange},
    plan::{BLOCK_TOKENS, Chunk, PLANS_IN_FLIGHT_MAX, SequenceId, StepPlan},
    sequence::{Request, Sequence},
};
use commit::Flight;
use sizer::StepSizer;

/// The bounds of one engine. All but `prefix_reuse_max` are at least 1.
#[derive(Clone, Debug)]
pub struct SchedulerConfig {
    /// Blocks in the KV pool.
    pub blocks: u32,
    /// Tokens in one plan.
    pub step_tokens_max: usize,
    /// How long a step with decodes should take: prompts get fewer tokens of it until it does. One
    /// without decodes may take three times as long. `None` sizes steps by tokens alone.
    pub step_target: Option<Duration>,
    /// Sequences that run at once.
    pub sequences_max: usize,
    /// Requests that wait for a place.
    pub waiting_max: usize,
    /// Tokens of prompt and answer together.
    pub context_max: usize,
    /// Longest prompt whose blocks may be shared; `None` is any. Where rotary angles depend on the
    /// length of the prompt, blocks of longer prompts mean something else.
    pub prefix_reuse_max: Option<usize>,
}

/// Figures at one moment, and counts since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    pub running: usize,
    pub waiting: usize,
    pub blocks_total: usize,
    /// Blocks that no running sequence holds.
    pub blocks_free: usize,
    /// Of those, the ones whose contents can be found again.
    pub blocks_cached: usize,
    /// Tokens of the sequences that run or wait, not yet computed.
    pub to_prefill: usize,
    pub prefill_tokens: u64,
    pub decode_tokens: u64,
    pub prompt_tokens: u64,
    /// Prompt tokens found in the cache.
    pub prefix_hit_tokens: u64,
    pub preemptions: u64,
    pub finished: u64,
    pub cancelled: u64,
    pub failed: u64,
}

/// The scheduler of one group.
pub struct Scheduler {
    config: SchedulerConfig,
    pool: BlockPool,
    sizer: StepSizer,
    /// By id, which is the order of arrival.
    running: BTreeMap<SequenceId, Sequence>,
    waiting: BTreeMap<SequenceId, Sequence>,
    /// Ended sequences that the runners still remember.
    released: Vec<SequenceId>,
    /// Plans that were made and not committed, the oldest first.
    in_flight: VecDeque<Flight>,
    next_sequence: SequenceId,
    next_plan: u64,
    stats: Stats,
}

impl Scheduler {
    /// Bounds of 0 count as 1; the context shrinks to what the pool can hold.
    pub fn new(mut config: SchedulerConfig) -> Self {
        config.blocks = config.blocks.max(1);
        config.step_tokens_max = config.step_tokens_max.max(1);
        config.sequences_max = config.sequences_max.max(1);
        config.waiting_max = config.waiting_max.max(1);
        config.context_max = config.context_max.clamp(1, config.blocks as usize * BLOCK_TOKENS);
        Self {
            pool: BlockPool::new(config.blocks),
            sizer: StepSizer::new(config.step_target),
            config,
            running: BTreeMap::new(),
            waiting: BTreeMap::new(),
            released: Vec::new(),
            in_flight: VecDeque::new(),
            next_sequence: 0,
            next_plan: 0,
            stats: Stats::default(),
        }
    }

    /// Tokens of prompt and answer together that one sequence may have.
    pub fn context_max(&self) -> usize {
        self.config.context_max
    }

    /// Whether nothing runs, waits or is in flight.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty() && self.in_flight.is_empty()
    }

    pub fn stats(&self) -> Stats {
        let sequences = self.running.values().chain(self.waiting.values());
        let left = sequences.map(Sequence::remaining).filter(|&left| left > 1);
        Stats {
            running: self.running.len(),
            waiting: self.waiting.len(),
            blocks_total: self.pool.total(),
            blocks_free: self.pool.free(),
            blocks_cached: self.pool.cached(),
            to_prefill: left.sum(),
            ..self.stats
        }
    }

    /// As [`BlockPool::take_changes`].
    pub fn take_prefix_changes(&mut self) -> Vec<PrefixChange> {
        self.pool.take_changes()
    }

    /// Puts a request at the end of the queue.
    pub fn submit(&mut self, request: Request) -> Result<SequenceId, EngineError> {
        request.check(self.config.context_max)?;
        if self.waiting.len() >= self.config.waiting_max {
            return Err(EngineError::Overloaded(self.waiting.len()));
        }
        let id = self.next_sequence;
        self.next_sequence += 1;
        let longest = self.config.prefix_reuse_max;
        let shares = longest.is_none_or(|longest| request.prompt.len() <= longest);
        let sequence = Sequence::new(id, request, shares, self.config.context_max);
        self.waiting.insert(id, sequence);
        Ok(id)
    }

    /// Ends a sequence without further updates. Its blocks are free after the next `schedule`.
    pub fn cancel(&mut self, id: SequenceId) {
        let sequence = self.running.get_mut(&id).or_else(|| self.waiting.get_mut(&id));
        if let Some(sequence) = sequence {
            sequence.cancelled = true;
        }
    }

    /// The next step; `None` when there is nothing to run before a plan in flight is committed, or
    /// [`PLANS_IN_FLIGHT_MAX`] are. Whoever commits each plan before it asks for the next one never
    /// gets a chunk of `Tokens::LastSampled`. A plan once made must be run.
    pub fn schedule(&mut self) -> Option<StepPlan> {
        if self.in_flight.len() >= PLANS_IN_FLIGHT_MAX {
            return None;
        }
        self.drop_cancelled();
        let mut chunks = Vec::new();
        let mut budget = self.config.step_tokens_max;
        let preempted = self.plan_decodes(&mut chunks, &mut budget);
        self.plan_prefills(&mut chunks, budget, !preempted);
        if chunks.is_empty() {
            return None;
        }
        let number = self.next_plan;
        self.next_plan += 1;
        self.in_flight.push_back(Flight::new(number, &chunks, self.sizer.planned()));
        Some(StepPlan { number, chunks, released: std::mem::take(&mut self.released) })
    }

    fn drop_cancelled(&mut self) {
        let sequences = self.running.values().chain(self.waiting.values());
        let cancelled: Vec<SequenceId> = sequences.filter(|s| s.cancelled).map(|s| s.id).collect();
        for id in cancelled {
            self.stats.cancelled += 1;
            self.end(id);
        }
    }

    /// Removes a sequence for good. What is in flight of it runs, and is dropped when it comes
    /// back.
    fn end(&mut self, id: SequenceId) {
        let sequence = self.running.remove(&id).or_else(|| self.waiting.remove(&id));
        let Some(mut sequence) = sequence else { return };
        sequence.free(&mut self.pool);
        // One that waits may have been preempted: then the runners remember it.
        if sequence.met {
            self.released.push(id);
        }
    }

    /// One token of every sequence that has its prompt behind it. Says whether any was preempted.
    fn plan_decodes(&mut self, chunks: &mut Vec<Chunk>, budget: &mut usize) -> bool {
        let decoding: Vec<SequenceId> =
            self.running.values().filter(|s| s.remaining() == 1).map(|s| s.id).collect();
        let preemptions = self.stats.preemptions;
        for id in decoding {
            if *budget == 0 {
                break;
            }
            if !self.make_room(id) {
                continue;
            }
            if let Some(sequence) = self.running.get_mut(&id) {
                chunks.push(sequence.chunk(1, &mut self.pool));
                *budget -= 1;
            }
        }
        self.stats.preemptions > preemptions
    }

    /// Gives a running sequence the blocks it lacks, at the expense of the youngest; false when it
    /// was itself the youngest, or was preempted for an older one before.
    fn make_room(&mut self, id: SequenceId) -> bool {
        while let Some(sequence) = self.running.get_mut(&id) {
            if sequence.blocks_missing() == 0 {
                return true;
            }
            match self.pool.allocate() {
                Some(block) => sequence.add_block(block),
                None => self.preempt_youngest(),
            }
        }
        false
    }

    /// What is in flight of it still comes back, and its tokens count: they are those that it would
    /// sample again.
    fn preempt_youngest(&mut self) {
        if let Some((id, mut sequence)) = self.running.pop_last() {
            sequence.free(&mut self.pool);
            self.waiting.insert(id, sequence);
            self.stats.preemptions += 1;
        }
    }
}

#[cfg(test)]
mod tests;
