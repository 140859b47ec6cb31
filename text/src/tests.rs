//! What the tests of this crate share.

mod files;
mod goldens;
mod properties;
mod reference;
mod vocabulary;

/// A small generator with a fixed seed (splitmix64), so that every run tests the same.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In [0, bound).
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}
