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

mod prefill;
mod sizer;

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use crate::{
    EngineError,
    blocks::BlockPool,
    plan::{BLOCK_TOKENS, Chunk, SequenceId, StepOutput, StepPlan, TokenLogprob, Want},
    sequence::{End, Request, Sequence, Update},
};
use sizer::{StepSizer, units};

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

/// What was planned of one sequence and has not come back yet.
struct Pending {
    sequence: SequenceId,
    start: usize,
    len: usize,
    want: Want,
}

/// What came back, by sequence.
#[derive(Default)]
struct Results {
    sampled: HashMap<SequenceId, TokenLogprob>,
    scored: HashMap<SequenceId, Vec<TokenLogprob>>,
    failed: HashMap<SequenceId, String>,
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
    in_flight: Option<Vec<Pending>>,
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
            in_flight: None,
            next_sequence: 0,
            next_plan: 0,
            stats: Stats::default(),
        }
    }

    /// Tokens of prompt and answer together that one sequence may have.
    pub fn context_max(&self) -> usize {
        self.config.context_max
    }

    /// Whether nothing runs or waits.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    pub fn stats(&self) -> Stats {
        Stats {
            running: self.running.len(),
            waiting: self.waiting.len(),
            blocks_total: self.pool.total(),
            blocks_free: self.pool.free(),
            blocks_cached: self.pool.cached(),
            ..self.stats
        }
    }

    /// Puts a request at the end of the queue.
    pub fn submit(&mut self, request: Request) -> Result<SequenceId, EngineError> {
        Sequence::check(&request, self.config.context_max)?;
        if self.waiting.len() >= self.config.waiting_max {
            return Err(EngineError::Overloaded(self.waiting.len()));
        }
        let id = self.next_sequence;
        self.next_sequence += 1;
        let longest = self.config.prefix_reuse_max;
        let shares = longest.is_none_or(|longest| request.prompt.len() <= longest);
        self.waiting.insert(id, Sequence::new(id, request, shares));
        Ok(id)
    }

    /// Ends a sequence without further updates. Its blocks are free after the next `schedule`.
    pub fn cancel(&mut self, id: SequenceId) {
        let sequence = self.running.get_mut(&id).or_else(|| self.waiting.get_mut(&id));
        if let Some(sequence) = sequence {
            sequence.cancelled = true;
        }
    }

    /// The next step; `None` when there is nothing to run or a plan is still in flight.
    pub fn schedule(&mut self) -> Option<StepPlan> {
        if self.in_flight.is_some() {
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
        self.in_flight = Some(chunks.iter().map(Pending::of).collect());
        Some(StepPlan { number, chunks, released: std::mem::take(&mut self.released) })
    }

    fn drop_cancelled(&mut self) {
        let cancelled = |sequences: &BTreeMap<SequenceId, Sequence>| -> Vec<SequenceId> {
            sequences.values().filter(|s| s.cancelled).map(|s| s.id).collect()
        };
        for id in cancelled(&self.running) {
            self.stats.cancelled += 1;
            self.end(id);
        }
        for id in cancelled(&self.waiting) {
            self.stats.cancelled += 1;
            // One that was preempted is still held by the runners.
            if self.waiting.remove(&id).is_some_and(|sequence| sequence.met) {
                self.released.push(id);
            }
        }
    }

    /// Removes a running sequence for good.
    fn end(&mut self, id: SequenceId) {
        if let Some(mut sequence) = self.running.remove(&id) {
            sequence.free(&mut self.pool);
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
                chunks.push(sequence.chunk(1, self.config.context_max));
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

    fn preempt_youngest(&mut self) {
        if let Some((id, mut sequence)) = self.running.pop_last() {
            sequence.free(&mut self.pool);
            self.waiting.insert(id, sequence);
            self.stats.preemptions += 1;
        }
    }

    /// Takes how long the plan in flight took, before its `commit`; later steps are sized by it.
    pub fn measure(&mut self, step: Duration) {
        let prefills = self.in_flight.iter().flatten().filter(|planned| !planned.is_decode());
        let units = prefills.map(|planned| units(planned.start, planned.len)).sum();
        self.sizer.learn(units, step.as_secs_f64());
    }

    /// Takes over what the plan in flight produced. One update for each sequence with news, in the
    /// plan's order.
    pub fn commit(&mut self, output: StepOutput) -> Result<Vec<Update>, EngineError> {
        let desync = |reason: String| EngineError::Desync { number: output.number, reason };
        let Some(pending) = self.in_flight.take() else {
            return Err(desync("no step is in flight".into()));
        };
        if output.number + 1 != self.next_plan {
            return Err(desync(format!("step {} is in flight", self.next_plan - 1)));
        }
        let number = output.number;
        let mut results = Results::of(output);
        let mut updates = Vec::with_capacity(pending.len());
        for planned in pending {
            let update = self.commit_chunk(&planned, &mut results);
            let update = update.map_err(|reason| EngineError::Desync { number, reason })?;
            updates.extend(update.filter(|update| !update.is_empty()));
        }
        Ok(updates)
    }

    /// `None` for a sequence that was cancelled meanwhile.
    fn commit_chunk(
        &mut self,
        planned: &Pending,
        results: &mut Results,
    ) -> Result<Option<Update>, String> {
        let context_max = self.config.context_max;
        let Some(sequence) = self.running.get_mut(&planned.sequence) else {
            return Err(format!("sequence {} does not run", planned.sequence));
        };
        *(if planned.is_decode() {
            &mut self.stats.decode_tokens
        } else {
            &mut self.stats.prefill_tokens
        }) += planned.len as u64;
        let mut update = Update::new(sequence);
        if let Some(reason) = results.failed.remove(&planned.sequence) {
            update.end = Some(End::Failed(reason));
        } else {
            sequence.advance(planned.start + planned.len);
            sequence.publish(&mut self.pool);
            results.take(planned, sequence, &mut update)?;
            // A sequence ends only once everything it has is computed or was just sampled.
            if sequence.remaining() <= update.tokens.len() {
                update.end = sequence.end(context_max);
            }
        }
        if sequence.cancelled {
            return Ok(None);
        }
        if let Some(end) = &update.end {
            let failed = matches!(end, End::Failed(_));
            *(if failed { &mut self.stats.failed } else { &mut self.stats.finished }) += 1;
            self.end(planned.sequence);
        }
        Ok(Some(update))
    }
}

impl Pending {
    fn of(chunk: &Chunk) -> Self {
        let Chunk { sequence, start, ref tokens, want, .. } = *chunk;
        Self { sequence, start, len: tokens.len(), want }
    }

    /// One token of a sequence whose prompt is computed.
    fn is_decode(&self) -> bool {
        self.len == 1 && self.want == Want::Sample
    }
}

impl Results {
    fn of(output: StepOutput) -> Self {
        Self {
            sampled: output.sampled.into_iter().collect(),
            scored: output.scored.into_iter().collect(),
            failed: output.failed.into_iter().collect(),
        }
    }

    /// Moves what belongs to a chunk into its sequence and the update; says what is missing.
    fn take(
        &mut self,
        planned: &Pending,
        sequence: &mut Sequence,
        update: &mut Update,
    ) -> Result<(), String> {
        let id = planned.sequence;
        let missing = |what: &str| format!("no {what} for sequence {id}");
        if let Want::Score { .. } = planned.want {
            let mut scores = self.scored.remove(&id).ok_or_else(|| missing("scores"))?;
            let wanted = sequence.deliver(planned.start, scores.len());
            scores.truncate(wanted.end);
            update.scores = scores.split_off(wanted.start);
        }
        if matches!(planned.want, Want::Sample | Want::Score { sample: true }) {
            let token = self.sampled.remove(&id).ok_or_else(|| missing("sample"))?;
            sequence.push(token.token);
            update.tokens.push(token);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
