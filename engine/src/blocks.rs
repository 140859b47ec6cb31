//! The KV block pool: who holds which block, and which full blocks can be shared.
//!
//! A full block may be published as soon as a plan computes it: plans run in order, so whoever
//! finds it reads it later. The index finds it by the prefix it extends and its own tokens; the
//! prefix is named by identity, not by a hash, so that no collision can ever serve somebody else's
//! cache. Published blocks that nobody holds stay findable until the pool needs them, least
//! recently used first. Every entry belongs to a block: the pool bounds the index. One pool serves
//! one model; a caller whose KV depends on more than the tokens before it neither looks up nor
//! publishes.

use std::collections::{BTreeMap, HashMap};

use crate::plan::BLOCK_TOKENS;

/// Names a published prefix: everything from the start of the sequence to the end of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Prefix {
    /// What tells it from all others.
    identity: u64,
    /// As [`prefix_name`] says.
    name: u64,
    /// In blocks.
    len: u32,
}

impl Prefix {
    /// The empty prefix.
    pub const ROOT: Self = Self { identity: 0, name: 0, len: 0 };
}

/// Of a prefix, blocks that others than the pool may hear of.
pub const NAMED_BLOCKS_MAX: usize = 128;

/// A name for a prefix that others than the pool can find out too: of the prefix `parent`, 0 where
/// that is empty, extended by a block. The same on every machine. Names may collide: they are good
/// for guesses about what is cached, not for finding it.
pub fn prefix_name(parent: u64, tokens: &BlockTokens) -> u64 {
    // Odd, and with as many ones as zeros: 2^64 divided by the golden ratio.
    const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
    let mix = |name: u64, token: &u32| {
        let mixed = (name ^ u64::from(*token)).wrapping_mul(SPREAD);
        mixed ^ (mixed >> 29)
    };
    // Nothing but the root is named 0.
    tokens.iter().fold(parent.wrapping_add(SPREAD), mix) | 1
}

/// A prefix that can be found from now on, or no longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefixChange {
    pub name: u64,
    pub is_cached: bool,
}

/// The tokens of one full block.
pub type BlockTokens = [u32; BLOCK_TOKENS];

/// What a published block holds: the prefix it completes, the one it extends, and its tokens.
#[derive(Clone, Copy)]
struct Published {
    prefix: Prefix,
    key: (Prefix, BlockTokens),
}

#[derive(Clone, Default)]
struct Block {
    holders: u32,
    published: Option<Published>,
    /// Key in `cached` while nobody holds the block.
    released_at: u64,
}

/// Blocks by id, `0..total`.
pub struct BlockPool {
    blocks: Vec<Block>,
    /// Neither held nor published.
    unused: Vec<u32>,
    /// Published, held by nobody; the least recently used first.
    cached: BTreeMap<u64, u32>,
    index: HashMap<(Prefix, BlockTokens), u32>,
    clock: u64,
    prefixes: u64,
    /// Where somebody asks for them.
    changes: Option<Vec<PrefixChange>>,
}

impl BlockPool {
    /// All `total` blocks are free.
    pub fn new(total: u32) -> Self {
        Self {
            blocks: vec![Block::default(); total as usize],
            unused: (0..total).rev().collect(),
            cached: BTreeMap::new(),
            index: HashMap::new(),
            clock: 0,
            prefixes: 0,
            changes: None,
        }
    }

    /// What has become findable or unfindable since the last call, the first
    /// [`NAMED_BLOCKS_MAX`] blocks of each prefix; nothing before the first call is known.
    pub fn take_changes(&mut self) -> Vec<PrefixChange> {
        self.changes.replace(Vec::new()).unwrap_or_default()
    }

    fn note(&mut self, prefix: Prefix, is_cached: bool) {
        if let Some(changes) = &mut self.changes
            && prefix.len as usize <= NAMED_BLOCKS_MAX
        {
            changes.push(PrefixChange { name: prefix.name, is_cached });
        }
    }

    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that nobody holds; cached prefixes count.
    pub fn free(&self) -> usize {
        self.unused.len() + self.cached.len()
    }

    /// Blocks that nobody holds but whose contents can still be found.
    pub fn cached(&self) -> usize {
        self.cached.len()
    }

