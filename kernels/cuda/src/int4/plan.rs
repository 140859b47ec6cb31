//! Which place of the records (see `skinny.cuh`) a column of 4-bit weights takes.
//!
//! Columns take places: first in the order in which they lie or, where the checkpoint permuted
//! them, group by group. Places without a column are filled with zeros, so that a run of `unit`
//! places is of one group and a stage is whole.

use super::part::Columns;
use crate::skinny::Numbers;

/// Columns of a record.
const STAGE_COLS: usize = 128;
/// Columns of a lane's 16 bytes; the shortest run of columns with one scale.
const SLOT_COLS: usize = 32;
/// Longer runs that there are kernels for.
const UNITS: [usize; 2] = [64, 128];

/// Which column takes which place.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// Consecutive places of one group.
    pub unit: usize,
    /// The column at each place, a whole number of stages.
    pub columns: Vec<Option<usize>>,
    /// The group of each unit, where it has a column.
    pub groups: Vec<Option<usize>>,
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

#[cfg(test)]
mod tests {
    use super::*;
    use kernels::Groups;

    fn plan(cols: usize, groups: &Groups) -> Plan {
        let count = (0..cols).map(|k| groups.of(k)).max().unwrap_or(0) + 1;
        Plan::of(&Columns { cols, groups, count })
    }

    #[test]
    fn columns_that_begin_inside_a_group_keep_their_place_in_it() {
        let inside = |cols, first| plan(cols, &Groups::Runs { size: 128, first });
        let plan = inside(128, 72);
        // 72 places before and 56 after: the first stage is of one group, the second of the next.
        assert_eq!((plan.unit, plan.lead, plan.stages()), (128, Some(72), 2));
        assert_eq!(plan.columns[72], Some(0));
        assert_eq!(plan.groups, [Some(0), Some(1)]);
        // Units of 64 need no third stage either, and have more factors; none spare a stage.
        let plan = inside(64, 120);
        assert_eq!((plan.unit, plan.lead, plan.stages()), (64, Some(56), 1));
        assert_eq!(plan.groups, [Some(0), Some(1)]);
    }

    #[test]
    fn permuted_columns_lie_group_by_group() {
        let plan = plan(128, &Groups::Listed((0..128).map(|k| k % 2).collect()));
        assert_eq!((plan.unit, plan.lead, plan.stages()), (64, None, 1));
        assert_eq!(plan.columns[..3], [Some(0), Some(2), Some(4)]);
        assert_eq!(plan.columns[64..66], [Some(1), Some(3)]);
        assert_eq!(plan.groups, [Some(0), Some(1)]);
    }
}
