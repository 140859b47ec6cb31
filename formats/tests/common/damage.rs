//! Damages files in every way a seeded generator thinks of.

/// xorshift64*.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}

/// One to eight changes: bits, bytes, numbers, cuts, repeats and swaps.
pub fn mutate(random: &mut Random, seed: &[u8], other: &[u8]) -> Vec<u8> {
    let mut file = seed.to_vec();
    for _ in 0..=random.below(8) {
        let at = random.below(file.len());
        let run = random.below(24).min(file.len() - at);
        match random.below(9) {
            0 if !file.is_empty() => file[at] ^= 1 << random.below(8),
            1 if !file.is_empty() => file[at] = random.next() as u8,
            2 => file.truncate(at),
            3 => drop(file.drain(at..at + run)),
            4 => file
                .splice(at..at, other[random.below(other.len())..].iter().copied().take(run))
                .for_each(drop),
            5 => {
                let copy = file[at..at + run].to_vec();
                file.splice(at..at, copy).for_each(drop);
            }
            6 if file.len() >= 8 => {
                let numbers = [0, 1, u64::MAX, 1 << 63, 1 << 40, file.len() as u64, random.next()];
                let number = numbers[random.below(numbers.len())] >> (random.below(2) * 32);
                let at = random.below(file.len() - 7);
                file[at..at + 8].copy_from_slice(&number.to_le_bytes());
            }
            7 if file.len() >= 4 => {
                let at = random.below(file.len() - 3);
                file[at..at + 4].copy_from_slice(&(random.below(16) as u32).to_le_bytes());
            }
            8 => {
                let digits =
                    [&b"99999999999999999999"[..], b"-1", b"[[[[[", b"\"\"", b"1e9", b"{}"];
                let token = digits[random.below(digits.len())];
                file.splice(at..at + run.min(3), token.iter().copied()).for_each(drop);
            }
            _ => {}
        }
    }
    file
}
