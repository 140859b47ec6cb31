//! Refuses a plan that contradicts itself, the model or the cache, before anything is run.
//!
//! Every rank checks the same plan with the same outcome, so a refusal leaves no rank waiting.

use super::{RunnerOptions, RunningSequence};
use crate::ModelError;
use engine::plan::{Admission, BLOCK_TOKENS, Chunk, SequenceId, StepPlan};
use std::collections::{HashMap, HashSet};

/// What plans are held against.
pub struct Limits {
    pub options: RunnerOptions,
    pub vocab: usize,
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
        plan.chunks.iter().find_map(|chunk| {
            let id = chunk.sequence;
            let known = sequences.get(&id).filter(|_| !released.contains(&id));
            let fault = match !seen.insert(id) {
                true => Some("has two chunks".into()),
                false => self.chunk_fault(chunk, known),
            };
            fault.map(|fault| format!("sequence {id} {fault}"))
        })
    }

    fn chunk_fault(&self, chunk: &Chunk, known: Option<&RunningSequence>) -> Option<String> {
        let RunnerOptions { blocks, context_max, .. } = self.options;
        let end = chunk.start.saturating_add(chunk.tokens.len());
        if chunk.tokens.is_empty() {
            return Some("has a chunk without tokens".into());
        }
        if end > context_max {
            return Some(format!("reaches {end} tokens, the context is {context_max}"));
        }
        let ids = chunk.tokens.iter().chain(&chunk.next);
        if let Some(id) = ids.copied().find(|&id| id as usize >= self.vocab) {
            return Some(format!("holds token {id}, the vocabulary ends at {}", self.vocab));
        }
        let needed = end.div_ceil(BLOCK_TOKENS);
        if chunk.blocks.len() < needed {
            return Some(format!("has {} blocks for {end} tokens", chunk.blocks.len()));
        }
        if let Some(block) = chunk.blocks.iter().find(|&&block| block as usize >= blocks) {
            return Some(format!("uses block {block}, the pool has {blocks}"));
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

    fn admission_fault(&self, admission: &Admission, start: usize) -> Option<String> {
        let (prompt, tokens) = (admission.prompt_len, admission.tokens.len());
        if prompt > tokens || tokens > self.options.context_max {
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
