//! Repacks 4-bit weights into the records that the kernels load (see `skinny.cuh`).
//!
//! Columns take places: first in the order in which they lie or, where the checkpoint permuted
//! them, group by group. Places without a column are filled with zeros, so that a run of `unit`
//! places is of one group and a stage is whole.

use super::part::{Columns, Int4Part};
use crate::skinny::{Extent, Numbers, STRIP};

/// Columns of a record.
const STAGE_COLS: usize = 128;
/// Columns of a lane's 16 bytes; the shortest run of columns with one scale.
const SLOT_COLS: usize = 32;
/// Longer runs that there are kernels for.
const UNITS: [usize; 2] = [64, 128];
const STRIP_BYTES: usize = STRIP * STAGE_COLS / 2;
/// 128 as bf16: with a small integer in the mantissa, 128 and that.
const BIASED: u32 = 0x4300;

/// Which column takes which place.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// Consecutive places of one group.
    pub unit: usize,
    /// The column at each place, a whole number of stages.
    pub columns: Vec<Option<usize>>,
    /// The group of each unit, where it has a column.
    groups: Vec<Option<usize>>,
    /// Places before column 0 where columns lie in their own order; none where they do not.
    pub lead: Option<usize>,
}

impl Plan {
    pub(super) fn of(of: &Columns<'_>) -> Self {
        let plan = |unit| {
            let lead = of.first_col().map(|first| first % unit);
            let columns = match lead {
                None => by_group(of, unit),
                Some(lead) => (0..lead).map(|_| None).chain((0..of.cols).map(Some)).collect(),
            };
            Self::whole(of, unit, (lead, columns))
        };
        let larger = UNITS.into_iter().filter(|unit| of.allows(*unit)).map(plan);
        larger.fold(
            plan(SLOT_COLS),
            |best, next| {
                if next.bytes() < best.bytes() { next } else { best }
            },
        )
    }

    fn whole(
        of: &Columns<'_>,
        unit: usize,
        (lead, mut columns): (Option<usize>, Vec<Option<usize>>),
    ) -> Self {
        columns.resize(columns.len().next_multiple_of(STAGE_COLS), None);
        let group = |places: &[Option<usize>]| {
            places.iter().flatten().next().map(|&column| of.groups.of(column))
        };
        let groups = columns.chunks(unit).map(group).collect();
        Self { unit, columns, groups, lead }
    }

    fn stages(&self) -> usize {
        self.columns.len() / STAGE_COLS
    }

    fn record_bytes(&self) -> usize {
        Numbers::Int4 { group: self.unit }.record_bytes()
    }

    /// Of one strip.
    fn bytes(&self) -> usize {
        self.stages() * self.record_bytes()
    }
}

/// Columns group by group, each group a whole number of units.
fn by_group(of: &Columns<'_>, unit: usize) -> Vec<Option<usize>> {
    let mut members = vec![Vec::new(); of.count];
    for k in 0..of.cols {
        members[of.groups.of(k)].push(Some(k));
    }
    for group in &mut members {
        group.resize(group.len().next_multiple_of(unit), None);
    }
    members.concat()
}

/// The part that has row `row` of the stack, and which of its rows that is.
fn part_of<'p, 'a>(parts: &'p [Int4Part<'a>], mut row: usize) -> Option<(&'p Int4Part<'a>, usize)> {
    for part in parts {
        if row < part.rows {
            return Some((part, row));
        }
        row -= part.rows;
    }
    None
}

