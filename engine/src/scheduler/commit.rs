//! What comes back of plans: tokens, scores and ends, or nothing where a sequence ended meanwhile.

use std::{collections::HashMap, time::Duration};

use super::{Scheduler, sizer::units};
use crate::{
    EngineError,
    plan::{Chunk, SequenceId, StepOutput, TokenLogprob, Want},
    sequence::{End, Sequence, Update},
};

/// A plan that has not come back yet.
pub(super) struct Flight {
    number: u64,
    chunks: Vec<Pending>,
    /// Units of prompts that the step could have had, and the seconds that it should take.
    room: (f64, f64),
}

/// What was planned of one sequence.
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

impl Scheduler {
    /// Takes how long the oldest plan in flight took, before its `commit`; later steps are sized by
    /// it.
    pub fn measure(&mut self, step: Duration) {
        let Some(flight) = self.in_flight.front() else { return };
        let prefills = flight.chunks.iter().filter(|planned| !planned.is_decode());
        let units = prefills.map(|planned| units(planned.start, planned.len)).sum();
        self.sizer.learn(units, step.as_secs_f64(), flight.room);
    }

    /// Takes over what the oldest plan in flight produced. One update for each sequence with news,
    /// in the plan's order; none for those that ended since the plan was made.
    ///
    /// # Errors
    /// `Desync` for another plan's output, or one that lacks what was planned.
    pub fn commit(&mut self, output: StepOutput) -> Result<Vec<Update>, EngineError> {
        let number = output.number;
        let desync = |reason: String| EngineError::Desync { number, reason };
        let Some(flight) = self.in_flight.pop_front() else {
            return Err(desync("no step is in flight".into()));
        };
        if number != flight.number {
            return Err(desync(format!("step {} comes next", flight.number)));
        }
        let mut results = Results::of(output);
        let mut updates = Vec::with_capacity(flight.chunks.len());
        for planned in flight.chunks {
            let update = self.commit_chunk(&planned, &mut results).map_err(desync)?;
            updates.extend(update.filter(|update| !update.is_empty()));
        }
        Ok(updates)
    }

    /// `None` for a sequence that ended meanwhile, or is cancelled.
    fn commit_chunk(
        &mut self,
        planned: &Pending,
        results: &mut Results,
    ) -> Result<Option<Update>, String> {
        let id = planned.sequence;
        *(if planned.is_decode() {
            &mut self.stats.decode_tokens
        } else {
            &mut self.stats.prefill_tokens
        }) += planned.len as u64;
        // One that was preempted meanwhile waits; its results are as good as they were.
        let running = self.running.get_mut(&id);
        let Some(sequence) = running.or_else(|| self.waiting.get_mut(&id)) else {
            return Ok(None);
        };
        let mut update = Update::new(sequence);
        if let Some(reason) = results.failed.remove(&id) {
            sequence.withdraw(planned.start, &mut self.pool);
            update.end = Some(End::Failed(reason));
        } else {
            sequence.advance(planned.end());
            results.take(planned, sequence, &mut update)?;
            for token in &update.tokens {
                sequence.push(token.token, &mut self.pool);
            }
            // A sequence ends only once everything it has is computed or was just sampled.
            if !update.tokens.is_empty() || planned.end() == sequence.known() {
                update.end = sequence.end();
            }
        }
        if sequence.cancelled {
            return Ok(None);
        }
        if let Some(end) = &update.end {
            let failed = matches!(end, End::Failed(_));
            *(if failed { &mut self.stats.failed } else { &mut self.stats.finished }) += 1;
            self.end(id);
        }
        Ok(Some(update))
    }
}

impl Flight {
    pub fn new(number: u64, chunks: &[Chunk], room: (f64, f64)) -> Self {
        Self { number, chunks: chunks.iter().map(Pending::of).collect(), room }
    }
}

impl Pending {
    fn of(chunk: &Chunk) -> Self {
        let Chunk { sequence, start, ref tokens, want, .. } = *chunk;
        Self { sequence, start, len: tokens.len(), want }
    }

    fn end(&self) -> usize {
        self.start + self.len
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

    /// Moves what belongs to a chunk into the update; says what is missing.
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
            update.tokens.push(token);
        }
        Ok(())
    }
}
