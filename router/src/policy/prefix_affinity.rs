//! Sends prompts that begin alike to the same target, whose cache then holds the beginning.
//!
//! Affinity yields to balance: a target well above the least loaded one is passed over. The index
//! is two generations of bounded maps: when the young one is full it becomes the old one, and what
//! was not touched since is forgotten.

use super::{LeastLoaded, RouteKey, RoutingPolicy, Target};
use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

/// Entries of one generation: 16 bytes each, so both stay within a few megabytes.
const GENERATION_MAX: usize = 1 << 16;
/// Sequences by which an affine target may exceed the least loaded one.
const LOAD_SLACK: usize = 8;

#[derive(Debug, Default)]
struct Index {
    young: HashMap<u64, u64>,
    old: HashMap<u64, u64>,
}

/// Prefers the target that last saw the longest beginning of the prompt.
#[derive(Debug)]
pub struct PrefixAffinity {
    index: Mutex<Index>,
    generation_max: usize,
}

impl Default for PrefixAffinity {
    fn default() -> Self {
        Self { index: Mutex::default(), generation_max: GENERATION_MAX }
    }
}

impl Index {
    fn insert(&mut self, block: u64, target: u64, generation_max: usize) {
        if self.young.len() >= generation_max && !self.young.contains_key(&block) {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(block, target);
    }

    /// The target of the longest known beginning that is among `targets`.
    fn longest(&self, key: &RouteKey, targets: &[Target]) -> Option<usize> {
        key.blocks.iter().rev().find_map(|block| {
            let id = self.young.get(block).or_else(|| self.old.get(block))?;
            targets.iter().position(|target| target.id == *id)
        })
    }
}

impl RoutingPolicy for PrefixAffinity {
    fn pick(&self, key: &RouteKey, targets: &[Target]) -> Option<usize> {
        let least = LeastLoaded.pick(key, targets)?;
        let mut index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
        let chosen = index
            .longest(key, targets)
            .filter(|&at| targets[at].load <= targets[least].load + LOAD_SLACK)
            .unwrap_or(least);
        for &block in &key.blocks {
            index.insert(block, targets[chosen].id, self.generation_max);
        }
        Some(chosen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::plan::BLOCK_TOKENS;

    fn key(words: &[u32]) -> RouteKey {
        let prompt: Vec<u32> = words.iter().flat_map(|&word| [word; BLOCK_TOKENS]).collect();
        RouteKey::new("m", &prompt)
    }

    fn targets(loads: [usize; 3]) -> [Target; 3] {
        [0, 1, 2].map(|at| Target { id: at as u64 + 10, load: loads[at] })
    }

    #[test]
    fn a_shared_beginning_returns_to_its_target_until_that_is_overloaded() {
        let policy = PrefixAffinity::default();
        assert_eq!(policy.pick(&key(&[1, 2]), &targets([5, 0, 5])), Some(1));
        assert_eq!(policy.pick(&key(&[1, 3]), &targets([0, 8, 0])), Some(1));
        assert_eq!(policy.pick(&key(&[1, 4]), &targets([0, 9, 0])), Some(0));
        assert_eq!(policy.pick(&key(&[7, 2]), &targets([1, 0, 0])), Some(1));
    }

    #[test]
    fn a_target_that_left_is_forgotten() {
        let policy = PrefixAffinity::default();
        assert_eq!(policy.pick(&key(&[1]), &targets([0, 0, 0])), Some(0));
        assert_eq!(policy.pick(&key(&[1]), &targets([9, 3, 0])[1..]), Some(1));
    }

    #[test]
    fn the_index_stays_bounded_and_keeps_what_is_in_use() {
        let policy = PrefixAffinity { generation_max: 8, ..PrefixAffinity::default() };
        assert_eq!(policy.pick(&key(&[1]), &targets([1, 0, 1])), Some(1));
        for word in 100..1000 {
            policy.pick(&key(&[word]), &targets([0, 1, 1]));
            assert_eq!(policy.pick(&key(&[1]), &targets([0, 1, 1])), Some(1));
        }
        let index = policy.index.lock().unwrap();
        assert!(index.young.len() <= 8 && index.old.len() <= 8);
    }

    #[test]
    fn keys_chain_and_differ_by_model() {
        assert_eq!(key(&[1, 2]).blocks[0], key(&[1, 9]).blocks[0]);
        assert_ne!(key(&[1, 2]).blocks[1], key(&[9, 2]).blocks[1]);
        assert_ne!(RouteKey::new("a", &[1; BLOCK_TOKENS]), RouteKey::new("b", &[1; BLOCK_TOKENS]));
        assert!(RouteKey::new("a", &[1; BLOCK_TOKENS - 1]).blocks.is_empty());
        assert_eq!(RouteKey::new("a", &[1; 100_000]).blocks.len(), 128);
    }
}
