//! Which worker a sequence goes to. Pure: no clock, no I/O; a decision follows from the calls so
//! far.

mod least_loaded;
mod prefix_affinity;

pub use least_loaded::LeastLoaded;
pub use prefix_affinity::PrefixAffinity;

use engine::{
    blocks::{NAMED_BLOCKS_MAX, prefix_name},
    plan::BLOCK_TOKENS,
};
use std::hash::{DefaultHasher, Hash, Hasher};

/// What a policy knows of a sequence.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteKey {
    /// A hash of the model's name.
    pub model: u64,
    /// The name of each leading full block of the prompt, as the workers' caches are cut and named;
    /// each covers everything before it.
    pub blocks: Vec<u64>,
}

impl RouteKey {
    /// The key of a prompt to a model: its first 128 full blocks.
    pub fn new(model: &str, prompt: &[u32]) -> Self {
        let mut hasher = DefaultHasher::new();
        model.hash(&mut hasher);
        let (blocks, _) = prompt.as_chunks::<BLOCK_TOKENS>();
        let names = blocks.iter().take(NAMED_BLOCKS_MAX).scan(0, |name, block| {
            *name = prefix_name(*name, block);
            Some(*name)
        });
        Self { model: hasher.finish(), blocks: names.collect() }
    }
}

/// What a policy knows of a worker that could take the sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Names the worker for as long as it lives.
    pub id: u64,
    /// Sequences it runs or holds waiting, as well as the router knows.
    pub load: usize,
    /// Blocks at the beginning of the prompt that it says it has cached.
    pub cached: usize,
}

/// Chooses among targets that are all able to take the sequence.
pub trait RoutingPolicy: Send + Sync + 'static {
    /// The index of the chosen target; `None` only where there is none.
    fn pick(&self, key: &RouteKey, targets: &[Target]) -> Option<usize>;
}
