//! One request on its way through the engine: its tokens, its blocks, how far it has come.

use crate::{
    EngineError,
    blocks::{BlockPool, Prefix},
    plan::{
        Admission, BLOCK_TOKENS, Chunk, SamplingParams, SequenceId, TokenLogprob, Tokens, Want,
    },
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

/// A sequence is planned ahead of its results: what is planned has run before anything that is
/// planned later, so blocks and positions follow the plans, tokens the results.
pub(crate) struct Sequence {
    pub id: SequenceId,
    params: SamplingParams,
    /// Prompt and answer, as far as known.
    tokens: Vec<u32>,
    prompt_len: usize,
    /// The answer ends where prompt and answer are so many tokens.
    tokens_max: usize,
    stop_ids: Vec<u32>,
    /// Prompt rows whose scores are wanted: each scores the token after it.
    rows_wanted: usize,
    shares: bool,
    /// Tokens whose KV is in `blocks` once all plans have run.
    planned: usize,
    /// Of those, the ones whose plans are done.
    computed: usize,
    /// Tokens that plans in flight sample: they will follow `tokens`.
    sampling: usize,
    blocks: Vec<u32>,
    /// How many of `blocks` the runners have; none before the sequence is introduced to them.
    told: usize,
    /// How many of `blocks` can be found, and the prefix that they make.
    published: usize,
    prefix: Prefix,
    /// Prompt rows whose scores the caller has.
    delivered: usize,
    cached_tokens: usize,
    /// Whether a runner has ever met it.
    pub met: bool,
    pub cancelled: bool,
}

impl Sequence {
    /// `shares`: whether its blocks hold what the same tokens would give anybody else.
    pub fn new(id: SequenceId, request: Request, shares: bool, context_max: usize) -> Self {
        let prompt_len = request.prompt.len();
        let mut tokens = request.prompt;
        tokens.extend(request.generated);
        Self {
            id,
            params: request.params,
            tokens,
            prompt_len,
            tokens_max: prompt_len.saturating_add(request.max_tokens).min(context_max),
            stop_ids: request.stop_ids,
            rows_wanted: if request.score_prompt { prompt_len - 1 } else { 0 },
            shares,
            planned: 0,
            computed: 0,
            sampling: 0,
            blocks: Vec::new(),
            told: 0,
            published: 0,
            prefix: Prefix::ROOT,
            delivered: 0,
            cached_tokens: 0,
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

    /// Tokens that are in the cache, or will be once all plans have run.
    pub fn planned(&self) -> usize {
        self.planned
    }

    /// Tokens that are in the cache.
    pub fn computed(&self) -> usize {
        self.computed
    }

    /// Tokens of the prompt and of the answer so far.
    pub fn known(&self) -> usize {
        self.tokens.len()
    }

    /// Whether a plan in flight samples its next token.
    pub fn is_sampling(&self) -> bool {
        self.sampling > 0
    }

    /// Tokens that can be planned: the known ones, and the one that a plan in flight samples unless
    /// that is the answer's last.
    fn reach(&self) -> usize {
        let expected = self.tokens.len() + self.sampling;
        if expected < self.tokens_max { expected } else { self.tokens.len() }
    }

    /// Tokens that can be planned and are not yet; one of them in a decode.
    pub fn remaining(&self) -> usize {
        self.reach().saturating_sub(self.planned)
    }

    /// Blocks that all tokens which can be planned need, beyond those at hand.
    pub fn blocks_missing(&self) -> usize {
        self.reach().div_ceil(BLOCK_TOKENS).saturating_sub(self.blocks.len())
    }

    pub fn add_block(&mut self, id: u32) {
        self.blocks.push(id);
    }

    /// Blocks held, in order.
    #[cfg(test)]
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Whether the answer is complete with the tokens that are known.
    pub fn end(&self) -> Option<End> {
        let generated = &self.tokens[self.prompt_len..];
        if generated.last().is_some_and(|last| self.stop_ids.contains(last)) {
            return Some(End::Stop);
        }
        (self.tokens.len() >= self.tokens_max).then_some(End::Length)
    }

    /// Takes over published blocks that hold this sequence's first tokens. The last token is always
    /// computed, since its result is wanted; so is every prompt row that the caller asked for.
    pub fn reuse_prefix(&mut self, pool: &mut BlockPool) {
        if self.delivered < self.rows_wanted || !self.shares {
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
        self.planned = self.blocks.len() * BLOCK_TOKENS;
        self.computed = self.planned;
        if !self.met {
            self.cached_tokens = self.planned.min(self.prompt_len);
        }
    }

    /// Gives all blocks back; what was computed may stay in the cache. Plans in flight may still
    /// write to them: before any that is made from now on, for whomever, runs.
    pub fn free(&mut self, pool: &mut BlockPool) {
        while let Some(id) = self.blocks.pop() {
            pool.release(id);
        }
        (self.planned, self.computed) = (0, 0);
        (self.told, self.published) = (0, 0);
        self.prefix = Prefix::ROOT;
    }

    /// The next at most `tokens_max` tokens to run. Enough blocks are at hand; those that become
    /// full can be found from now on.
    pub fn chunk(&mut self, tokens_max: usize, pool: &mut BlockPool) -> Chunk {
        let start = self.planned;
        let mut end = self.reach().min(start + tokens_max);
        let scores = self.delivered.max(start) < self.rows_wanted;
        if scores {
            end = end.min(self.prompt_len);
        }
        // A sample is planned behind all known tokens only: no chunk holds both kinds.
        let tokens = match self.tokens.get(start..end) {
            Some(known) => Tokens::Known(known.to_vec()),
            None => Tokens::LastSampled,
        };
        let sample = end == self.reach() && self.end().is_none();
        let want = match (scores, sample) {
            (true, sample) => Want::Score { sample },
            (false, true) => Want::Sample,
            (false, false) => Want::Nothing,
        };
        let next = self.tokens.get(end).copied();
        self.planned = end;
        self.sampling += usize::from(sample);
        self.publish(pool);
        let admission = (self.told == 0).then(|| self.introduction());
        let blocks = self.blocks[self.told..].to_vec();
        self.told = self.blocks.len();
        Chunk { sequence: self.id, start, tokens, next, blocks, want, admission }
    }

    fn introduction(&mut self) -> Box<Admission> {
        self.met = true;
        let (params, tokens) = (self.params.clone(), self.tokens.clone());
        Box::new(Admission { params, tokens, prompt_len: self.prompt_len })
    }

    /// Everything before `end` has run, as far as it is in the blocks that the sequence has now.
    pub fn advance(&mut self, end: usize) {
        self.computed = end.min(self.planned);
    }

    /// Makes the full blocks of known tokens findable that are computed once all plans have run.
    fn publish(&mut self, pool: &mut BlockPool) {
        if !self.shares {
            return;
        }
        let full = self.planned.min(self.tokens.len()) / BLOCK_TOKENS;
        let (blocks, _) = self.tokens.as_chunks::<BLOCK_TOKENS>();
        while self.published < full {
            let at = self.published;
            self.prefix = pool.publish(self.blocks[at], self.prefix, &blocks[at]);
            self.published += 1;
        }
    }

    /// The chunk from position `start` on failed: nobody is to find what it computed.
    pub fn withdraw(&self, start: usize, pool: &mut BlockPool) {
        if !self.shares {
            return;
        }
        let mut parent = Prefix::ROOT;
        let mut found = Vec::new();
        for tokens in self.tokens.as_chunks::<BLOCK_TOKENS>().0 {
            let Some((id, prefix)) = pool.find(parent, tokens) else { break };
            found.push(id);
            parent = prefix;
        }
        for &id in found.iter().skip(start / BLOCK_TOKENS) {
            pool.withdraw(id);
        }
    }

    /// A plan sampled `token`.
    pub fn push(&mut self, token: u32, pool: &mut BlockPool) {
        self.tokens.push(token);
        self.sampling = self.sampling.saturating_sub(1);
        self.publish(pool);
    }

    /// Of results for rows `start..start + len`, those that the caller does not have yet.
    pub fn deliver(&mut self, start: usize, len: usize) -> std::ops::Range<usize> {
        let first = (self.delivered - start.min(self.delivered)).min(len);
        let last = self.rows_wanted.saturating_sub(start).clamp(first, len);
        self.delivered = self.delivered.max(start + last);
        first..last
    }
}
