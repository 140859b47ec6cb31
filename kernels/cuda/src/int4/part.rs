//! Integers of 4 bits in groups as the kernels can take them.

use crate::random::{PARTS as RANDOM_PARTS, random};
use half::f16;
use kernels::{Grouped, Groups, IntegerShape, PartShape, Random, Stored, WeightPart};

/// Rows and columns come in eights: half a word of the device's.
const EIGHT: usize = 8;

/// Whether the kernels can take integers of these rows and columns as they are.
fn takes((rows, cols): (usize, usize), bits: usize, groups: &Groups) -> bool {
    let runs = match *groups {
        Groups::Runs { size, first } => {
            (size.is_multiple_of(32) || size >= first + cols) && first.is_multiple_of(EIGHT)
        }
        Groups::Listed(_) => true,
    };
    let eights = rows > 0 && rows.is_multiple_of(EIGHT) && cols.is_multiple_of(EIGHT);
    bits == 4 && runs && eights
}

/// Which columns share a scale.
#[derive(Clone, Copy, Debug)]
pub(super) struct Columns<'a> {
    /// K.
    pub cols: usize,
    pub groups: &'a Groups,
    /// G.
    pub count: usize,
}

impl<'a> Columns<'a> {
    /// Those of a stack, whose columns and groups are the same in each part; `None` where the
    /// kernels cannot take them as they are.
    pub(super) fn of(stack: &'a [PartShape]) -> Option<Self> {
        let of = |part: &'a PartShape| {
            let PartShape { rows, cols, integers } = part;
            let IntegerShape { bits, groups, count } = integers.as_ref()?;
            takes((*rows, *cols), *bits, groups).then_some(Self {
                cols: *cols,
                groups,
                count: *count,
            })
        };
        let first = of(stack.first()?)?;
        let same = |part: Self| part.cols == first.cols && part.groups == first.groups;
        stack.iter().all(|part| of(part).is_some_and(same)).then_some(first)
    }

    /// Columns between the start of the first group and column 0, where groups are runs.
    pub(super) fn first_col(&self) -> Option<usize> {
        match self.groups {
            Groups::Runs { first, .. } => Some(*first),
            Groups::Listed(_) => None,
        }
    }

    /// Whether runs of `unit` columns can be of one group.
    pub(super) fn allows(&self, unit: usize) -> bool {
        match self.groups {
            Groups::Runs { size, .. } => size.is_multiple_of(unit) || self.count == 1,
            Groups::Listed(_) => true,
        }
    }
}

/// Where the integers of a stack come from.
pub(super) enum Source<'a> {
    /// A seed for each part, and its rows: the device makes them.
    Random(Vec<(Random, usize)>),
    Integers(Vec<Int4Part<'a>>),
}

impl<'a> Source<'a> {
    /// Of parts with [`Columns`]; `None` where some are stored and others not, or more are made
    /// than the device makes at once.
    pub(super) fn of(parts: &'a [WeightPart<'a>]) -> Option<Self> {
        let stored: Vec<Int4Part<'a>> = parts.iter().filter_map(Int4Part::of).collect();
        if stored.len() == parts.len() {
            return Some(Self::Integers(stored));
        }
        let seeds: Vec<_> =
            parts.iter().filter_map(|part| Some((random(part)?, part.rows))).collect();
        let all = seeds.len() == parts.len() && seeds.len() <= RANDOM_PARTS;
        all.then_some(Self::Random(seeds))
    }
}

/// A stored matrix [N, K] of 4-bit integers, or a rank's rows and columns of one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Int4Part<'a> {
    /// N, a multiple of 8.
    pub rows: usize,
    /// K, a multiple of 8.
    pub cols: usize,
    pub grouped: &'a Grouped<'a>,
}

impl<'a> Int4Part<'a> {
    fn of(part: &'a WeightPart<'a>) -> Option<Self> {
        let WeightPart { rows, cols, ref stored } = *part;
        let Stored::Grouped(grouped) = stored else { return None };
        Some(Self { rows, cols, grouped })
    }

    /// G.
    fn groups(&self) -> usize {
        self.grouped.count(self.rows)
    }

    pub(super) fn columns(&self) -> Columns<'a> {
        Columns { cols: self.cols, groups: &self.grouped.groups, count: self.groups() }
    }

    /// The integers of row `n`, two to a byte, the first in the lower half.
    pub(super) fn put_row(&self, n: usize, to: &mut [u8]) {
        to.copy_from_slice(&self.grouped.values[n * self.cols / 2..][..self.cols / 2]);
    }

    /// The zero point of row `n` in a group, 0 to 16.
    pub(super) fn zero(&self, n: usize, group: usize) -> u16 {
        self.grouped.zeros[n * self.groups() + group]
    }

    /// The scale of row `n` in a group.
    pub(super) fn scale(&self, n: usize, group: usize) -> f16 {
        self.grouped.scales[n * self.groups() + group]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernels_cannot_take_is_told() {
        let part = |rows: usize, cols: usize, bits, groups: Groups| {
            let count = (0..cols).map(|k| groups.of(k)).max().unwrap_or(0) + 1;
            let (scales, zeros) = (vec![f16::ONE; rows * count], vec![8; rows * count]);
            let values = vec![0; rows * Grouped::row_bytes(bits, cols)].into();
            let grouped = Grouped { bits, values, groups, scales, zeros };
            WeightPart { rows, cols, stored: Stored::Grouped(grouped) }
        };
        let runs = |size, first| Groups::Runs { size, first };
        let taken = |parts: &[WeightPart<'_>]| {
            let shapes: Vec<PartShape> = parts.iter().map(WeightPart::shape).collect();
            Columns::of(&shapes).is_some()
        };
        assert!(taken(&[part(8, 64, 4, runs(32, 8)), part(16, 64, 4, runs(32, 8))]));
        assert!(taken(&[part(8, 40, 4, runs(40, 0))]));
        assert!(taken(&[part(8, 8, 4, Groups::Listed(vec![1, 0, 1, 0, 0, 0, 0, 0]))]));
        assert!(!taken(&[part(12, 64, 4, runs(32, 0))]), "rows");
        assert!(!taken(&[part(8, 64, 8, runs(32, 0))]), "bits");
        assert!(!taken(&[part(8, 64, 4, runs(48, 0))]), "groups");
        assert!(!taken(&[part(8, 64, 4, runs(64, 4))]), "a beginning");
        assert!(!taken(&[part(8, 64, 4, runs(32, 0)), part(8, 64, 4, runs(64, 0))]), "differ");
    }
}
