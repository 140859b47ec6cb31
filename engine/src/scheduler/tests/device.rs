//! A device as the scheduler sees it: it keeps block tables, runs plans in their order, and notices
//! when a sequence does not find its own keys in the cache.

use std::collections::HashSet;

use super::*;

/// A digest of a sequence's tokens up to one of them: what a slot of the cache should hold.
fn digests(tokens: &[u32]) -> Vec<u64> {
    let next = |digest: &mut u64, token: &u32| {
        *digest = (*digest ^ u64::from(*token)).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(23);
        Some(*digest)
    };
    tokens.iter().scan(1, next).collect()
}

/// What the model of these tests answers, given everything before: a stop id now and then.
pub fn sample(tokens: &[u32]) -> u32 {
    let digest = digests(tokens).pop().unwrap_or(0);
    if digest.is_multiple_of(101) { EOS } else { 10 + (digest >> 7) as u32 % 3 }
}

/// What is remembered of a sequence.
struct Held {
    table: Vec<u32>,
    tokens: Vec<u32>,
    cached: usize,
    /// Whether the last token of `tokens` was sampled here; `Err` where that failed.
    last: Option<Result<(), ()>>,
}

pub struct Device {
    cache: Vec<[u64; BLOCK_TOKENS]>,
    sequences: HashMap<SequenceId, Held>,
    plans: u64,
}

impl Device {
    pub fn new(blocks: usize) -> Self {
        Self { cache: vec![[0; BLOCK_TOKENS]; blocks], sequences: HashMap::new(), plans: 0 }
    }

    /// Runs the next plan. `fails` cannot be sampled.
    pub fn run(&mut self, plan: &StepPlan, fails: Option<SequenceId>) -> StepOutput {
        assert_eq!(plan.number, self.plans);
        self.plans += 1;
        for id in &plan.released {
            assert!(self.sequences.remove(id).is_some(), "{id} was never introduced");
        }
        let mut written = HashSet::new();
        for chunk in &plan.chunks {
            self.store(chunk, &mut written);
        }
        let mut output = StepOutput { number: plan.number, ..StepOutput::default() };
        for chunk in &plan.chunks {
            self.attend(chunk);
            self.answer(chunk, fails == Some(chunk.sequence), &mut output);
        }
        output
    }

    /// Takes over what is new of a sequence, and writes its chunk.
    fn store(&mut self, chunk: &Chunk, written: &mut HashSet<u32>) {
        let (id, start, end) = (chunk.sequence, chunk.start, chunk.end());
        if let Some(admission) = &chunk.admission {
            let tokens = admission.tokens.clone();
            let held = Held { table: Vec::new(), tokens, cached: start, last: None };
            self.sequences.insert(id, held);
        }
        let held = self.sequences.get_mut(&id).expect("admitted");
        held.table.extend(&chunk.blocks);
        assert_eq!(held.cached, start, "{id} goes on where it was");
        assert!(held.table.len() * BLOCK_TOKENS >= end, "{id} has its blocks");
        let distinct: HashSet<_> = held.table.iter().collect();
        assert_eq!(distinct.len(), held.table.len(), "{id} has a block twice");
        held.cached = end;
        match &chunk.tokens {
            Tokens::Known(tokens) => assert_eq!(tokens[..], held.tokens[start..end]),
            Tokens::LastSampled => {
                assert_eq!(held.tokens.len(), end, "{id}: the token is the last");
                assert!(held.last.is_some() && chunk.want == Want::Sample);
            }
        }
        for &block in &held.table[start / BLOCK_TOKENS..end.div_ceil(BLOCK_TOKENS)] {
            assert!(written.insert(block), "two write block {block}");
        }
        for (at, digest) in digests(&held.tokens[..end]).into_iter().enumerate().skip(start) {
            self.cache[held.table[at / BLOCK_TOKENS] as usize][at % BLOCK_TOKENS] = digest;
        }
    }

    /// Reads everything before the chunk's end.
    fn attend(&self, chunk: &Chunk) {
        let held = &self.sequences[&chunk.sequence];
        for (at, digest) in digests(&held.tokens[..chunk.end()]).into_iter().enumerate() {
            let slot = self.cache[held.table[at / BLOCK_TOKENS] as usize][at % BLOCK_TOKENS];
            assert_eq!(slot, digest, "{} reads its token {at}", chunk.sequence);
        }
    }

    fn answer(&mut self, chunk: &Chunk, fails: bool, output: &mut StepOutput) {
        let id = chunk.sequence;
        let held = self.sequences.get_mut(&id).expect("admitted");
        if fails || held.last == Some(Err(())) {
            if matches!(chunk.want, Want::Sample | Want::Score { sample: true }) {
                // In place of the token that there is not.
                held.tokens.push(0);
            }
            held.last = Some(Err(()));
            output.failed.push((id, "bad luck".into()));
            return;
        }
        if let Want::Score { .. } = chunk.want {
            let following = chunk.tokens.known()[1..].iter().copied().chain(chunk.next);
            output.scored.push((id, following.map(known).collect()));
        }
        if matches!(chunk.want, Want::Sample | Want::Score { sample: true }) {
            let token = sample(&held.tokens);
            held.tokens.push(token);
            held.last = Some(Ok(()));
            output.sampled.push((id, known(token)));
        }
    }
}