    /// A block for one holder. Evicts the least recently used cached prefix when nothing else is
    /// free.
    pub fn allocate(&mut self) -> Option<u32> {
        let id = match self.unused.pop() {
            Some(id) => id,
            None => {
                let (_, id) = self.cached.pop_first()?;
                self.unpublish(id);
                id
            }
        };
        self.blocks[id as usize].holders = 1;
        Some(id)
    }

    /// The block that extends `parent` by `tokens`, where published. Does not hold it.
    pub fn find(&self, parent: Prefix, tokens: &BlockTokens) -> Option<(u32, Prefix)> {
        let id = *self.index.get(&(parent, *tokens))?;
        self.blocks[id as usize].published.map(|published| (id, published.prefix))
    }

    /// One more holder of a found or allocated block.
    pub fn retain(&mut self, id: u32) {
        let block = &mut self.blocks[id as usize];
        if block.holders == 0 {
            self.cached.remove(&block.released_at);
        }
        block.holders += 1;
    }

    /// One holder less. The last one leaves the block cached if it is published.
    ///
    /// Release a sequence's blocks from the last to the first: a prefix must outlive what extends
    /// it.
    pub fn release(&mut self, id: u32) {
        let block = &mut self.blocks[id as usize];
        debug_assert!(block.holders > 0, "block {id} released by nobody");
        block.holders = block.holders.saturating_sub(1);
        if block.holders > 0 {
            return;
        }
        if block.published.is_none() {
            self.unused.push(id);
            return;
        }
        self.clock += 1;
        block.released_at = self.clock;
        self.cached.insert(self.clock, id);
    }

    /// Makes a held and full block findable as `parent` extended by `tokens`, unless an equal one
    /// is already: then that stays the one that is found, and the caller's block its own. Returns
    /// the prefix that either completes.
    pub fn publish(&mut self, id: u32, parent: Prefix, tokens: &BlockTokens) -> Prefix {
        if let Some((_, prefix)) = self.find(parent, tokens) {
            return prefix;
        }
        self.prefixes += 1;
        let name = prefix_name(parent.name, tokens);
        let prefix = Prefix { identity: self.prefixes, name, len: parent.len.saturating_add(1) };
        self.note(prefix, true);
        let key = (parent, *tokens);
        self.blocks[id as usize].published = Some(Published { prefix, key });
        self.index.insert(key, id);
        prefix
    }

    /// Makes a block unfindable: what it holds is not what was promised. Its holders keep it.
    pub fn withdraw(&mut self, id: u32) {
        self.unpublish(id);
        let Block { holders, released_at, .. } = self.blocks[id as usize];
        if holders == 0 && self.cached.remove(&released_at).is_some() {
            self.unused.push(id);
        }
    }

    fn unpublish(&mut self, id: u32) {
        if let Some(published) = self.blocks[id as usize].published.take() {
            self.index.remove(&published.key);
            self.note(published.prefix, false);
        }
    }

