//! Refuses a plan that contradicts itself, the model or the cache, before anything is run.
//!
//! Every rank checks the same plan with the same outcome, so a refusal leaves no rank waiting. What
//! rank 0 alone is given, an admission's tokens, it checks alone: the group ends with its refusal.

use super::{RunnerOptions, RunningSequence};
use crate::ModelError;
use engine::plan::{Admission, BLOCK_TOKENS, Chunk, SequenceId, StepPlan, Tokens, Want};
use std::collections::{HashMap, HashSet};

/// What plans are held against.
pub struct Limits {
    pub options: RunnerOptions,
    pub vocab: usize,
    /// Ranks in the group.
    pub world_size: usize,
    /// Whether devices know what was sampled.
    pub keeps_sampled: bool,
    /// Whether this rank samples, and so has what admissions bring for that.
    pub samples: bool,
    /// Prompts longer than this must not start behind a cached prefix.
    pub prefix_reuse_max: Option<usize>,
}

impl Limits {
    /// Checks all of `plan`, which should be number `expected`.
    pub fn check(
        &self,
        plan: &StepPlan,
        expected: u64,
        sequences: &HashMap<SequenceId, RunningSequence>,
    ) -> Result<(), ModelError> {
        self.find_fault(plan, expected, sequences)
            .map_or(Ok(()), |reason| Err(ModelError::Plan { number: plan.number, reason }))
    }

    fn find_fault(
        &self,
        plan: &StepPlan,
        expected: u64,
        sequences: &HashMap<SequenceId, RunningSequence>,
    ) -> Option<String> {
        if plan.number != expected {
            return Some(format!("plan {expected} comes next: one was lost or repeated"));
        }
        let RunnerOptions { step_tokens_max, sequences_max, .. } = self.options;
        if plan.chunks.len() > sequences_max {
            return Some(format!("{} sequences, at most {sequences_max}", plan.chunks.len()));
        }
        let tokens: usize = plan.chunks.iter().map(|chunk| chunk.tokens.len()).sum();
        if tokens > step_tokens_max {
            return Some(format!("{tokens} tokens, at most {step_tokens_max}"));
        }
        let released: HashSet<SequenceId> = plan.released.iter().copied().collect();
        let mut seen = HashSet::with_capacity(plan.chunks.len());
        let mut written = HashSet::with_capacity(plan.chunks.len());
        plan.chunks.iter().find_map(|chunk| {
            let id = chunk.sequence;
            let known = sequences.get(&id).filter(|_| !released.contains(&id));
            let fault = match !seen.insert(id) {
                true => Some("has two chunks".into()),
                false => self.chunk_fault(chunk, known),
            };
            let fault = fault.or_else(|| {
                let block = blocks_written(chunk, known).find(|block| !written.insert(*block));
                block.map(|block| format!("writes to block {block}, as another sequence does"))
            });
            fault.map(|fault| format!("sequence {id} {fault}"))
        })
    }

    fn chunk_fault(&self, chunk: &Chunk, known: Option<&RunningSequence>) -> Option<String> {
        let (context_max, end) = (self.options.context_max, chunk.end());
        if chunk.tokens.is_empty() {
            return Some("has a chunk without tokens".into());
        }
        if end > context_max {
            return Some(format!("reaches {end} tokens, the context is {context_max}"));
        }
        let ids = chunk.tokens.known().iter().chain(&chunk.next);
        if let Some(id) = ids.copied().find(|&id| id as usize >= self.vocab) {
            return Some(format!("holds token {id}, the vocabulary ends at {}", self.vocab));
        }
        if let Some(fault) = self.blocks_fault(chunk, table(chunk, known)) {
            return Some(fault);
        }
        if chunk.tokens == Tokens::LastSampled
            && let Some(fault) = self.last_sampled_fault(chunk, known)
        {
            return Some(fault);
        }
        match (&chunk.admission, known) {
            (Some(admission), _) => self.admission_fault(admission, chunk.start),
            (None, None) => Some("was never admitted".into()),
            (None, Some(sequence)) if sequence.cached != chunk.start => {
                Some(format!("continues at {} with {} tokens cached", chunk.start, sequence.cached))
            }
            (None, Some(_)) => None,
        }
    }

    /// Faults of the blocks that `chunk` adds to a sequence's `table`.
    fn blocks_fault(&self, chunk: &Chunk, table: &[u32]) -> Option<String> {
        let RunnerOptions { blocks, context_max, .. } = self.options;
        let (end, count) = (chunk.end(), table.len() + chunk.blocks.len());
        if count < end.div_ceil(BLOCK_TOKENS) {
            return Some(format!("has {count} blocks for {end} tokens"));
        }
        let most = context_max.div_ceil(BLOCK_TOKENS);
        if count > most {
            return Some(format!("has {count} blocks, the context fills {most}"));
        }
        if let Some(block) = chunk.blocks.iter().find(|&&block| block as usize >= blocks) {
            return Some(format!("uses block {block}, the pool has {blocks}"));
        }
        if chunk.blocks.is_empty() {
            return None;
        }
        let mut new = HashSet::with_capacity(chunk.blocks.len());
        let twice = chunk.blocks.iter().find(|&block| !new.insert(block));
        let twice = twice.or_else(|| table.iter().find(|block| new.contains(block)));
        twice.map(|block| format!("has block {block} twice"))
    }

    /// Faults of a chunk whose token was sampled by the sequence's last one.
    fn last_sampled_fault(&self, chunk: &Chunk, known: Option<&RunningSequence>) -> Option<String> {
        if self.world_size > 1 && !self.keeps_sampled {
            return Some(format!(
                "goes on with a token that rank 0 alone has; a group of {} ranks needs it in the \
                 plan",
                self.world_size
            ));
        }
        if chunk.want != Want::Sample {
            return Some("goes on with a sampled token for something else than a sample".into());
        }
        let sampled = known.is_some_and(|known| known.samples);
        (!sampled || chunk.admission.is_some())
            .then(|| "goes on with a token that its last chunk did not sample".into())
    }

    fn admission_fault(&self, admission: &Admission, start: usize) -> Option<String> {
        let (prompt, tokens) = (admission.prompt_len, admission.tokens.len());
        let most = if self.samples { tokens } else { self.options.context_max };
        if prompt > most || tokens > self.options.context_max {
            return Some(format!("is admitted with {tokens} tokens, {prompt} of them the prompt"));
        }
        if let Some(&id) = admission.tokens.iter().find(|&&id| id as usize >= self.vocab) {
            return Some(format!("holds token {id}, the vocabulary ends at {}", self.vocab));
        }
        match self.prefix_reuse_max {
            Some(max) if start > 0 && prompt > max => Some(format!(
                "starts behind a cached prefix of {start}, which keys of prompts beyond {max} \
                 tokens do not allow"
            )),
            _ => None,
        }
    }
}

/// The blocks that a sequence has before `chunk`.
fn table<'a>(chunk: &Chunk, known: Option<&'a RunningSequence>) -> &'a [u32] {
    known.filter(|_| chunk.admission.is_none()).map_or(&[], |known| &known.blocks)
}

/// The blocks that hold the tokens of `chunk`, which is sound by itself.
fn blocks_written<'a>(
    chunk: &'a Chunk,
    known: Option<&'a RunningSequence>,
) -> impl Iterator<Item = u32> + 'a {
    let first = chunk.start / BLOCK_TOKENS;
    let count = chunk.end().div_ceil(BLOCK_TOKENS) - first;
    table(chunk, known).iter().chain(&chunk.blocks).copied().skip(first).take(count)
}
