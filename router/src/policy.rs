//! Which worker a sequence goes to. Pure: no clock, no I/O; a decision follows from the calls so
//! far.

mod least_loaded;
mod prefix_affinity;

pub use least_loaded::LeastLoaded;
pub use prefix_affinity::PrefixAffinity;

use engine::plan::BLOCK_TOKENS;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Blocks of a prompt that the key looks at.
const KEY_BLOCKS_MAX: usize = 128;

/// What a policy knows of a sequence.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteKey {
    /// One hash for each leading full block of the prompt, as the workers' caches are cut; each
    /// covers everything before it.
    pub blocks: Vec<u64>,
}

impl RouteKey {
    /// The key of a prompt to a model: the first 128 full blocks, hash-chained.
    pub fn new(model: &str, prompt: &[u32]) -> Self {
        let mut hasher = DefaultHasher::new();
        model.hash(&mut hasher);
        let blocks = prompt
            .chunks_exact(BLOCK_TOKENS)
            .take(KEY_BLOCKS_MAX)
            .map(|block| {
                block.hash(&mut hasher);
                hasher.finish()
            })
            .collect();
        Self { blocks }
    }
}

/// What a policy knows of a worker that could take the sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Names the worker for as long as it lives.
    pub id: u64,
    /// Sequences it runs or holds waiting, as well as the router knows.
    pub load: usize,
}

/// Chooses among targets that are all able to take the sequence.
pub trait RoutingPolicy: Send + Sync + 'static {
    /// The index of the chosen target; `None` only where there is none.
    fn pick(&self, key: &RouteKey, targets: &[Target]) -> Option<usize>;
}
