//! One request on its way through the engine: its tokens, its blocks, how far it has come.

use crate::{
    EngineError,
    blocks::{BlockPool, Prefix},
    plan::{Admission, BLOCK_TOKENS, Chunk, SamplingParams, SequenceId, TokenLogprob, Want},
};

/// What a caller asks for. The token ids are taken as they are: the engine knows no vocabulary.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// At least one token.
    pub prompt: Vec<u32>,
    /// Tokens that were generated before, elsewhere: the answer goes on after them.
    pub generated: Vec<u32>,
    pub params: SamplingParams,
    /// New tokens, `generated` counted in; the context may end the answer earlier.
    pub max_tokens: usize,
    /// Any of these ends the answer, and is its last token.
    pub stop_ids: Vec<u32>,
    /// Whether the logprob of each prompt token but the first is wanted as well.
    pub score_prompt: bool,
}

impl Request {
    /// Whether it makes sense and can ever run within `context_max` tokens. Errors: `Invalid`,
    /// `TooLong`.
    pub fn check(&self, context_max: usize) -> Result<(), EngineError> {
        if self.prompt.is_empty() {
            return Err(EngineError::Invalid("the prompt is empty; give at least one token"));
        }
        if self.generated.len() > self.max_tokens {
            return Err(EngineError::Invalid("more tokens were generated than max_tokens allows"));
        }
        let prompt = self.prompt.len() + self.generated.len();
        let new = usize::from(self.generated.len() < self.max_tokens);
        if prompt + new > context_max {
            return Err(EngineError::TooLong { prompt, new, context: context_max });
        }
        Ok(())
    }
}

/// Why a sequence ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// A stop id was sampled.
    Stop,
    /// `max_tokens` or the context is reached.
    Length,
    /// This sequence cannot go on; the others can.
    Failed(String),
}

/// What one step brought one sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Update {
    pub sequence: SequenceId,
    /// Prompt tokens that were not computed but found in the cache when the sequence was admitted.
    pub cached_tokens: usize,
    /// Scores of further prompt tokens.
    pub scores: Vec<TokenLogprob>,
    /// New tokens.
    pub tokens: Vec<TokenLogprob>,
    /// Set on a sequence's last update.
    pub end: Option<End>,
}

impl Update {
    pub(crate) fn new(sequence: &Sequence) -> Self {
        Self {
            sequence: sequence.id,
            cached_tokens: sequence.cached_tokens,
            scores: Vec::new(),
            tokens: Vec::new(),
            end: None,
        }
    }

    /// Whether there is nothing to tell.
    pub(crate) fn is_empty(&self) -> bool {
        self.scores.is_empty() && self.tokens.is_empty() && self.end.is_none()
    }

    /// Appends a later update of the same sequence.
    pub fn merge(&mut self, later: Update) {
        self.scores.extend(later.scores);
        self.tokens.extend(later.tokens);
        self.end = later.end;
    }
}

pub(crate) struct Sequence {
    pub id: SequenceId,
    params: SamplingParams,
    /// Prompt and answer.
    tokens: Vec<u32>,
    prompt_len: usize,
    max_tokens: usize,
    stop_ids: Vec<u32>,
    /// Prompt rows whose scores are wanted: each scores the token after it.
    rows_wanted: usize,
    shares: bool,
    /// Tokens whose KV is in `blocks`.
    computed: usize,
    blocks: Vec<u32>,
    /// How many of `blocks` are published, and the prefix that they make.
    published: usize,
    prefix: Prefix,
    /// Prompt rows whose scores the caller has.
    delivered: usize,
    cached_tokens: usize,
    /// Whether the next chunk must introduce the sequence.
    introduce: bool,
    /// Whether a runner has ever met it.
    pub met: bool,
    pub cancelled: bool,
}

impl Sequence {
    /// `shares`: whether its blocks hold what the same tokens would give anybody else.
    pub fn new(id: SequenceId, request: Request, shares: bool) -> Self {
        let prompt_len = request.prompt.len();
        let mut tokens = request.prompt;
        tokens.extend(request.generated);
        Self {
            id,
            params: request.params,
            tokens,
            prompt_len,
            max_tokens: request.max_tokens,
            stop_ids: request.stop_ids,
            rows_wanted: if request.score_prompt { prompt_len - 1 } else { 0 },
            shares,
            computed: 0,
            blocks: Vec::new(),
            published: 0,
            prefix: Prefix::ROOT,
            delivered: 0,
            cached_tokens: 0,
            introduce: true,
            met: false,
            cancelled: false,
        }
    }

    pub fn prompt_len(&self) -> usize {
        self.prompt_len
    }

