//! Merging bytes into tokens, best pair first.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use foldhash::fast::FixedState;

use crate::pieces::unspell;

/// Words up to this long, in bytes, look for the best pair among all; longer ones keep a heap.
const SHORT: usize = 48;
/// No merge: behind all others.
const NONE: u64 = u64::MAX;

/// Merges, and the words that need none. The tables never change, so that a text cannot make them
/// slow by its choice of words.
#[derive(Debug)]
pub struct Bpe {
    /// Words that end as one token.
    whole: HashMap<Box<[u8]>, u32, FixedState>,
    /// By left and right id: rank in the upper half, what they become in the lower.
    merges: HashMap<u64, u64, FixedState>,
    bytes: [u32; 256],
}

impl Bpe {
    /// Of tokens and merges, best first, in the byte-level spelling; with `whole_words`, a word
    /// that is a token stays one whatever merging would make of it. `None` if a byte has no token,
    /// or a merge names what is none.
    pub fn new(
        vocab: HashMap<String, u32>,
        merges: &[(String, String)],
        whole_words: bool,
    ) -> Option<Self> {
        let mut table = HashMap::with_capacity_and_hasher(merges.len(), FixedState::default());
        let mut joined = String::new();
        for (rank, (left, right)) in (0u32..).zip(merges) {
            joined.clear();
            joined.push_str(left);
            joined.push_str(right);
            let (left, right) = (vocab.get(left)?, vocab.get(right)?);
            table.insert(pair(*left, *right), pair(rank, *vocab.get(&joined)?));
        }
        // What is not in the spelling's alphabet no word can be.
        let tokens = vocab.iter().filter_map(|(token, id)| Some((unspell(token)?, *id)));
        let tokens: Vec<(Vec<u8>, u32)> = tokens.collect();
        drop(vocab);
        let mut bytes = [None; 256];
        for (token, id) in &tokens {
            if let [byte] = token[..] {
                bytes[byte as usize] = Some(*id);
            }
        }
        let bytes: Option<Vec<u32>> = bytes.into_iter().collect();
        let bytes = bytes?.try_into().ok()?;
        let mut bpe = Self { whole: HashMap::default(), merges: table, bytes };
        let mut ids = Vec::new();
        let mut is_whole = |(token, id): &(Vec<u8>, u32)| {
            ids.clear();
            bpe.merge(token, &mut ids);
            ids == [*id]
        };
        let whole = tokens.into_iter().filter(|token| whole_words || is_whole(token));
        let whole: Vec<(Vec<u8>, u32)> = whole.collect();
        bpe.whole = whole.into_iter().map(|(token, id)| (token.into_boxed_slice(), id)).collect();
        Some(bpe)
    }

    /// The ids of one word, behind those in `ids`.
    pub fn encode(&self, word: &[u8], ids: &mut Vec<u32>) {
        match self.whole.get(word) {
            Some(id) => ids.push(*id),
            None => self.merge(word, ids),
        }
    }

    fn merge(&self, word: &[u8], ids: &mut Vec<u32>) {
        if word.len() <= SHORT { self.merge_short(word, ids) } else { self.merge_long(word, ids) }
    }

    /// What two tokens become, with its rank.
    fn merged(&self, left: u32, right: u32) -> u64 {
        self.merges.get(&pair(left, right)).copied().unwrap_or(NONE)
    }

    fn merge_short(&self, word: &[u8], ids: &mut Vec<u32>) {
        let mut parts = [0u32; SHORT];
        // Merge of each part with the one behind it.
        let mut merges = [NONE; SHORT];
        let mut len = word.len();
        for (part, byte) in parts.iter_mut().zip(word) {
            *part = self.bytes[*byte as usize];
        }
        for at in 1..len {
            merges[at - 1] = self.merged(parts[at - 1], parts[at]);
        }
        // The first of equals is the leftmost.
        while let Some((at, best)) =
            merges[..len.saturating_sub(1)].iter().copied().enumerate().min_by_key(|(_, m)| *m)
        {
            if best == NONE {
                break;
            }
            parts[at] = best as u32;
            parts.copy_within(at + 2..len, at + 1);
            merges.copy_within(at + 1..len, at);
            len -= 1;
            merges[len - 1] = NONE;
            if at > 0 {
                merges[at - 1] = self.merged(parts[at - 1], parts[at]);
            }
            if at + 1 < len {
                merges[at] = self.merged(parts[at], parts[at + 1]);
            }
        }
        ids.extend(&parts[..len]);
    }

    /// In n log n for a word of n bytes.
    fn merge_long(&self, word: &[u8], ids: &mut Vec<u32>) {
        let mut parts: Vec<Part> = Vec::with_capacity(word.len());
        parts.extend(word.iter().enumerate().map(|(at, byte)| Part {
            id: self.bytes[*byte as usize],
            before: at.wrapping_sub(1),
            next: at + 1,
            merge: NONE,
        }));
        for at in 1..parts.len() {
            parts[at - 1].merge = self.merged(parts[at - 1].id, parts[at].id);
        }
        let heap = parts.iter().enumerate().filter(|(_, part)| part.merge != NONE);
        let heap: Vec<_> = heap.map(|(at, part)| Reverse((part.merge, at))).collect();
        let mut heap = BinaryHeap::from(heap);
        while let Some(Reverse((merge, at))) = heap.pop() {
            // Either part may have become another since.
            if parts[at].merge != merge {
                continue;
            }
            let gone = parts[at].next;
            let next = parts[gone].next;
            parts[gone].merge = NONE;
            parts[at] = Part { id: merge as u32, next, merge: NONE, ..parts[at] };
            let before = parts[at].before;
            if next < parts.len() {
                parts[next].before = at;
            }
            for (left, right) in [(before, at), (at, next)] {
                let (Some(first), Some(second)) = (parts.get(left), parts.get(right)) else {
                    continue;
                };
                let merge = self.merged(first.id, second.id);
                parts[left].merge = merge;
                if merge != NONE {
                    heap.push(Reverse((merge, left)));
                }
            }
        }
        let mut at = 0;
        while let Some(part) = parts.get(at) {
            ids.push(part.id);
            at = part.next;
        }
    }
}

/// A part of a word: a token, and where its neighbours are; past the word where there are none.
#[derive(Clone, Copy, Debug)]
struct Part {
    id: u32,
    before: usize,
    next: usize,
    /// With the part behind it.
    merge: u64,
}

fn pair(upper: u32, lower: u32) -> u64 {
    u64::from(upper) << 32 | u64::from(lower)
}
