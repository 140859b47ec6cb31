//! Numbers made from a seed, for a model without a checkpoint: speed does not depend on them.

use std::borrow::Cow;

use half::{bf16, f16};

use super::{Format, Grouped, Groups, IntegerShape, Stored, WeightPart};

/// A matrix whose numbers follow from a seed and their place alone: about normal, with a deviation
/// of 0.02. Any device makes the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Random {
    /// The matrix's own.
    pub seed: u64,
    /// Where the part begins in the matrix.
    pub first_row: usize,
    pub first_col: usize,
    pub format: RandomFormat,
}

/// What [`Random`] numbers are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RandomFormat {
    Bf16,
    /// Integers of 4 bits, of which runs of `group` columns share a scale.
    Int4 {
        group: usize,
    },
}

/// Four draws of 16 bits, less their mean, have this deviation.
const SUM_DEVIATION: f32 = 37_837.0;
const DEVIATION: f32 = 0.02;
/// What a sum is multiplied by.
pub const RANDOM_STEP: f32 = DEVIATION / SUM_DEVIATION;
/// The mean of four draws.
const MEAN: i32 = 2 * 65_535;
/// An integer stands for so much of a sum, as a power of two.
const INT4_SHIFT: u32 = 14;
/// The integer that stands for 0.
pub const RANDOM_INT4_ZERO: u16 = 8;

impl Random {
    /// The sum of four even draws at row `n`, column `k` of the part, less its mean: about normal.
    fn sum(&self, n: usize, k: usize) -> i32 {
        // splitmix64 of the place.
        let place = ((self.first_row + n) as u64) << 32 | (self.first_col + k) as u64;
        let mut x = self.seed ^ place.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^= x >> 31;
        (0..4).map(|draw| (x >> (16 * draw) & 0xffff) as i32).sum::<i32>() - MEAN
    }

    /// The number at row `n`, column `k` of the part.
    pub fn number(&self, n: usize, k: usize) -> f32 {
        match self.format {
            RandomFormat::Bf16 => bf16::from_f32(self.sum(n, k) as f32 * RANDOM_STEP).to_f32(),
            RandomFormat::Int4 { .. } => {
                let steps = f32::from(self.integer(n, k)) - f32::from(RANDOM_INT4_ZERO);
                random_int4_scale().to_f32() * steps
            }
        }
    }

    /// 0 to 15.
    fn integer(&self, n: usize, k: usize) -> u8 {
        let rounded = (self.sum(n, k) + (1 << (INT4_SHIFT - 1))) >> INT4_SHIFT;
        (rounded + i32::from(RANDOM_INT4_ZERO)).clamp(0, 15) as u8
    }

    /// The same numbers as a checkpoint would store them.
    pub(super) fn made(&self, rows: usize, cols: usize) -> Stored<'static> {
        let places = || (0..rows).flat_map(|n| (0..cols).map(move |k| (n, k)));
        match self.format {
            RandomFormat::Bf16 => {
                let bytes = |(n, k)| bf16::from_f32(self.number(n, k)).to_le_bytes();
                let data = Cow::Owned(places().flat_map(bytes).collect());
                Stored::Plain { format: Format::Bf16, data }
            }
            RandomFormat::Int4 { group } => {
                let groups = self.groups(group);
                let integers: Vec<u8> = places().map(|(n, k)| self.integer(n, k)).collect();
                let count = groups.count(cols);
                Stored::Grouped(Grouped {
                    bits: 4,
                    values: Cow::Owned(Grouped::packed(4, cols, &integers)),
                    groups,
                    scales: vec![random_int4_scale(); rows * count],
                    zeros: vec![RANDOM_INT4_ZERO; rows * count],
                })
            }
        }
    }

    /// How its integers lie, where it is stored as such.
    pub(super) fn integers(&self, cols: usize) -> Option<IntegerShape> {
        let RandomFormat::Int4 { group } = self.format else { return None };
        let groups = self.groups(group);
        let count = groups.count(cols);
        Some(IntegerShape { bits: 4, groups, count })
    }

    fn groups(&self, group: usize) -> Groups {
        Groups::Runs { size: group, first: self.first_col % group }
    }
}

/// The scale of all integers.
pub fn random_int4_scale() -> f16 {
    f16::from_f32((1u32 << INT4_SHIFT) as f32 * RANDOM_STEP)
}

impl<'a> WeightPart<'a> {
    /// A part with its numbers: random ones are made.
    pub fn made(&'a self) -> Cow<'a, WeightPart<'a>> {
        match &self.stored {
            Stored::Random(random) => {
                let stored = random.made(self.rows, self.cols);
                Cow::Owned(WeightPart { rows: self.rows, cols: self.cols, stored })
            }
            _ => Cow::Borrowed(self),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plain::dequant::part_row;

    const FORMATS: [RandomFormat; 2] = [RandomFormat::Bf16, RandomFormat::Int4 { group: 32 }];

    fn part(seed: u64, format: RandomFormat, (rows, cols): (usize, usize)) -> WeightPart<'static> {
        let stored = Stored::Random(Random { seed, first_row: 0, first_col: 0, format });
        WeightPart { rows, cols, stored }
    }

    fn row(part: &WeightPart<'_>, n: usize) -> Vec<f32> {
        let mut row = vec![0.0; part.cols];
        part_row(part, n, &mut row);
        row
    }

    #[test]
    fn numbers_are_about_normal_and_follow_from_their_place() {
        for format in FORMATS {
            let whole = part(7, format, (64, 512));
            let all: Vec<f32> = (0..64).flat_map(|n| row(&whole, n)).collect();
            let mean = all.iter().sum::<f32>() / all.len() as f32;
            let square = |x: &f32| (x - mean).powi(2);
            let deviation = (all.iter().map(square).sum::<f32>() / all.len() as f32).sqrt();
            assert!(mean.abs() < 5e-4 && (deviation - 0.02).abs() < 5e-4, "{mean} {deviation}");
            assert!(all.iter().all(|x| x.abs() < 0.07));
            let made = whole.made();
            assert!(!matches!(made.stored, Stored::Random(_)));
            assert_eq!(WeightPart::check(&[made.clone().into_owned()]).expect("whole"), (64, 512));
            assert!((0..64).all(|n| row(&whole, n) == row(&made, n)), "{format:?}");
            assert_ne!(row(&whole, 0), row(&part(8, format, (64, 512)), 0));
            assert_ne!(row(&whole, 0), row(&whole, 1));
        }
    }

    #[test]
    fn parts_of_a_matrix_have_its_numbers() {
        for format in FORMATS {
            let whole = part(3, format, (8, 128));
            let Stored::Random(random) = whole.stored else { panic!("{whole:?}") };
            let stored = Stored::Random(Random { first_row: 5, ..random });
            let rows = WeightPart { rows: 3, cols: 128, stored };
            assert_eq!(row(&rows, 1), row(&whole, 6));
            let cols = whole.columns(&(40..104));
            assert_eq!(row(&cols, 6), row(&whole, 6)[40..104]);
            assert_eq!(row(&cols.made(), 6), row(&whole, 6)[40..104]);
        }
    }
}
