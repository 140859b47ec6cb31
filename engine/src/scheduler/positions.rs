//! How far each sequence has come, for those who wait for it.

use super::Scheduler;
use crate::plan::SequenceId;

/// Where a sequence stands before its next token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// While it waits for a place in the batch: the sequences before it.
    pub waiting_ahead: usize,
    /// Of `known`, the tokens whose keys and values are in the cache.
    pub computed: usize,
    /// Tokens of the prompt and of the answer so far.
    pub known: usize,
    /// It has a place in the batch.
    pub running: bool,
}

impl Scheduler {
    /// Every sequence that has not ended, and where it stands.
    pub fn positions(&self) -> impl Iterator<Item = (SequenceId, Position)> {
        let running = self.running.values().map(|s| (s, 0, true));
        let waiting = self.waiting.values().enumerate().map(|(ahead, s)| (s, ahead, false));
        running.chain(waiting).map(|(sequence, waiting_ahead, running)| {
            let (computed, known) = (sequence.computed(), sequence.known());
            (sequence.id, Position { waiting_ahead, computed, known, running })
        })
    }
}
