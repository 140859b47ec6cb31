//! Repacks 4-bit weights into the records that the kernels load (see `int4.cuh`).
//!
//! Columns take places: first in the order in which they lie or, where the checkpoint permuted
//! them, group by group. Places without a column are filled with zeros, so that a run of `unit`
//! places is of one group and a stage is whole.

use super::part::Int4Part;
use kernels::KernelError;

/// Rows that a warp multiplies.
pub(super) const STRIP: usize = 64;
/// Columns of a record.
pub(super) const STAGE_COLS: usize = 128;
/// Columns of a lane's 16 bytes; the shortest run of columns with one scale.
const SLOT_COLS: usize = 32;
/// Longer runs that there are kernels for.
const UNITS: [usize; 2] = [64, 128];
const STRIP_BYTES: usize = STRIP * STAGE_COLS / 2;
const FACTOR_BYTES: usize = STRIP * 4;
/// 128 as bf16: with a small integer in the mantissa, 128 and that.
const BIASED: u32 = 0x4300;

/// Bytes of 64 rows and 128 columns whose scales are those of `unit` columns each.
pub(super) fn record_bytes(unit: usize) -> usize {
    STRIP_BYTES + STAGE_COLS / unit * FACTOR_BYTES
}

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
    pub(super) fn of(part: &Int4Part<'_>) -> Self {
        let in_order = |&k: &usize| part.group_of(k) == (k + part.first_col) / part.group;
        let permuted = !(0..part.cols).all(|k| in_order(&k));
        let plan = |unit| {
            let (lead, columns) = if permuted {
                (None, by_group(part, unit))
            } else {
                let lead = part.first_col % unit;
                (Some(lead), (0..lead).map(|_| None).chain((0..part.cols).map(Some)).collect())
            };
            Self::whole(part, unit, (lead, columns))
        };
        let larger = UNITS.into_iter().filter(|unit| part.group.is_multiple_of(*unit)).map(plan);
        larger.fold(
            plan(SLOT_COLS),
            |best, next| {
                if next.bytes() < best.bytes() { next } else { best }
            },
        )
    }

    fn whole(
        part: &Int4Part<'_>,
        unit: usize,
        (lead, mut columns): (Option<usize>, Vec<Option<usize>>),
    ) -> Self {
        columns.resize(columns.len().next_multiple_of(STAGE_COLS), None);
        let group = |places: &[Option<usize>]| {
            places.iter().flatten().next().map(|&column| part.group_of(column))
        };
        let groups = columns.chunks(unit).map(group).collect();
        Self { unit, columns, groups, lead }
    }

    pub(super) fn stages(&self) -> usize {
        self.columns.len() / STAGE_COLS
    }

    pub(super) fn record_bytes(&self) -> usize {
        record_bytes(self.unit)
    }

    /// Of one strip.
    fn bytes(&self) -> usize {
        self.stages() * self.record_bytes()
    }
}

/// Columns group by group, each group a whole number of units.
fn by_group(part: &Int4Part<'_>, unit: usize) -> Vec<Option<usize>> {
    let mut members = vec![Vec::new(); part.groups()];
    for k in 0..part.cols {
        members[part.group_of(k)].push(Some(k));
    }
    for group in &mut members {
        group.resize(group.len().next_multiple_of(unit), None);
    }
    members.concat()
}

