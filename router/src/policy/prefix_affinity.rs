//! Sends a prompt to the target that has most of its beginning cached, or soon will have.
//!
//! Targets say what they have cached. What was sent there since is remembered in an index of two
//! generations of bounded maps: when the young one is full it becomes the old one, and what was not
//! touched since is forgotten. Affinity yields to balance: a target well above the least loaded one
//! is passed over.

use super::{LeastLoaded, RouteKey, RoutingPolicy, Target};
use std::{
    cmp::Reverse,
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

/// Prefers the target that has, or last was sent, the longest beginning of the prompt.
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

    /// The target that was sent the longest beginning, of those among `targets`, and its blocks.
    fn longest(&self, key: &RouteKey, targets: &[Target]) -> Option<(usize, usize)> {
        (0..key.blocks.len()).rev().find_map(|at| {
            let block = entry(key, at);
            let id = self.young.get(&block).or_else(|| self.old.get(&block))?;
            let target = targets.iter().position(|target| target.id == *id)?;
            Some((target, at + 1))
        })
    }
}

/// Where the index has a beginning: models may share a tokenizer, and prompts.
fn entry(key: &RouteKey, at: usize) -> u64 {
    key.model ^ key.blocks[at]
}

impl RoutingPolicy for PrefixAffinity {
    fn pick(&self, key: &RouteKey, targets: &[Target]) -> Option<usize> {
        let least = LeastLoaded.pick(key, targets)?;
        let mut index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = index.longest(key, targets);
        let blocks = |at: usize| match sent {
            Some((target, blocks)) if target == at => blocks.max(targets[at].cached),
            _ => targets[at].cached,
        };
        let limit = targets[least].load + LOAD_SLACK;
        let chosen = (0..targets.len())
            .filter(|&at| targets[at].load <= limit)
            // Of equals the least loaded, and the one that was chosen for that.
            .max_by_key(|&at| (blocks(at), Reverse(targets[at].load), at == least))
            .unwrap_or(least);
        for at in 0..key.blocks.len() {
            index.insert(entry(key, at), targets[chosen].id, self.generation_max);
        }
        Some(chosen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::{blocks::prefix_name, plan::BLOCK_TOKENS};

    fn key(words: &[u32]) -> RouteKey {
        let prompt: Vec<u32> = words.iter().flat_map(|&word| [word; BLOCK_TOKENS]).collect();
        RouteKey::new("m", &prompt)
    }

    fn targets(loads: [usize; 3]) -> [Target; 3] {
        [0, 1, 2].map(|at| Target { id: at as u64 + 10, load: loads[at], cached: 0 })
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
    fn what_a_target_says_it_has_counts_as_what_was_sent_there() {
        let policy = PrefixAffinity::default();
        let has = |cached: [usize; 3], loads| {
            let mut targets = targets(loads);
            targets.iter_mut().zip(cached).for_each(|(target, cached)| target.cached = cached);
            targets
        };
        // Another router sent it there; nobody else has as much.
        assert_eq!(policy.pick(&key(&[1, 2]), &has([0, 1, 2], [0, 0, 8])), Some(2));
        assert_eq!(policy.pick(&key(&[3, 4]), &has([0, 1, 2], [0, 0, 9])), Some(1));
        // Of equals the least loaded.
        assert_eq!(policy.pick(&key(&[5, 6]), &has([2, 2, 2], [2, 1, 3])), Some(1));
        // It will have it soon, if it does not say so yet.
        assert_eq!(policy.pick(&key(&[5, 6]), &has([1, 0, 1], [0, 5, 0])), Some(1));
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
        assert_eq!(key(&[7]).blocks, [prefix_name(0, &[7; BLOCK_TOKENS])], "as workers name it");
        assert!(RouteKey::new("a", &[1; BLOCK_TOKENS - 1]).blocks.is_empty());
        assert_eq!(RouteKey::new("a", &[1; 100_000]).blocks.len(), 128);
    }
}
