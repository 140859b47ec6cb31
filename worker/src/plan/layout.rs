//! Shares the devices' memory out: weights and scratch, then as many KV blocks as the rest holds.
//!
//! Pure arithmetic: what a rank takes and what a device has comes from the caller.

use std::ops::Range;

use kernels::BLOCK_TOKENS;
use model::RunnerOptions;

use super::Hardware;

/// What one rank holds whatever the length of its sequences, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RankCost {
    /// As the device holds them.
    pub weights: u64,
    /// One KV block of every layer.
    pub block: u64,
    /// Of a workspace that products share with attention.
    pub products: usize,
}

/// Memory of one device, and which ranks take from it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Place {
    pub ranks: Range<usize>,
    /// For people.
    pub name: String,
    /// Where it is a card that is known.
    pub hardware: Option<&'static Hardware>,
    /// As `cuda::Facts::fp8_products`.
    pub fp8_products: bool,
    /// `u64::MAX` where the system does not say.
    pub bytes: u64,
    /// Where the figure comes from, for messages.
    pub source: String,
}

/// The default KV pool's part of the memory that weights and scratch leave.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KvShare {
    /// One of so many parts.
    pub part: u64,
    /// Contexts that are enough.
    pub contexts_max: u64,
}

/// What is asked for. `None` is what fits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    pub context_max: Option<usize>,
    /// Bytes of the KV pool, all ranks together.
    pub kv_memory: Option<u64>,
    pub model_context: usize,
    pub step_tokens_max: usize,
    pub sequences_max: usize,
    pub kv_share: KvShare,
}

/// A rank's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RankMemory {
    pub weights: u64,
    pub scratch: u64,
    pub kv: u64,
}

impl RankMemory {
    pub fn sum(self) -> u64 {
        self.weights.saturating_add(self.scratch).saturating_add(self.kv)
    }
}

/// Who gets how much.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    pub options: RunnerOptions,
    pub ranks: Vec<RankMemory>,
    /// The blocks that there is room for: fewer than those of `options` where these do not fit.
    pub blocks_fit: u64,
}

impl Layout {
    /// The first device that has less than its ranks take.
    pub fn overfull<'a>(&self, places: &'a [Place]) -> Option<&'a Place> {
        places.iter().find(|place| self.taken(place) > place.bytes)
    }

    /// By the ranks of one device.
    pub fn taken(&self, place: &Place) -> u64 {
        self.ranks[place.ranks.clone()].iter().fold(0, |sum, rank| rank.sum().saturating_add(sum))
    }
}

/// Tokens that a step of cards may have where nobody says, the best first: matrices are unpacked
/// for each step of more than a few rows, and read again, which only many rows outweigh.
pub(crate) const CARD_STEPS: &[usize] = &[4096, 2048, 1024, 512];

/// The first of `sizes` of steps that costs little: the context is that of the last, and the KV
/// pool at least seven eighths of it.
///
/// # Errors
/// Those of `lay_out`.
pub(crate) fn step_tokens<E>(
    sizes: &[usize],
    lay_out: impl Fn(usize) -> Result<Layout, E>,
) -> Result<usize, E> {
    let Some((&least, larger)) = sizes.split_last().filter(|(_, larger)| !larger.is_empty()) else {
        return Ok(sizes.first().copied().unwrap_or(1));
    };
    let (held, pool) = {
        let layout = lay_out(least)?;
        (layout.options.context_max, layout.blocks_fit)
    };
    for &size in larger {
        let layout = lay_out(size)?;
        let blocks = layout.blocks_fit.min(pool);
        let is_cheap = blocks >= pool - pool / 8 && blocks >= layout.options.blocks as u64;
        if layout.options.context_max == held && is_cheap {
            return Ok(size);
        }
    }
    Ok(least)
}

/// Blocks have indices of 32 bits for each of their tokens.
const BLOCKS_MAX: u64 = i32::MAX as u64 / BLOCK_TOKENS as u64;

pub(crate) fn blocks_of(tokens: usize) -> u64 {
    tokens.div_ceil(BLOCK_TOKENS) as u64
}

/// Shares `places` out between ranks that cost as `costs`; `scratch` tells a rank's bytes beside
/// weights and KV cache.
pub(crate) fn lay_out(
    wanted: &Wanted,
    places: &[Place],
    costs: &[RankCost],
    scratch: impl Fn(usize, &RunnerOptions) -> u64,
) -> Layout {
    let options = |blocks: u64, context_max: usize| RunnerOptions {
        blocks: blocks as usize,
        step_tokens_max: wanted.step_tokens_max,
        sequences_max: wanted.sequences_max,
        context_max,
    };
    // Blocks that leave room for sequences of this length.
    let fit = |context: usize| {
        let options = options(1, context);
        let of = |place: &Place| {
            let ranks = || place.ranks.clone();
            let reserved = ranks().fold(0u64, |sum, rank| {
                let scratch = scratch(rank, &options);
                sum.saturating_add(costs[rank].weights).saturating_add(scratch)
            });
            let block: u64 = ranks().map(|rank| costs[rank].block).sum();
            place.bytes.saturating_sub(reserved) / wanted.kv_share.part / block.max(1)
        };
        let fit = places.iter().map(of).min().unwrap_or(u64::MAX);
        fit.min(BLOCKS_MAX)
    };
    let all_blocks: u64 = costs.iter().map(|cost| cost.block).sum();
    let context_wanted = wanted.context_max.unwrap_or(wanted.model_context);
    let enough = blocks_of(context_wanted).saturating_mul(wanted.kv_share.contexts_max);
    let given = wanted.kv_memory.map(|bytes| (bytes / all_blocks.max(1)).min(BLOCKS_MAX));
    let held = |context| given.unwrap_or_else(|| fit(context).min(enough));
    let context = wanted.context_max.unwrap_or_else(|| longest(wanted.model_context, held));
    let blocks = match (given, wanted.context_max) {
        (Some(blocks), _) => blocks,
        // Who asks for a context gets it, or hears why not.
        (None, Some(context)) => held(context).max(blocks_of(context)).min(BLOCKS_MAX),
        (None, None) => held(context).max(1),
    };
    let options = options(blocks, context);
    let rank = |(rank, cost): (usize, &RankCost)| RankMemory {
        weights: cost.weights,
        scratch: scratch(rank, &options),
        kv: blocks * cost.block,
    };
    let ranks = costs.iter().enumerate().map(rank).collect();
    Layout { options, ranks, blocks_fit: fit(context) }
}

