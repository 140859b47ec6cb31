//! In which order columns with groups of their own lie in tiles.

use super::{BLOCK, NO_COLUMN};
use kernels::Groups;

/// Blocks that may share their scales at most: 2^this.
const SHIFT_MAX: u32 = 16;

/// The columns of a matrix in blocks that are of one group each.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Placed {
    /// The column at each place, `NO_COLUMN` for none; `None` where column k is at place k.
    pub order: Option<Vec<u32>>,
    /// The group of each block.
    pub groups: Vec<usize>,
    /// Each 2^this blocks are of one group.
    pub shift: u32,
}

impl Placed {
    pub fn new(groups: &Groups, cols: usize) -> Self {
        let mut columns: Vec<u32> = (0..cols as u32).collect();
        columns.sort_by_key(|&k| groups.of(k as usize));
        let (mut order, mut of_block) = (Vec::with_capacity(cols), Vec::new());
        for run in columns.chunk_by(|&a, &b| groups.of(a as usize) == groups.of(b as usize)) {
            order.extend_from_slice(run);
            order.resize(order.len().next_multiple_of(BLOCK), NO_COLUMN);
            of_block.resize(order.len() / BLOCK, groups.of(run[0] as usize));
        }
        let as_they_are = order[..cols].iter().enumerate().all(|(at, &k)| k as usize == at);
        Self {
            order: (!as_they_are).then_some(order),
            shift: shift(of_block.len(), |block| of_block[block]),
            groups: of_block,
        }
    }
}

/// The largest s so that each 2^s of `blocks` blocks are of one group.
pub(super) fn shift(blocks: usize, group: impl Fn(usize) -> usize) -> u32 {
    let shared = |s: &u32| (0..blocks).all(|block| group(block) == group(block >> s << s));
    (0..=SHIFT_MAX).rev().find(shared).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_whole_blocks_lie_as_they_are() {
        let placed = Placed::new(&Groups::Runs { size: 128, first: 0 }, 300);
        assert_eq!(placed.order, None);
        assert_eq!(placed.groups, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]);
        assert_eq!(placed.shift, 2);
        let whole = Placed::new(&Groups::Runs { size: 896, first: 0 }, 896);
        assert_eq!((whole.order, whole.shift), (None, SHIFT_MAX));
    }

    #[test]
    fn columns_that_begin_inside_a_group_lie_in_blocks_of_their_own() {
        let placed = Placed::new(&Groups::Runs { size: 64, first: 40 }, 100);
        let order = placed.order.expect("another order");
        assert_eq!(order[..24], (0..24).collect::<Vec<u32>>());
        assert_eq!(order[24..32], [NO_COLUMN; 8]);
        assert_eq!(order[32], 24);
        assert_eq!(placed.groups, [0, 1, 1, 2]);
    }

    #[test]
    fn listed_groups_are_gathered() {
        let placed = Placed::new(&Groups::Listed(vec![1, 0, 1, 0]), 4);
        let order = placed.order.expect("another order");
        assert_eq!((&order[..2], order[2], &order[32..34]), (&[1, 3][..], NO_COLUMN, &[0, 2][..]));
        assert_eq!((placed.groups, placed.shift), (vec![0, 1], 0));
    }
}