/// The records of strip `strip` of the stacked parts.
pub(super) fn strip(parts: &[Int4Part<'_>], plan: &Plan, extent: Extent, strip: usize) -> Vec<u8> {
    let places = plan.columns.len();
    // [places, 64 rows] and [units, 64 rows]: rows past the last multiply by zero.
    let mut quants = vec![0u8; STRIP * places];
    let mut factors = vec![BIASED << 16; STRIP * plan.groups.len()];
    let rows = strip * STRIP..((strip + 1) * STRIP).min(extent.rows);
    let rows: Vec<_> = rows.filter_map(|row| part_of(parts, extent.row_of_matrix(row))).collect();
    for (place, column) in plan.columns.iter().enumerate() {
        let Some(column) = *column else { continue };
        for (at, (part, row)) in rows.iter().enumerate() {
            quants[place * STRIP + at] = part.quant(*row, column);
        }
    }
    for (unit, group) in plan.groups.iter().enumerate() {
        let Some(group) = *group else { continue };
        for (at, (part, row)) in rows.iter().enumerate() {
            let (zero, scale) = (part.zero(*row, group), part.scale(*row, group));
            factors[unit * STRIP + at] =
                (BIASED | u32::from(zero)) << 16 | u32::from(scale.to_bits());
        }
    }
    let mut words = Vec::with_capacity(plan.bytes());
    for stage in 0..plan.stages() {
        stage_weights(&mut words, &quants[stage * STAGE_COLS * STRIP..]);
        let units = STAGE_COLS / plan.unit;
        for unit in stage * units..(stage + 1) * units {
            let of_rows = &factors[unit * STRIP..][..STRIP];
            words.extend(of_rows.iter().flat_map(|factor| factor.to_le_bytes()));
        }
    }
    words
}

/// The weights of a record, [4 slots][2 halves][32 lanes][4 words], of quants [128 places, 64].
fn stage_weights(to: &mut Vec<u8>, quants: &[u8]) {
    let words = STRIP_BYTES / 4;
    for i in 0..words {
        let (word, lane) = (i % 4, i / 4 % 32);
        let (half, slot) = (i / 128 % 2, i / 256);
        let row = half * 32 + lane / 4 * 4 + word / 2 * 2;
        let place = slot * SLOT_COLS + lane % 4 * 8 + word % 2 * 4;
        // Register r of the fragment: the next row for the odd ones, two places on for the last.
        let value = (0..4).fold(0, |value, r| {
            let at = (place + r / 2 * 2) * STRIP + row + r % 2;
            let pair = (u32::from(quants[at]), u32::from(quants[at + STRIP]));
            value | pair.0 << (4 * r) | pair.1 << (16 + 4 * r)
        });
        to.extend(value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::f16;
    use kernels::{Grouped, Groups};

    fn quant(n: usize, k: usize) -> usize {
        (3 * n + 5 * k) % 16
    }

    /// q = (3 n + 5 k) mod 16, zero = (n + group) mod 16, scale = n / 64 + group.
    fn stored(rows: usize, cols: usize, groups: Groups) -> Grouped<'static> {
        let count = (0..cols).map(|k| groups.of(k)).max().unwrap_or(0) + 1;
        let values: Vec<u8> = (0..rows * cols).map(|i| quant(i / cols, i % cols) as u8).collect();
        let each = || (0..rows).flat_map(|n| (0..count).map(move |group| (n, group)));
        let scale = |(n, group): (usize, usize)| f16::from_f32(n as f32 / 64.0 + group as f32);
        let zeros = each().map(|(n, group)| ((n + group) % 16) as u16).collect();
        let scales = each().map(scale).collect();
        Grouped { bits: 4, values: values.into(), groups, scales, zeros }
    }

    fn runs(rows: usize, cols: usize, size: usize) -> Grouped<'static> {
        stored(rows, cols, Groups::Runs { size, first: 0 })
    }

    /// The record's weight of a row and a place, as the kernel takes it apart.
    fn unpacked(record: &[u8], unit: usize, row: usize, place: usize) -> (u32, u32, f32) {
        let word = |at: usize| {
            u32::from_le_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]])
        };
        let (slot, half) = (place / 32, row / 32);
        let (matrix, g, lower) = (row % 4 / 2, row % 32 / 4, row % 2);
        let (lane, step, col) = (g * 4 + place % 32 / 8, place % 8 / 4, place % 4);
        let bits = word(slot * 1024 + half * 512 + lane * 16 + (matrix * 2 + step) * 4);
        let register = lower + col / 2 * 2;
        let quant = bits >> (4 * register + 16 * (col % 2)) & 15;
        let factor = word(STRIP_BYTES + place / unit * STRIP * 4 + row * 4);
        let zero = (factor >> 16) - BIASED;
        (quant, zero, half::f16::from_bits(factor as u16).to_f32())
    }

    #[test]
    fn every_weight_lies_where_the_kernels_look_for_it() {
        for group in [32, 64, 128] {
            let (rows, cols) = (72, 136);
            let stored = runs(rows, cols, group);
            let parts = [Int4Part { rows, cols, grouped: &stored }];
            let plan = Plan::of(&parts[0].columns());
            assert_eq!((plan.stages(), plan.lead), (2, Some(0)));
            for n in 0..rows {
                let strip = strip(&parts, &plan, Extent::plain((rows, cols)), n / STRIP);
                assert_eq!(strip.len(), 2 * plan.record_bytes());
                for k in 0..cols {
                    let record = &strip[k / STAGE_COLS * plan.record_bytes()..];
                    let got = unpacked(record, plan.unit, n % STRIP, k % STAGE_COLS);
                    let zero = (n + k / group) % 16;
                    let scale = n as f32 / 64.0 + (k / group) as f32;
                    assert_eq!(got, (quant(n, k) as u32, zero as u32, scale), "row {n} column {k}");
                }
            }
        }
    }

    #[test]
    fn the_rows_of_stacked_parts_follow_each_other() {
        let (one, two) = (runs(24, 128, 128), runs(56, 128, 128));
        let part = |rows, grouped| Int4Part { rows, cols: 128, grouped };
        let parts = [part(24, &one), part(56, &two)];
        let plan = Plan::of(&parts[0].columns());
        let strips = [0, 1].map(|at| strip(&parts, &plan, Extent::plain((80, 128)), at));
        for (row, n) in [(23, 23), (24, 0), (63, 39), (64, 40), (79, 55)] {
            let got = unpacked(&strips[row / STRIP], 128, row % STRIP, 77);
            assert_eq!(got.0, quant(n, 77) as u32, "row {row}");
            assert_eq!(got.2, n as f32 / 64.0, "row {row}");
        }
        // Rows that pad the last strip are zero.
        assert_eq!(unpacked(&strips[1], 128, 16, 77), (0, 0, 0.0));
    }

    #[test]
    fn rows_of_gate_and_up_lie_in_turn() {
        let (mut gate, up) = (runs(40, 128, 128), runs(40, 128, 128));
        gate.scales.iter_mut().for_each(|scale| *scale = f16::from_f32(-scale.to_f32() - 1.0));
        let part = |grouped| Int4Part { rows: 40, cols: 128, grouped };
        let parts = [part(&gate), part(&up)];
        let plan = Plan::of(&parts[0].columns());
        let extent = Extent { pairs: 40, ..Extent::plain((80, 128)) };
        let strips = [0, 1].map(|at| strip(&parts, &plan, extent, at));
        for n in 0..40 {
            let scale = n as f32 / 64.0;
            for (row, scale) in [(2 * n, -scale - 1.0), (2 * n + 1, scale)] {
                let got = unpacked(&strips[row / STRIP], 128, row % STRIP, 77);
                assert_eq!(got, (quant(n, 77) as u32, n as u32 % 16, scale), "row {row}");
            }
        }
        // Rows that pad the last strip are zero.
        assert_eq!(unpacked(&strips[1], 128, 16, 77), (0, 0, 0.0));
    }

    #[test]
    fn columns_that_begin_inside_a_group_keep_their_place_in_it() {
        let inside = |cols, first| stored(8, cols, Groups::Runs { size: 128, first });
        let grouped = inside(128, 72);
        let plan = Plan::of(&Int4Part { rows: 8, cols: 128, grouped: &grouped }.columns());
        // 72 places before and 56 after: the first stage is of one group, the second of the next.
        assert_eq!((plan.unit, plan.lead, plan.stages()), (128, Some(72), 2));
        assert_eq!(plan.columns[72], Some(0));
        assert_eq!(plan.groups, [Some(0), Some(1)]);
        // Units of 64 need no third stage either, and have more factors; none spare a stage.
        let grouped = inside(64, 120);
        let plan = Plan::of(&Int4Part { rows: 8, cols: 64, grouped: &grouped }.columns());
        assert_eq!((plan.unit, plan.lead, plan.stages()), (64, Some(56), 1));
        assert_eq!(plan.groups, [Some(0), Some(1)]);
    }

    #[test]
    fn permuted_columns_lie_group_by_group() {
        let grouped = stored(8, 128, Groups::Listed((0..128).map(|k| k % 2).collect()));
        let plan = Plan::of(&Int4Part { rows: 8, cols: 128, grouped: &grouped }.columns());
        assert_eq!((plan.unit, plan.lead, plan.stages()), (64, None, 1));
        assert_eq!(plan.columns[..3], [Some(0), Some(2), Some(4)]);
        assert_eq!(plan.columns[64..66], [Some(1), Some(3)]);
        assert_eq!(plan.groups, [Some(0), Some(1)]);
    }
}
