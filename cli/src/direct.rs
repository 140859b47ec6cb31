//! One sequence after another, straight through a group: for tools that need no server.

mod kept_alive;

use anyhow::{Result, anyhow, bail};
use engine::plan::{
    Admission, BLOCK_TOKENS, Chunk, SamplingParams, StepOutput, StepPlan, TokenLogprob, Tokens,
    Want,
};
use kept_alive::KeptAlive;
use worker::{Group, ModelInfo};

/// A group with nobody else on it.
pub struct Direct {
    executor: KeptAlive,
    pub info: ModelInfo,
    /// The next plan's.
    number: u64,
    /// The running sequence's, and the last one's in between.
    sequence: u64,
    released: Vec<u64>,
}

impl Direct {
    /// From here on the other ranks know that this one lives.
    pub fn new(group: Group) -> Result<Self> {
        let Group { executor, info } = group;
        let executor = KeptAlive::new(executor, info.ranks)?;
        Ok(Self { executor, info, number: 0, sequence: 0, released: Vec::new() })
    }

    /// Refuses what the group cannot run: unknown ids, too many tokens.
    pub fn check(&self, prompt: &[u32], new: usize) -> Result<()> {
        let (vocab, context) = (self.info.vocab, self.info.context_max);
        if prompt.is_empty() {
            bail!("the prompt has no tokens");
        }
        if let Some(id) = prompt.iter().find(|&&id| id as usize >= vocab) {
            bail!("token id {id} does not exist; ids are below {vocab}");
        }
        let blocks = (prompt.len() + new).div_ceil(BLOCK_TOKENS);
        if prompt.len() + new > context || blocks > self.info.blocks {
            let most = context.min(self.info.blocks * BLOCK_TOKENS);
            bail!(
                "a prompt of {} + {new} new tokens exceeds the context of {most}; raise --context \
                 or --kv-memory, or shorten it",
                prompt.len()
            );
        }
        Ok(())
    }

    /// Ends the running sequence and begins one of these tokens; the sequence runs with `step`s.
    fn begin(&mut self, params: &SamplingParams, tokens: &[u32]) -> Box<Admission> {
        if self.sequence > 0 {
            self.released.push(self.sequence);
        }
        self.sequence += 1;
        let (tokens, prompt_len) = (tokens.to_vec(), tokens.len());
        Box::new(Admission { params: params.clone(), tokens, prompt_len })
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

    /// Runs `tokens` from the beginning of a new sequence, handing each step's output to `take`.
    /// `want` is told the rest's length after each chunk.
    fn prefill(
        &mut self,
        tokens: &[u32],
        params: &SamplingParams,
        want: impl Fn(usize) -> Want,
        mut take: impl FnMut(StepOutput) -> Result<()>,
    ) -> Result<()> {
        let mut admission = Some(self.begin(params, tokens));
        let mut start = 0;
        for part in tokens.chunks(self.info.step_tokens_max) {
            let end = start + part.len();
            let output = self.step(Chunk {
                sequence: self.sequence,
                start,
                tokens: Tokens::Known(part.to_vec()),
                next: tokens.get(end).copied(),
                blocks: blocks(start, end),
                want: want(tokens.len() - end),
                admission: admission.take(),
            })?;
            take(output)?;
            start = end;
        }
        Ok(())
    }

    /// Continues `prompt` until `accept` returns false, `max_tokens` are there or the context ends.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        params: &SamplingParams,
        max_tokens: usize,
        mut accept: impl FnMut(TokenLogprob) -> Result<bool>,
    ) -> Result<()> {
        self.check(prompt, max_tokens)?;
        if max_tokens == 0 {
            return Ok(());
        }
        let mut sampled = None;
        let want = |left| if left == 0 { Want::Sample } else { Want::Nothing };
        self.prefill(prompt, params, want, |mut output| {
            sampled = output.sampled.pop();
            Ok(())
        })?;
        for start in prompt.len().. {
            let (_, token) = sampled.ok_or_else(|| anyhow!("the group sampled no token"))?;
            let id = token.token;
            if !accept(token)? || start + 1 - prompt.len() >= max_tokens {
                return Ok(());
            }
            let mut output = self.step(Chunk {
                sequence: self.sequence,
                start,
                tokens: Tokens::Known(vec![id]),
                next: None,
                blocks: blocks(start, start + 1),
                want: Want::Sample,
                admission: None,
            })?;
            sampled = output.sampled.pop();
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
        self.check(prompt, 0)?;
        self.prefill(
            prompt,
            params,
            |_| Want::Logits,
            |output| output.logits.iter().try_for_each(|(_, rows)| take(rows)),
        )
    }

    /// The logprob of every token but the first.
    pub fn score(&mut self, tokens: &[u32], params: &SamplingParams) -> Result<Vec<f32>> {
        self.check(tokens, 0)?;
        let mut logprobs = Vec::with_capacity(tokens.len());
        self.prefill(
            tokens,
            params,
            |_| Want::Score { sample: false },
            |output| {
                for (_, scored) in output.scored {
                    for token in scored {
                        let logprob = token.logprob;
                        logprobs.push(logprob.ok_or_else(|| anyhow!("a token has no logprob"))?);
                    }
                }
                Ok(())
            },
        )?;
        if logprobs.len() + 1 != tokens.len() {
            bail!("{} of {} tokens were scored", logprobs.len(), tokens.len() - 1);
        }
        Ok(logprobs)
    }
}

/// Of the pool's first blocks, enough for `end` tokens, those beyond what `start` tokens have.
fn blocks(start: usize, end: usize) -> Vec<u32> {
    let new = start.div_ceil(BLOCK_TOKENS)..end.div_ceil(BLOCK_TOKENS);
    new.map(|block| block as u32).collect()
}
