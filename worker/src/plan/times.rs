//! Step times of a group: those of its slowest rank, with the implementation as it is today.

use cuda::CudaConfig;
use kernels::BLOCK_TOKENS;
use model::{Checkpoint, ModelError, RunnerOptions, Shard};
use serde::Serialize;

use super::{Constants, Hardware, Prediction, Stage, Streams, streams::streams};

/// A step or a prompt on the slowest rank.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct StepTime {
    pub batch: usize,
    /// Tokens of each sequence.
    pub context: usize,
    pub bytes: u64,
    pub floor_ms: f64,
    pub predicted_ms: f64,
}

const BATCHES: [usize; 4] = [1, 8, 32, 128];
const CONTEXTS: [usize; 4] = [1024, 8192, 32_768, 131_072];

/// What the ranks of a group read, and where.
pub(crate) struct Times {
    hardware: &'static Hardware,
    ranks: Vec<Streams>,
}

impl Times {
    /// # Errors
    /// As [`Checkpoint::stacks`].
    pub fn new(
        hardware: &'static Hardware,
        cuda: CudaConfig,
        checkpoint: &Checkpoint,
        shards: &[Shard],
    ) -> Result<Self, ModelError> {
        let fp8_products = hardware.fp8_products();
        let of = |shard| streams(cuda, fp8_products, checkpoint, shard);
        Ok(Self { hardware, ranks: shards.iter().map(of).collect::<Result<_, _>>()? })
    }

    fn slowest(&self, of_rank: impl Fn(&Streams) -> Prediction) -> Prediction {
        let none = Prediction { bytes: 0.0, floor_ms: 0.0, predicted_ms: 0.0 };
        self.ranks.iter().map(of_rank).fold(none, slower)
    }

    fn decode(&self, batch: usize, context: usize) -> Prediction {
        self.slowest(|rank| {
            let constants =
                Constants::of(Stage::today(self.hardware), rank.products, batch, rank.ranks);
            rank.decode(self.hardware, &constants, (batch, context))
        })
    }

    /// The longest step that these options allow: the end of a prompt as long as the context, or
    /// a token for every sequence of a full cache.
    pub fn longest_step(&self, options: &RunnerOptions) -> Prediction {
        let RunnerOptions { blocks, step_tokens_max, sequences_max, context_max } = *options;
        let rows = step_tokens_max.min(context_max);
        let cached = context_max - rows;
        let chunk = self
            .slowest(|rank| rank.chunk(self.hardware, Stage::today(self.hardware), (rows, cached)));
        let held = blocks * BLOCK_TOKENS / sequences_max;
        slower(chunk, self.decode(sequences_max, held.clamp(1, context_max)))
    }

    /// Decode steps, and whole prompts, as far as the KV cache holds them.
    pub fn tables(
        &self,
        options: &RunnerOptions,
        kv_tokens: usize,
    ) -> (Vec<StepTime>, Vec<StepTime>) {
        let shortest = CONTEXTS[0].min(options.context_max);
        let longer = CONTEXTS.into_iter().skip(1).filter(|n| *n <= options.context_max);
        let contexts: Vec<usize> = std::iter::once(shortest).chain(longer).collect();
        let batches = || BATCHES.into_iter().filter(|batch| *batch <= options.sequences_max);
        let pairs = contexts.iter().flat_map(|context| batches().map(|batch| (batch, *context)));
        let held = pairs.filter(|(batch, context)| batch * context <= kv_tokens);
        let decode = held
            .map(|(batch, context)| StepTime::of((batch, context), &self.decode(batch, context)));
        let prompts = contexts.iter().filter(|context| **context <= kv_tokens);
        let prefill = prompts.map(|&context| {
            let steps = (context, options.step_tokens_max);
            let prompt = self
                .slowest(|rank| rank.prefill(self.hardware, Stage::today(self.hardware), steps));
            StepTime::of((1, context), &prompt)
        });
        (decode.collect(), prefill.collect())
    }
}

fn slower(a: Prediction, b: Prediction) -> Prediction {
    if a.predicted_ms >= b.predicted_ms { a } else { b }
}

impl StepTime {
    fn of((batch, context): (usize, usize), step: &Prediction) -> Self {
        let Prediction { bytes, floor_ms, predicted_ms } = *step;
        Self { batch, context, bytes: bytes as u64, floor_ms, predicted_ms }
    }
}