    /// Prompt tokens found in the cache at the first admission.
    pub fn cached_tokens(&self) -> usize {
        self.cached_tokens
    }

    /// Known tokens that are in the cache.
    pub fn computed(&self) -> usize {
        self.computed
    }

    /// Tokens of the prompt and of the answer so far.
    pub fn known(&self) -> usize {
        self.tokens.len()
    }

    /// Known tokens that are not in the cache yet; one of them in a decode.
    pub fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Blocks that all known tokens need, beyond those at hand.
    pub fn blocks_missing(&self) -> usize {
        self.tokens.len().div_ceil(BLOCK_TOKENS).saturating_sub(self.blocks.len())
    }

    pub fn add_block(&mut self, id: u32) {
        self.blocks.push(id);
    }

    /// Blocks held, in order.
    #[cfg(test)]
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Whether the answer is complete, given the context.
    pub fn end(&self, context_max: usize) -> Option<End> {
        let generated = &self.tokens[self.prompt_len..];
        if generated.last().is_some_and(|last| self.stop_ids.contains(last)) {
            return Some(End::Stop);
        }
        let full = generated.len() >= self.max_tokens || self.tokens.len() >= context_max;
        full.then_some(End::Length)
    }

    fn owes_rows(&self) -> bool {
        self.delivered < self.rows_wanted
    }

    /// Takes over published blocks that hold this sequence's first tokens. The last token is always
    /// computed, since its result is wanted; so is every prompt row that the caller asked for.
    pub fn reuse_prefix(&mut self, pool: &mut BlockPool) {
        if self.owes_rows() || !self.shares {
            return;
        }
        let reusable = (self.tokens.len() - 1) / BLOCK_TOKENS;
        let (blocks, _) = self.tokens.as_chunks::<BLOCK_TOKENS>();
        for tokens in &blocks[..reusable] {
            let Some((id, prefix)) = pool.find(self.prefix, tokens) else { break };
            pool.retain(id);
            self.blocks.push(id);
            self.prefix = prefix;
        }
        self.published = self.blocks.len();
        self.computed = self.blocks.len() * BLOCK_TOKENS;
        if !self.met {
            self.cached_tokens = self.computed.min(self.prompt_len);
        }
    }

    /// Gives all blocks back; what was computed may stay in the cache.
    pub fn free(&mut self, pool: &mut BlockPool) {
        while let Some(id) = self.blocks.pop() {
            pool.release(id);
        }
        self.computed = 0;
        self.published = 0;
        self.prefix = Prefix::ROOT;
        self.introduce = true;
    }

    /// The next at most `tokens_max` tokens to run. Enough blocks are at hand.
    pub fn chunk(&mut self, tokens_max: usize, context_max: usize) -> Chunk {
        let start = self.computed;
        let mut stop = self.tokens.len().min(start + tokens_max);
        if self.owes_rows() {
            stop = stop.min(self.prompt_len);
        }
        let samples = stop == self.tokens.len() && self.end(context_max).is_none();
        let want = match (self.owes_rows(), samples) {
            (true, sample) => Want::Score { sample },
            (false, true) => Want::Sample,
            (false, false) => Want::Nothing,
        };
        let admission = std::mem::take(&mut self.introduce).then(|| {
            self.met = true;
            Box::new(Admission {
                params: self.params.clone(),
                tokens: self.tokens.clone(),
                prompt_len: self.prompt_len,
            })
        });
        Chunk {
            sequence: self.id,
            start,
            tokens: self.tokens[start..stop].to_vec(),
            next: self.tokens.get(stop).copied(),
            blocks: self.blocks.clone(),
            want,
            admission,
        }
    }

    /// Everything before `stop` has run.
    pub fn advance(&mut self, stop: usize) {
        self.computed = stop;
    }

    /// Makes the full blocks computed so far findable.
    pub fn publish(&mut self, pool: &mut BlockPool) {
        if !self.shares {
            return;
        }
        let full = self.computed / BLOCK_TOKENS;
        let (blocks, _) = self.tokens.as_chunks::<BLOCK_TOKENS>();
        while self.published < full {
            let at = self.published;
            (self.blocks[at], self.prefix) =
                pool.publish(self.blocks[at], self.prefix, &blocks[at]);
            self.published += 1;
        }
    }

    pub fn push(&mut self, token: u32) {
        self.tokens.push(token);
    }

    /// Of results for rows `start..start + len`, those that the caller does not have yet.
    pub fn deliver(&mut self, start: usize, len: usize) -> std::ops::Range<usize> {
        let first = (self.delivered - start.min(self.delivered)).min(len);
        let last = self.rows_wanted.saturating_sub(start).clamp(first, len);
        self.delivered = self.delivered.max(start + last);
        first..last
    }
}
