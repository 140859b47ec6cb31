//! Which prompts share a step, and how much of it each gets.
//!
//! Prompts run in the order of arrival: of equally long ones each ends as early as it can, and a
//! later one finds the blocks of an earlier one, even those of the same plan: each layer stores the
//! keys and values of all tokens of a step before any of them attends. One that needs little
//! compared to the first does not wait for it: short ones get up to half of the step, the shortest
//! first. The first always has the other half, so it is delayed, never stopped.

use std::collections::BTreeSet;

use super::{Scheduler, sizer::Room};
use crate::{
    plan::{Chunk, SequenceId},
    sequence::Sequence,
};

/// A prompt is short beside one that still needs so many times as much.
const SHORT: usize = 4;

impl Scheduler {
    /// Adds chunks of prompts to a step that has `tokens` left. `admits`: new sequences may start.
    pub(super) fn plan_prefills(&mut self, chunks: &mut Vec<Chunk>, tokens: usize, admits: bool) {
        let planned: BTreeSet<SequenceId> = chunks.iter().map(|chunk| chunk.sequence).collect();
        let mut begun: Vec<SequenceId> = self
            .running
            .values()
            .filter(|s| s.remaining() > 1 && !planned.contains(&s.id))
            .map(|s| s.id)
            .collect();
        let mut room = self.sizer.room(tokens, false);
        let before = chunks.len();
        self.plan_short(&begun, admits, chunks, &mut room);
        let short: BTreeSet<SequenceId> = chunks[before..].iter().map(|c| c.sequence).collect();
        begun.retain(|id| !short.contains(id));
        if chunks.is_empty() {
            room = self.sizer.room(tokens, true);
        }
        for id in begun {
            self.push_prefill(id, chunks, &mut room);
        }
        if admits {
            self.admit_in_order(chunks, &mut room);
        }
    }

    /// Prompts that are short beside the first one begun.
    fn plan_short(
        &mut self,
        begun: &[SequenceId],
        admits: bool,
        chunks: &mut Vec<Chunk>,
        room: &mut Room,
    ) {
        let Some((first, others)) = begun.split_first() else { return };
        let Some(limit) = self.running.get(first).map(|first| first.remaining() / SHORT) else {
            return;
        };
        let others = others.iter().filter_map(|id| self.running.get(id));
        let waiting = self.waiting.values().filter(|_| admits);
        let mut short: Vec<(usize, SequenceId)> = others
            .chain(waiting)
            .map(|s| (s.remaining(), s.id))
            .filter(|&(remaining, _)| remaining <= limit)
            .collect();
        short.sort_unstable();
        let mut half = room.split();
        for (_, id) in short {
            if half.tokens_at(0) == 0 || (self.waiting.contains_key(&id) && !self.overtake(id)) {
                break;
            }
            self.push_prefill(id, chunks, &mut half);
        }
        room.join(half);
    }

    /// Admits a waiting sequence before those that came earlier, where the earliest loses nothing
    /// by it.
    fn overtake(&mut self, id: SequenceId) -> bool {
        let earliest = self.waiting.values().next().filter(|earliest| earliest.id != id);
        let kept = earliest.map_or(0, Sequence::blocks_missing);
        // With more sequences than tokens the decodes of the later ones would stop the first.
        self.running.len() < self.config.step_tokens_max && self.admit(id, kept)
    }

    /// Starts waiting sequences in order while there is room. The first that does not fit blocks
    /// the rest, or a long prompt would never have its turn.
    fn admit_in_order(&mut self, chunks: &mut Vec<Chunk>, room: &mut Room) {
        while room.tokens_at(0) > 0
            && let Some(&id) = self.waiting.keys().next()
            && self.admit(id, 0)
        {
            self.push_prefill(id, chunks, room);
        }
    }

    /// Moves a waiting sequence among the running ones, with blocks for all its tokens; false where
    /// there is no place, fewer than `kept` blocks would be left, or a token is still to come from
    /// before it was preempted.
    fn admit(&mut self, id: SequenceId, kept: usize) -> bool {
        let comes = self.waiting.get(&id).is_some_and(Sequence::is_sampling);
        if comes || self.running.len() >= self.config.sequences_max {
            return false;
        }
        let Some(mut sequence) = self.waiting.remove(&id) else { return false };
        sequence.reuse_prefix(&mut self.pool);
        // Every running sequence may soon need one more block; take none that would be taken back.
        if sequence.blocks_missing() + self.running.len() + kept > self.pool.free() {
            sequence.free(&mut self.pool);
            self.waiting.insert(id, sequence);
            return false;
        }
        while sequence.blocks_missing() > 0 {
            let Some(block) = self.pool.allocate() else { break };
            sequence.add_block(block);
        }
        if !sequence.met {
            self.stats.prompt_tokens += sequence.prompt_len() as u64;
            self.stats.prefix_hit_tokens += sequence.cached_tokens() as u64;
        }
        self.running.insert(id, sequence);
        true
    }

    fn push_prefill(&mut self, id: SequenceId, chunks: &mut Vec<Chunk>, room: &mut Room) {
        let Some(sequence) = self.running.get_mut(&id) else { return };
        let (start, wanted) = (sequence.planned(), sequence.remaining());
        let tokens = room.tokens_at(start);
        if tokens == 0 {
            room.close();
            return;
        }
        let chunk = sequence.chunk(tokens, &mut self.pool);
        room.spend(start, chunk.tokens.len());
        if wanted > tokens {
            // What rounding left over would only start the next one too early to find its blocks.
            room.close();
        }
        chunks.push(chunk);
    }
}