/// The longest context up to `most` for which the pool beside it holds one sequence: longer ones
/// take more scratch, and leave fewer blocks.
fn longest(most: usize, held: impl Fn(usize) -> u64) -> usize {
    let holds = |context: usize| held(context) >= blocks_of(context);
    if holds(most) {
        return most;
    }
    // In blocks: the first holds, or nothing does; the second does not.
    let (mut shorter, mut longer) = (1, most.div_ceil(BLOCK_TOKENS));
    while longer - shorter > 1 {
        let middle = shorter.midpoint(longer);
        match holds(middle * BLOCK_TOKENS) {
            true => shorter = middle,
            false => longer = middle,
        }
    }
    (shorter * BLOCK_TOKENS).min(most)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: Wanted = Wanted {
        context_max: None,
        kv_memory: None,
        model_context: 160,
        step_tokens_max: 8,
        sequences_max: 4,
        kv_share: KvShare { part: 1, contexts_max: u64::MAX },
    };
    const COST: RankCost = RankCost { weights: 1000, block: 10, products: 0 };

    fn place(ranks: Range<usize>, bytes: u64) -> Place {
        let (name, source) = ("a card".into(), "free".into());
        Place { ranks, name, hardware: None, fp8_products: false, bytes, source }
    }

    /// A byte for each token of context.
    fn scratch(_rank: usize, options: &RunnerOptions) -> u64 {
        options.context_max as u64
    }

    #[test]
    fn the_pool_takes_what_is_left_on_the_fullest_device() {
        let places = [place(0..1, 2000), place(1..2, 1500)];
        let layout = lay_out(&WANTED, &places, &[COST; 2], scratch);
        // 500 less 160 of scratch.
        assert_eq!((layout.options.blocks, layout.options.context_max), (34, 160));
        assert_eq!(layout.ranks, [RankMemory { weights: 1000, scratch: 160, kv: 340 }; 2]);
        assert_eq!(layout.overfull(&places), None);
        // Both on one card.
        let shared = [place(0..2, 3000)];
        let layout = lay_out(&WANTED, &shared, &[COST; 2], scratch);
        assert_eq!(layout.options.blocks, (1000 - 320) / 20);
        assert_eq!(layout.taken(&shared[0]), 3000);
    }

    #[test]
    fn a_pool_that_holds_no_whole_context_shortens_it() {
        // 4 blocks of 10 and 64 of scratch are 104; 5 blocks and 80 are 130.
        let layout = lay_out(&WANTED, &[place(0..1, 1120)], &[COST], scratch);
        assert_eq!((layout.options.context_max, layout.options.blocks), (64, 5));
        let given = Wanted { kv_memory: Some(39), ..WANTED };
        let layout = lay_out(&given, &[place(0..1, 5000)], &[COST], scratch);
        assert_eq!((layout.options.context_max, layout.options.blocks), (48, 3));
    }

    #[test]
    fn what_is_asked_for_is_laid_out_even_where_it_does_not_fit() {
        let places = [place(0..1, 1120)];
        let asked = Wanted { context_max: Some(160), ..WANTED };
        let layout = lay_out(&asked, &places, &[COST], scratch);
        assert_eq!((layout.options.blocks, layout.blocks_fit), (10, 0));
        assert_eq!(layout.overfull(&places), Some(&places[0]));
        // Nor does one block beside weights that are too large.
        let small = [place(0..1, 900)];
        let layout = lay_out(&WANTED, &small, &[COST], scratch);
        assert_eq!((layout.options.blocks, layout.blocks_fit), (1, 0));
        assert_eq!(layout.overfull(&small), Some(&small[0]));
    }

    #[test]
    fn a_share_of_the_rest_is_bounded_by_contexts() {
        let kv_share = KvShare { part: 4, contexts_max: 2 };
        let wanted = Wanted { kv_share, ..WANTED };
        let layout = lay_out(&wanted, &[place(0..1, 1_000_000)], &[COST], scratch);
        assert_eq!(layout.options.blocks, 20);
        let layout = lay_out(&wanted, &[place(0..1, 1760)], &[COST], scratch);
        assert_eq!(layout.options.blocks, 15);
        let unknown = lay_out(&wanted, &[], &[COST], scratch);
        assert_eq!(unknown.options.blocks, 20);
    }
}