/// N, K and the plan of stacked parts.
pub(super) fn check(parts: &[Int4Part<'_>]) -> Result<(usize, usize, Plan), KernelError> {
    let Some(first) = parts.first() else {
        return Err(KernelError::Weight("no int4 rows".into()));
    };
    let mut rows = 0;
    for part in parts {
        part.check()?;
        let same = (part.cols, part.group, part.first_col)
            == (first.cols, first.group, first.first_col)
            && (0..part.cols).all(|k| part.group_of(k) == first.group_of(k));
        if !same {
            return Err(KernelError::Weight(
                "stacked int4 parts differ in columns or their groups; keep them apart".into(),
            ));
        }
        rows += part.rows;
    }
    Ok((rows, first.cols, Plan::of(first)))
}

/// The records of strip `strip` of the stacked parts.
pub(super) fn strip(parts: &[Int4Part<'_>], plan: &Plan, strip: usize) -> Vec<u8> {
    let places = plan.columns.len();
    // [places, 64 rows] and [units, 64 rows]: rows past the last multiply by zero.
    let mut quants = vec![0u8; STRIP * places];
    let mut factors = vec![BIASED << 16; STRIP * plan.groups.len()];
    let mut first_row = 0;
    for part in parts {
        let first = (strip * STRIP).clamp(first_row, first_row + part.rows);
        let end = ((strip + 1) * STRIP).clamp(first_row, first_row + part.rows);
        for (place, column) in plan.columns.iter().enumerate() {
            let Some(column) = *column else { continue };
            for row in first..end {
                quants[place * STRIP + row % STRIP] = part.quant(row - first_row, column);
            }
        }
        for (unit, group) in plan.groups.iter().enumerate() {
            let Some(group) = *group else { continue };
            for row in first..end {
                let (zero, scale) =
                    (part.zero(row - first_row, group), part.scale(row - first_row, group));
                factors[unit * STRIP + row % STRIP] =
                    (BIASED | u32::from(zero)) << 16 | u32::from(scale.to_bits());
            }
        }
        first_row += part.rows;
    }
    let mut words = Vec::with_capacity(plan.bytes());
    for stage in 0..plan.stages() {
        stage_weights(&mut words, &quants[stage * STAGE_COLS * STRIP..]);
        let units = STAGE_COLS / plan.unit;
        for unit in stage * units..(stage + 1) * units {
            // [2 halves][8][4]: rows g, g + 8, g + 16, g + 24 of the half.
            let row = |i: usize| i / 32 * 32 + i / 4 % 8 + i % 4 * 8;
            let factor = |i| factors[unit * STRIP + row(i)];
            words.extend((0..STRIP).flat_map(|i| u32::to_le_bytes(factor(i))));
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
        let row = half * 32 + word / 2 * 16 + lane / 4;
        let place = slot * SLOT_COLS + lane % 4 * 8 + word % 2 * 4;
        // Register r of the fragment: row + 8 for the odd ones, two places on for the last two.
        let value = (0..4).fold(0, |value, r| {
            let at = (place + r / 2 * 2) * STRIP + row + r % 2 * 8;
            let pair = (u32::from(quants[at]), u32::from(quants[at + STRIP]));
            value | pair.0 << (4 * r) | pair.1 << (16 + 4 * r)
        });
        to.extend(value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::int4::part::Int4Layout;

    /// q = (3 n + 5 k) mod 16, zero = (n + group) mod 16, scale = n / 64 + group.
    struct Stored {
        qweight: Vec<u8>,
        qzeros: Vec<u8>,
        scales: Vec<u8>,
    }

    fn quant(n: usize, k: usize) -> usize {
        (3 * n + 5 * k) % 16
    }

    fn stored(rows: usize, cols: usize, groups: usize) -> Stored {
        let mut stored = Stored { qweight: vec![], qzeros: vec![], scales: vec![] };
        let word = |nibble: &dyn Fn(usize) -> usize| {
            (0..8).fold(0, |w, i| w | nibble(i) << (4 * i)) as u32
        };
        for k in (0..cols).step_by(8) {
            for n in 0..rows {
                stored.qweight.extend(word(&|i| quant(n, k + i)).to_le_bytes());
            }
        }
        for group in 0..groups {
            for n in (0..rows).step_by(8) {
                stored.qzeros.extend(word(&|i| (n + i + group) % 16).to_le_bytes());
            }
            for n in 0..rows {
                let scale = n as f32 / 64.0 + group as f32;
                stored.scales.extend(half::f16::from_f32(scale).to_le_bytes());
            }
        }
        stored
    }

    fn part(stored: &Stored, rows: usize, cols: usize, group: usize) -> Int4Part<'_> {
        Int4Part {
            layout: Int4Layout::GptqV2,
            rows,
            cols,
            group,
            first_col: 0,
            qweight: &stored.qweight,
            qzeros: &stored.qzeros,
            scales: &stored.scales,
            column_groups: None,
        }
    }

    /// The record's weight of a row and a place, as the kernel takes it apart.
    fn unpacked(record: &[u8], unit: usize, row: usize, place: usize) -> (u32, u32, f32) {
        let word = |at: usize| {
            u32::from_le_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]])
        };
        let (slot, half) = (place / 32, row / 32);
        let (matrix, g, lower) = (row % 32 / 16, row % 8, row % 16 / 8);
        let (lane, step, col) = (g * 4 + place % 32 / 8, place % 8 / 4, place % 4);
        let bits = word(slot * 1024 + half * 512 + lane * 16 + (matrix * 2 + step) * 4);
        let register = lower + col / 2 * 2;
        let quant = bits >> (4 * register + 16 * (col % 2)) & 15;
        let factors = STRIP_BYTES + place / unit * FACTOR_BYTES;
        let factor = word(factors + half * 128 + g * 16 + (matrix * 2 + lower) * 4);
        let zero = (factor >> 16) - BIASED;
        (quant, zero, half::f16::from_bits(factor as u16).to_f32())
    }

    #[test]
    fn every_weight_lies_where_the_kernels_look_for_it() {
        for group in [32, 64, 128] {
            let (rows, cols) = (72, 136);
            let stored = stored(rows, cols, cols.div_ceil(group));
            let parts = [part(&stored, rows, cols, group)];
            let (_, _, plan) = check(&parts).expect("whole parts");
            assert_eq!((plan.stages(), plan.lead), (2, Some(0)));
            for n in 0..rows {
                let strip = strip(&parts, &plan, n / STRIP);
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
        let (one, two) = (stored(24, 128, 1), stored(56, 128, 1));
        let parts = [part(&one, 24, 128, 128), part(&two, 56, 128, 128)];
        let (rows, cols, plan) = check(&parts).expect("whole parts");
        assert_eq!((rows, cols), (80, 128));
        let strips = [strip(&parts, &plan, 0), strip(&parts, &plan, 1)];
        for (row, n) in [(23, 23), (24, 0), (63, 39), (64, 40), (79, 55)] {
            let got = unpacked(&strips[row / STRIP], 128, row % STRIP, 77);
            assert_eq!(got.0, quant(n, 77) as u32, "row {row}");
            assert_eq!(got.2, n as f32 / 64.0, "row {row}");
        }
        // Rows that pad the last strip are zero.
        assert_eq!(unpacked(&strips[1], 128, 16, 77), (0, 0, 0.0));
        let narrow = stored(8, 64, 1);
        let differs = [part(&one, 24, 128, 128), part(&narrow, 8, 64, 128)];
        assert!(check(&differs).is_err());
    }

    #[test]
    fn columns_that_begin_inside_a_group_keep_their_place_in_it() {
        let stored = stored(8, 128, 2);
        let part = Int4Part { first_col: 72, ..part(&stored, 8, 128, 128) };
        let plan = Plan::of(&part);
        // 72 places before and 56 after: the first stage is of one group, the second of the next.
        assert_eq!((plan.unit, plan.lead, plan.stages()), (128, Some(72), 2));
        assert_eq!(plan.columns[72], Some(0));
        assert_eq!(plan.groups, [Some(0), Some(1)]);
        // Units of 64 need no third stage either, and have more factors; none spare a stage.
        let part = Int4Part { cols: 64, first_col: 120, ..part };
        let plan = Plan::of(&part);
        assert_eq!((plan.unit, plan.lead, plan.stages()), (64, Some(56), 1));
        assert_eq!(plan.groups, [Some(0), Some(1)]);
    }

    #[test]
    fn permuted_columns_lie_group_by_group() {
        let stored = stored(8, 128, 2);
        let groups: Vec<u8> = (0..128i32).flat_map(|k| (k % 2).to_le_bytes()).collect();
        let part = Int4Part { column_groups: Some(&groups), ..part(&stored, 8, 128, 64) };
        let plan = Plan::of(&part);
        assert_eq!((plan.unit, plan.lead, plan.stages()), (64, None, 1));
        assert_eq!(plan.columns[..3], [Some(0), Some(2), Some(4)]);
        assert_eq!(plan.columns[64..66], [Some(1), Some(3)]);
        assert_eq!(plan.groups, [Some(0), Some(1)]);
        // A g_idx that says what holds anyway is no permutation.
        let groups: Vec<u8> = (0..128i32).flat_map(|k| (k / 64).to_le_bytes()).collect();
        let part = Int4Part { column_groups: Some(&groups), ..part };
        assert_eq!(Plan::of(&part).lead, Some(0));
    }
}