    /// Checks the books against each other and against how often each block should be held.
    #[cfg(test)]
    pub fn audit(&self, held: &HashMap<u32, u32>) {
        let mut free = 0;
        for (id, block) in self.blocks.iter().enumerate() {
            let id = id as u32;
            let expected = held.get(&id).copied().unwrap_or(0);
            assert_eq!(block.holders, expected, "holders of block {id}");
            let unused = self.unused.iter().filter(|&&other| other == id).count();
            let cached = self.cached.values().filter(|&&other| other == id).count();
            assert_eq!(unused + cached, usize::from(expected == 0), "places of block {id}");
            assert!(cached == 0 || block.published.is_some(), "block {id} cached without contents");
            free += usize::from(expected == 0);
        }
        assert_eq!(self.free(), free);
        assert!(self.index.len() <= self.blocks.len());
        for (key, &id) in &self.index {
            let published = self.blocks[id as usize].published.expect("indexed, so published");
            assert_eq!(&published.key, key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: BlockTokens = [1; BLOCK_TOKENS];
    const B: BlockTokens = [2; BLOCK_TOKENS];

    #[test]
    fn a_published_block_is_found_after_its_last_holder_left() {
        let mut pool = BlockPool::new(4);
        let first = pool.allocate().unwrap();
        let prefix = pool.publish(first, Prefix::ROOT, &A);
        let second = pool.allocate().unwrap();
        let deeper = pool.publish(second, prefix, &A);
        pool.release(second);
        pool.release(first);
        assert_eq!((pool.free(), pool.cached()), (4, 2));
        assert_eq!(pool.find(Prefix::ROOT, &A), Some((first, prefix)));
        assert_eq!(pool.find(prefix, &A), Some((second, deeper)));
        assert_eq!(pool.find(deeper, &A), None);
        assert_eq!(pool.find(Prefix::ROOT, &B), None);
        pool.audit(&HashMap::new());
    }

    #[test]
    fn the_least_recently_used_cached_block_goes_first() {
        let mut pool = BlockPool::new(2);
        for tokens in [&A, &B] {
            let id = pool.allocate().unwrap();
            pool.publish(id, Prefix::ROOT, tokens);
            pool.release(id);
        }
        let (used, _) = pool.find(Prefix::ROOT, &A).unwrap();
        pool.retain(used);
        pool.release(used);
        assert!(pool.allocate().is_some());
        assert!(pool.find(Prefix::ROOT, &A).is_some());
        assert_eq!(pool.find(Prefix::ROOT, &B), None);
    }

    #[test]
    fn of_equal_blocks_the_first_is_found_and_each_stays_its_holders() {
        let mut pool = BlockPool::new(3);
        let mine = pool.allocate().unwrap();
        let yours = pool.allocate().unwrap();
        let prefix = pool.publish(mine, Prefix::ROOT, &A);
        assert_eq!(pool.publish(yours, Prefix::ROOT, &A), prefix);
        assert_eq!(pool.find(Prefix::ROOT, &A), Some((mine, prefix)));
        pool.audit(&HashMap::from([(mine, 1), (yours, 1)]));
        pool.release(yours);
        pool.release(mine);
        assert_eq!((pool.free(), pool.cached()), (3, 1));
    }

    #[test]
    fn a_withdrawn_block_is_found_no_more_held_or_not() {
        let mut pool = BlockPool::new(2);
        let (held, left) = (pool.allocate().unwrap(), pool.allocate().unwrap());
        pool.publish(held, Prefix::ROOT, &A);
        pool.publish(left, Prefix::ROOT, &B);
        pool.release(left);
        for id in [held, left, left] {
            pool.withdraw(id);
        }
        assert_eq!(pool.find(Prefix::ROOT, &A), None);
        assert_eq!(pool.find(Prefix::ROOT, &B), None);
        pool.audit(&HashMap::from([(held, 1)]));
        pool.release(held);
        assert_eq!((pool.free(), pool.cached()), (2, 0));
    }

    #[test]
    fn changes_are_told_by_name_once_asked_for() {
        let mut pool = BlockPool::new(2);
        let first = pool.allocate().unwrap();
        let prefix = pool.publish(first, Prefix::ROOT, &A);
        assert_eq!(pool.take_changes(), [], "nobody asked before");
        let second = pool.allocate().unwrap();
        pool.publish(second, prefix, &B);
        pool.release(second);
        pool.release(first);
        assert!(pool.allocate().is_some());
        let name = prefix_name(prefix_name(0, &A), &B);
        let told = [true, false].map(|is_cached| PrefixChange { name, is_cached });
        assert_eq!(pool.take_changes(), told);
        assert_eq!(pool.take_changes(), []);
        assert_ne!(prefix_name(0, &A), prefix_name(0, &B));
        assert_ne!(name, prefix_name(0, &B));
    }

    #[test]
    fn deep_prefixes_are_not_told() {
        let mut pool = BlockPool::new(NAMED_BLOCKS_MAX as u32 + 10);
        pool.take_changes();
        let mut prefix = Prefix::ROOT;
        while let Some(id) = pool.allocate() {
            prefix = pool.publish(id, prefix, &A);
        }
        assert_eq!(pool.take_changes().len(), NAMED_BLOCKS_MAX);
    }

    /// Workers and routers of different builds must agree on it.
    #[test]
    fn names_stay_what_they_are() {
        let tokens: Vec<u32> = (0..BLOCK_TOKENS as u32).collect();
        let tokens = tokens.try_into().unwrap();
        assert_eq!(prefix_name(0, &tokens), 0x3d31_d859_b235_0fab);
    }

    #[test]
    fn held_blocks_are_never_given_away() {
        let mut pool = BlockPool::new(2);
        let held = pool.allocate().unwrap();
        pool.publish(held, Prefix::ROOT, &A);
        assert!(pool.allocate().is_some());
        assert_eq!(pool.allocate(), None);
    }
}
