//! The contract between what decides (the scheduler) and what runs (the ranks of a group).
//!
//! A plan says everything that a rank needs for one step; ranks decide nothing. Plans are numbered
//! without gaps, so that a rank that missed one knows. They run in order: whatever a plan wrote to
//! a block is there for the next one, and a block may change hands from one plan to the next.

use serde::{Deserialize, Serialize};

pub use crate::sampling::{Ban, SamplingParams};

/// Tokens in one KV block. `kernels` knows no plans and has the number again; `model` asserts that
/// both are equal.
pub const BLOCK_TOKENS: usize = 16;

/// Plans that may be launched and not finished at one time.
pub const PLANS_IN_FLIGHT_MAX: usize = 2;

/// Identifies a sequence of one engine; never reused.
pub type SequenceId = u64;

/// What a sequence brings along when a runner first meets it, or meets it again after preemption.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Admission {
    pub params: SamplingParams,
    /// The prompt and every token generated so far, in order: what penalties look at. Rank 0 alone
    /// samples and has them; a plan that is sent to other ranks comes without.
    #[serde(skip)]
    pub tokens: Vec<u32>,
    /// How many of `tokens` are the prompt. Dynamic NTK depends on it.
    pub prompt_len: usize,
}

/// Which results of a chunk are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Want {
    /// A prefill chunk that is not the last: only the KV cache.
    Nothing,
    /// The next token, sampled from the last row.
    Sample,
    /// The logprob of each following prompt token, one for each row but the sequence's last known
    /// token; with `sample`, the last row is sampled as well.
    Score { sample: bool },
    /// The raw logits of every row.
    Logits,
}

/// The tokens of a chunk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Tokens {
    /// At least one.
    Known(Vec<u32>),
    /// One: what the sequence's chunk before this one sampled, which was not known yet when this
    /// plan was made. Its own result is `Want::Sample`. Rank 0 has the token; a group of several
    /// ranks refuses such a plan, since the others do not sample.
    LastSampled,
}

impl Tokens {
    pub fn len(&self) -> usize {
        match self {
            Self::Known(tokens) => tokens.len(),
            Self::LastSampled => 1,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Those that the plan itself names.
    pub fn known(&self) -> &[u32] {
        match self {
            Self::Known(tokens) => tokens,
            Self::LastSampled => &[],
        }
    }
}

/// Consecutive tokens of one sequence that run in one step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Chunk {
    pub sequence: SequenceId,
    /// Position of the first of `tokens`; everything before it is in the cache, or written to it by
    /// this very step.
    pub start: usize,
    pub tokens: Tokens,
    /// With `Want::Score`: the token after the last of `tokens`, where it is known.
    pub next: Option<u32>,
    /// The sequence's blocks that are new since its last chunk, in order; all of them with an
    /// admission. Runners keep the table, which then holds enough for [`Chunk::end`] tokens.
    pub blocks: Vec<u32>,
    pub want: Want,
    /// Set on the first chunk after the sequence was admitted or re-admitted.
    pub admission: Option<Box<Admission>>,
}

impl Chunk {
    /// The position after the last token.
    pub fn end(&self) -> usize {
        self.start.saturating_add(self.tokens.len())
    }
}

/// One step of the whole group.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepPlan {
    /// 0, 1, 2 … without gaps.
    pub number: u64,
    pub chunks: Vec<Chunk>,
    /// Sequences that ended since the last plan: forget what is kept for them.
    pub released: Vec<SequenceId>,
}

/// One token and how likely the model found it (natural logarithms of the unmodified distribution).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    pub token: u32,
    /// `None` when no logprobs were asked for.
    pub logprob: Option<f32>,
    /// The likeliest tokens, best first.
    pub top: Vec<(u32, f32)>,
}

/// What one step produced. Only rank 0's is looked at.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepOutput {
    pub number: u64,
    /// One for each chunk that asked for a sample and got one, in the plan's order.
    pub sampled: Vec<(SequenceId, TokenLogprob)>,
    /// For `Want::Score`: the chunk's following tokens, in the plan's order.
    pub scored: Vec<(SequenceId, Vec<TokenLogprob>)>,
    /// For `Want::Logits`: [rows, vocabulary] row-major.
    pub logits: Vec<(SequenceId, Vec<f32>)>,
    /// Sequences that cannot go on, and why, e.g. logits that are no numbers. They have no other
    /// entry in this output; the group itself is sound.
    pub failed: Vec<(SequenceId, String)>,
}

/// Why a group can run no further plan. Every sequence in it is lost to this group.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the group failed: {0}")]
pub struct ExecutorError(pub String);

/// Runs plans somewhere, one after another in the order of their launch.
pub trait Executor: Send {
    /// How many plans should be in flight while there is work, at most [`PLANS_IN_FLIGHT_MAX`]: 2
    /// where a step goes on by itself while the next one is planned, 1 where it runs in `finish`.
    /// Plans launched beyond that are refused.
    fn depth(&self) -> usize;
    /// Starts a plan, or puts it behind the one in flight; does not wait for either.
    fn launch(&mut self, plan: StepPlan) -> Result<(), ExecutorError>;
    /// Waits, up to the executor's own deadline, for the oldest plan in flight.
    fn finish(&mut self) -> Result<StepOutput, ExecutorError>;
    /// Keeps waiting ranks from taking the leader for lost; called at least once a second while
    /// nothing is in flight.
    fn idle(&mut self) -> Result<(), ExecutorError>;
    /// Becomes usable again after a failure, with nothing left of the plans before; ends early once
    /// it is not `wanted` any more.
    ///
    /// # Errors
    /// It cannot, and is of no further use.
    fn recover(&mut self, _wanted: &dyn Fn() -> bool) -> Result<(), ExecutorError> {
        Err(ExecutorError("it cannot be made anew".into()))
    }
}
