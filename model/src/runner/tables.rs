//! Which sequence has which of the device's block tables.
//!
//! There are as many as a step has sequences. One that waits may lose its table to another; it is
//! told all its blocks again when it goes on.

use engine::plan::{SequenceId, StepPlan};
use std::collections::HashMap;

/// A table of the device.
#[derive(Clone, Copy, Debug, Default)]
struct Table {
    of: Option<SequenceId>,
    /// The last plan that used it; 0 where none has.
    used: u64,
}

pub struct Tables {
    tables: Vec<Table>,
    by_sequence: HashMap<SequenceId, usize>,
    /// Plans so far.
    plans: u64,
}

/// A sequence's table in this step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub table: usize,
    /// Whether it was another's until now.
    pub is_new: bool,
}

impl Tables {
    pub fn new(count: usize) -> Self {
        let by_sequence = HashMap::with_capacity(count);
        Self { tables: vec![Table::default(); count], by_sequence, plans: 0 }
    }

    /// A table for each chunk of `plan`; `None` where there are fewer than chunks.
    pub fn places(&mut self, plan: &StepPlan) -> Option<Vec<Place>> {
        self.plans += 1;
        for id in &plan.released {
            if let Some(table) = self.by_sequence.remove(id) {
                self.tables[table] = Table::default();
            }
        }
        // No table of this plan's is given away.
        for chunk in &plan.chunks {
            if let Some(&table) = self.by_sequence.get(&chunk.sequence) {
                self.tables[table].used = self.plans;
            }
        }
        plan.chunks.iter().map(|chunk| self.place(chunk.sequence)).collect()
    }

    fn place(&mut self, id: SequenceId) -> Option<Place> {
        if let Some(&table) = self.by_sequence.get(&id) {
            return Some(Place { table, is_new: false });
        }
        let oldest = self.tables.iter().enumerate().min_by_key(|(_, table)| table.used);
        let table = oldest.filter(|(_, table)| table.used < self.plans)?.0;
        if let Some(other) = self.tables[table].of {
            self.by_sequence.remove(&other);
        }
        self.tables[table] = Table { of: Some(id), used: self.plans };
        self.by_sequence.insert(id, table);
        Some(Place { table, is_new: true })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::plan::{Chunk, Tokens, Want};

    fn plan(sequences: &[SequenceId], released: &[SequenceId]) -> StepPlan {
        let chunk = |&sequence| Chunk {
            sequence,
            start: 0,
            tokens: Tokens::LastSampled,
            next: None,
            blocks: Vec::new(),
            want: Want::Sample,
            admission: None,
        };
        let chunks = sequences.iter().map(chunk).collect();
        StepPlan { number: 0, chunks, released: released.to_vec() }
    }

    fn places(tables: &mut Tables, sequences: &[u64], released: &[u64]) -> Vec<(usize, bool)> {
        let places = tables.places(&plan(sequences, released)).expect("enough tables");
        places.iter().map(|place| (place.table, place.is_new)).collect()
    }

    #[test]
    fn sequences_keep_their_tables_and_lose_them_to_others_only_while_they_wait() {
        let mut tables = Tables::new(3);
        assert_eq!(places(&mut tables, &[10, 11], &[]), [(0, true), (1, true)]);
        assert_eq!(places(&mut tables, &[11, 10], &[]), [(1, false), (0, false)]);
        assert_eq!(places(&mut tables, &[12], &[]), [(2, true)]);
        // 10 ended: its table is free.
        assert_eq!(places(&mut tables, &[13, 12], &[10]), [(0, true), (2, false)]);
        // 11 has waited longest.
        assert_eq!(places(&mut tables, &[12, 14], &[]), [(2, false), (1, true)]);
        // And comes back, for 13, which waits now.
        assert_eq!(places(&mut tables, &[11, 12, 14], &[]), [(0, true), (2, false), (1, false)]);
        assert_eq!(tables.places(&plan(&[1, 2, 3, 4], &[])), None);
    }
}
