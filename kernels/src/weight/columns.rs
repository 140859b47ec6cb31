//! Some columns of a stored matrix, as the rank that multiplies them alone wants them.

use super::{Format, Grouped, Groups, IntegerShape, Random, Scaled, Stored, WeightPart};
use crate::plain::dequant;
use std::{borrow::Cow, ops::Range};

impl WeightPart<'_> {
    /// The columns `cols` of every row. Blocks and runs of columns that the range does not hold
    /// whole become f32: what they were scaled by is shared with others.
    ///
    /// # Panics
    /// Where the part is not whole ([`WeightPart::check`]) or has no such columns.
    pub fn columns(&self, cols: &Range<usize>) -> WeightPart<'static> {
        let whole = |unit: usize| cols.start.is_multiple_of(unit) && cols.end.is_multiple_of(unit);
        let stored = match &self.stored {
            Stored::Plain { format, data } if whole(format.block_elements()) => {
                let bytes = |n: usize| format.row_bytes(n);
                let data = cut_rows(data, bytes(self.cols), bytes(cols.start)..bytes(cols.end));
                Stored::Plain { format: *format, data: Cow::Owned(data) }
            }
            Stored::Grouped(grouped) => Stored::Grouped(grouped.columns(self, cols)),
            Stored::Scaled(scaled) if cols.start.is_multiple_of(scaled.run) => {
                Stored::Scaled(scaled.columns(self, cols))
            }
            Stored::Random(random) => {
                let first_col = random.first_col + cols.start;
                Stored::Random(Random { first_col, ..*random })
            }
            Stored::Plain { .. } | Stored::Scaled(_) => {
                let mut row = vec![0.0; self.cols];
                let mut data = Vec::with_capacity(self.rows * cols.len() * size_of::<f32>());
                for n in 0..self.rows {
                    dequant::part_row(self, n, &mut row);
                    data.extend(row[cols.clone()].iter().flat_map(|value| value.to_le_bytes()));
                }
                Stored::Plain { format: Format::F32, data: Cow::Owned(data) }
            }
        };
        WeightPart { rows: self.rows, cols: cols.len(), stored }
    }
}

impl Groups {
    /// The groups of some columns, and which those are of `count`.
    fn columns(&self, count: usize, cols: &Range<usize>) -> (Self, Range<usize>) {
        match self {
            Self::Runs { size, first } => {
                let (start, end) = (first + cols.start, first + cols.end);
                let groups = Self::Runs { size: *size, first: start % size };
                (groups, start / size..end.div_ceil(*size))
            }
            // Any group may have columns here.
            Self::Listed(listed) => (Self::Listed(listed[cols.clone()].into()), 0..count),
        }
    }
}

impl IntegerShape {
    /// Of some columns, as [`WeightPart::columns`] leaves them.
    #[must_use]
    pub fn columns(&self, cols: &Range<usize>) -> Self {
        let (groups, kept) = self.groups.columns(self.count, cols);
        Self { bits: self.bits, groups, count: kept.len() }
    }
}

impl Grouped<'_> {
    fn columns(&self, part: &WeightPart<'_>, cols: &Range<usize>) -> Grouped<'static> {
        let count = self.count(part.rows);
        let (groups, kept) = self.groups.columns(count, cols);
        Grouped {
            bits: self.bits,
            values: Cow::Owned(self.cut_integers(part, cols)),
            groups,
            scales: cut_rows(&self.scales, count, kept.clone()),
            zeros: cut_rows(&self.zeros, count, kept),
        }
    }
}

impl Grouped<'_> {
    fn cut_integers(&self, part: &WeightPart<'_>, cols: &Range<usize>) -> Vec<u8> {
        let bytes = |cols: usize| Self::row_bytes(self.bits, cols);
        let each = 8 / self.bits;
        if cols.start.is_multiple_of(each) && cols.end.is_multiple_of(each) {
            let range = bytes(cols.start)..bytes(cols.end);
            return cut_rows(&self.values, bytes(part.cols), range);
        }
        let row = |n| self.integers(n, part.cols).skip(cols.start).take(cols.len());
        let integers: Vec<u8> = (0..part.rows).flat_map(row).collect();
        Self::packed(self.bits, cols.len(), &integers)
    }
}

impl Scaled<'_> {
    fn columns(&self, part: &WeightPart<'_>, cols: &Range<usize>) -> Scaled<'static> {
        let runs = cols.start / self.run..cols.end.div_ceil(self.run);
        Scaled {
            values: Cow::Owned(cut_rows(&self.values, part.cols, cols.clone())),
            run: self.run,
            scales: cut_rows(&self.scales, self.count(part.cols), runs),
        }
    }
}

/// A range of every row of `width`.
fn cut_rows<T: Copy>(values: &[T], width: usize, range: Range<usize>) -> Vec<T> {
    values.chunks_exact(width).flat_map(|row| &row[range.clone()]).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::f16;

    fn widened(part: &WeightPart<'_>) -> Vec<Vec<f32>> {
        assert_eq!(part.check_one(), Ok(()));
        let row = |n| {
            let mut row = vec![0.0; part.cols];
            dequant::part_row(part, n, &mut row);
            row
        };
        (0..part.rows).map(row).collect()
    }

    #[test]
    fn columns_keep_their_values_in_every_storage() {
        let bytes = |len: usize| -> Vec<u8> { (0..len).map(|at| (at * 37 % 113) as u8).collect() };
        let (rows, cols) = (3, 96);
        let scales: Vec<f16> = (1..=18).map(|at| f16::from_f32(at as f32 / 8.0)).collect();
        let grouped = |bits: usize, groups: Groups, count: usize| {
            Stored::Grouped(Grouped {
                bits,
                values: bytes(rows * cols * bits / 8).into(),
                groups,
                scales: scales[..rows * count].into(),
                zeros: (0..rows * count).map(|at| at as u16 % 16).collect(),
            })
        };
        let e4m3 = |run: usize| {
            let scales = (0..rows * cols.div_ceil(run)).map(|at| 1.0 + at as f32).collect();
            Stored::Scaled(Scaled { values: bytes(rows * cols).into(), run, scales })
        };
        let plain = |format: Format| {
            let data = bytes(rows * format.row_bytes(cols)).into();
            Stored::Plain { format, data }
        };
        let stored = [
            plain(Format::Bf16),
            plain(Format::Q8_0),
            grouped(8, Groups::Runs { size: 32, first: 0 }, 3),
            grouped(4, Groups::Runs { size: 40, first: 16 }, 3),
            grouped(4, Groups::Listed((0..96).map(|k| k * 5 % 6).collect()), 6),
            e4m3(32),
            e4m3(96),
            e4m3(40),
        ];
        for stored in stored {
            let whole = WeightPart { rows, cols, stored };
            let all = widened(&whole);
            for range in [0..32, 32..96, 16..24, 0..96, 40..80, 7..16, 8..25] {
                let wanted: Vec<&[f32]> = all.iter().map(|row| &row[range.clone()]).collect();
                let got = widened(&whole.columns(&range));
                assert_eq!(got, wanted, "columns {range:?} of {:?}", whole.stored);
            }
        }
    }
}
