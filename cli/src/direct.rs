//! One sequence after another, straight through a group: for tools that need no server.
//!
//! Without a scheduler: no request asks for logits, and one sequence needs no sharing out.

mod kept_alive;

use anyhow::{Result, anyhow, bail};
use engine::plan::{
    BLOCK_TOKENS, Chunk, SamplingParams, SequenceId, StepOutput, StepPlan, TokenLogprob, Want,
};
use engine::{Driven, check_ids};
use kept_alive::KeptAlive;
use worker::{Group, ModelInfo};

/// Refuses what a group cannot run: unknown ids, too many tokens.
pub fn check(info: &ModelInfo, prompt: &[u32], new: usize) -> Result<()> {
    if prompt.is_empty() {
        bail!("the prompt has no tokens");
    }
    check_ids("prompt", prompt, info.vocab)?;
    let blocks = (prompt.len() + new).div_ceil(BLOCK_TOKENS);
    if prompt.len() + new > info.context_max || blocks > info.blocks {
        let most = info.context_max.min(info.blocks * BLOCK_TOKENS);
        bail!(
            "a prompt of {} + {new} new tokens exceeds the context of {most}; raise --context or \
             --kv-memory, or shorten it",
            prompt.len()
        );
    }
    Ok(())
}

/// A group with nobody else on it.
pub struct Direct {
    executor: KeptAlive,
    pub info: ModelInfo,
    /// The next plan's.
    number: u64,
    /// The next sequence's.
    id: SequenceId,
    released: Vec<SequenceId>,
}

impl Direct {
    /// From here on the other ranks know that this one lives.
    pub fn new(group: Group) -> Result<Self> {
        let Group { executor, info, .. } = group;
        let executor = KeptAlive::new(executor, info.ranks)?;
        Ok(Self { executor, info, number: 0, id: 0, released: Vec::new() })
    }

    fn step(&mut self, chunk: Chunk) -> Result<StepOutput> {
        let released = std::mem::take(&mut self.released);
        let plan = StepPlan { number: self.number, chunks: vec![chunk], released };
        self.number += 1;
        let output = self.executor.run(plan)?;
        match output.failed.first() {
            Some((_, reason)) => Err(anyhow!("the model failed: {reason}")),
            None => Ok(output),
        }
    }

    /// Runs `sequence` up to its last token, handing each step's output to `take`.
    fn prefill(
        &mut self,
        sequence: &mut Driven,
        want: Want,
        mut take: impl FnMut(StepOutput) -> Result<()>,
    ) -> Result<()> {
        while sequence.remaining() > 0 {
            let chunk = sequence.chunk(self.info.step_tokens_max, want);
            take(self.step(chunk)?)?;
        }
        Ok(())
    }

    /// A new sequence in the first blocks of the pool, which the one before it no longer has.
    fn begin(&mut self, prompt: &[u32], params: &SamplingParams, new: usize) -> Result<Driven> {
        check(&self.info, prompt, new)?;
        let blocks = (prompt.len() + new).div_ceil(BLOCK_TOKENS);
        let blocks = (0..blocks).map(|block| block as u32).collect();
        let id = self.id;
        self.id += 1;
        self.released.extend(id.checked_sub(1));
        Ok(Driven::new(id, prompt, params.clone(), blocks))
    }

    /// Continues `prompt` until `accept` returns false, `max_tokens` are there or the context ends.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        params: &SamplingParams,
        max_tokens: usize,
        mut accept: impl FnMut(TokenLogprob) -> Result<bool>,
    ) -> Result<()> {
        let mut sequence = self.begin(prompt, params, max_tokens)?;
        for _ in 0..max_tokens {
            let mut sampled = None;
            self.prefill(&mut sequence, Want::Sample, |mut output| {
                sampled = output.sampled.pop();
                Ok(())
            })?;
            let (_, token) = sampled.ok_or_else(|| anyhow!("the group sampled no token"))?;
            sequence.tokens.push(token.token);
            if !accept(token)? {
                break;
            }
        }
        Ok(())
    }

    /// Hands the logits of every prompt position to `take`, some rows [rows, V] at a time.
    pub fn logits(
        &mut self,
        prompt: &[u32],
        params: &SamplingParams,
        mut take: impl FnMut(&[f32]) -> Result<()>,
    ) -> Result<()> {
        let mut sequence = self.begin(prompt, params, 0)?;
        self.prefill(&mut sequence, Want::Logits, |output| {
            output.logits.iter().try_for_each(|(_, rows)| take(rows))
        })
    }

    /// The logprob of every token but the first.
    pub fn score(&mut self, tokens: &[u32], params: &SamplingParams) -> Result<Vec<f32>> {
        let mut sequence = self.begin(tokens, params, 0)?;
        let mut logprobs = Vec::with_capacity(tokens.len());
        self.prefill(&mut sequence, Want::Score { sample: false }, |output| {
            for token in output.scored.into_iter().flat_map(|(_, scored)| scored) {
                logprobs.push(token.logprob.ok_or_else(|| anyhow!("a token has no logprob"))?);
            }
            Ok(())
        })?;
        if logprobs.len() + 1 != tokens.len() {
            bail!("{} of {} tokens were scored", logprobs.len(), tokens.len() - 1);
        }
        Ok(logprobs)
    }
}
