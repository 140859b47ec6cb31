//! A sequence that its caller plans by hand, for what no scheduler plans: the logits of every
//! position, blocks of the caller's choice, preemption at any moment. Tools use it, and tests.

use crate::plan::{Admission, BLOCK_TOKENS, Chunk, SamplingParams, SequenceId, Tokens, Want};

/// One sequence, and how far it has come. The caller puts its chunks into plans, in their order.
#[derive(Clone, Debug)]
pub struct Driven {
    pub id: SequenceId,
    pub params: SamplingParams,
    pub prompt_len: usize,
    /// Prompt and answer; whoever samples puts new ones behind them.
    pub tokens: Vec<u32>,
    pub blocks: Vec<u32>,
    /// Tokens that are in the cache once the chunks so far have run.
    pub computed: usize,
    /// Runners know it.
    pub admitted: bool,
}

impl Driven {
    /// `blocks` must hold every token it will ever have.
    pub fn new(id: SequenceId, prompt: &[u32], params: SamplingParams, blocks: Vec<u32>) -> Self {
        Self {
            id,
            params,
            prompt_len: prompt.len(),
            tokens: prompt.to_vec(),
            blocks,
            computed: 0,
            admitted: false,
        }
    }

    /// At most `max` of the tokens that are not computed; `want` where they are the last. Scores
    /// and logits are wanted of every chunk.
    pub fn chunk(&mut self, max: usize, want: Want) -> Chunk {
        let (start, len) = (self.computed, self.remaining().min(max));
        let end = start + len;
        let ends = end == self.tokens.len();
        let want = match want {
            Want::Sample if !ends => Want::Nothing,
            Want::Score { sample } => Want::Score { sample: sample && ends },
            want => want,
        };
        let admission = (!self.admitted).then(|| {
            Box::new(Admission {
                params: self.params.clone(),
                tokens: self.tokens.clone(),
                prompt_len: self.prompt_len,
            })
        });
        // Runners know all blocks of the chunks before, where there were any.
        let known = if self.admitted { start.div_ceil(BLOCK_TOKENS) } else { 0 };
        self.admitted = true;
        self.computed = end;
        Chunk {
            sequence: self.id,
            start,
            tokens: Tokens::Known(self.tokens[start..end].to_vec()),
            next: self.tokens.get(end).copied(),
            blocks: self.blocks[known..end.div_ceil(BLOCK_TOKENS)].to_vec(),
            want,
            admission,
        }
    }

    /// Tokens that are not computed.
    pub fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Forgets what is computed, as after preemption, and goes on in other blocks.
    pub fn preempt(&mut self, blocks: Vec<u32>) {
        (self.computed, self.admitted, self.blocks) = (0, false, blocks);
    }
}
