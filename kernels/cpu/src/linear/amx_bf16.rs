//! Products of bf16 with AMX, at every number of rows.
//!
//! Two row tiles meet two weight tiles at a time; where there is only one, it is taken twice and
//! the copy's result dropped. Each sum runs over K in order in one tile.

use super::{
    Job,
    activations::Bf16,
    avx512::prefetch,
    packed::LANES,
    row_runs,
    tiles::{Shapes, Tiles, bf16_step, bf16_store, bf16_zero},
};
use std::ops::Range;

/// Row tiles, an even number, whose activations stay in the second-level cache.
const ROW_TILES: usize = 16;

/// All rows of `job` against the tiles `tiles` of its part.
///
/// # Safety
/// AMX was detected.
pub(super) unsafe fn tiles(job: &Job<'_>, x: Bf16<'_>, tiles: Range<usize>) {
    let mut heights = [0; 2];
    let mut configured = None;
    for run in row_runs(job.rows.clone(), ROW_TILES) {
        for tile in tiles.clone().step_by(2) {
            let columns = [tile, (tile + 1).min(tiles.end - 1)];
            for pair in row_runs(run.clone(), 2) {
                let rows = [pair.start, (pair.end - 1) / LANES * LANES];
                let wanted = rows.map(|first| x.tile(first).1);
                if heights != wanted {
                    drop(configured.take());
                    // SAFETY: AMX was detected, and the thread's earlier tiles are released.
                    configured = Some(unsafe { Tiles::configure(&shapes(wanted)) });
                    heights = wanted;
                }
                // SAFETY: tiles are configured for these heights.
                unsafe { four(job, x, rows, columns) };
            }
        }
    }
}

fn shapes([first, second]: [usize; 2]) -> Shapes {
    let (first, second, w) = ((first, 64), (second, 64), (LANES, 64));
    [first, first, second, second, first, second, w, w]
}

/// Row tiles that start at `rows` against weight tiles `columns`.
///
/// # Safety
/// Tiles are configured with the heights of these row tiles.
unsafe fn four(job: &Job<'_>, x: Bf16<'_>, rows: [usize; 2], columns: [usize; 2]) {
    let weights = columns.map(|tile| job.part.tile(tile));
    let x = rows.map(|first| x.tile(first));
    // SAFETY: as the caller promises.
    unsafe { bf16_zero() };
    let first = rows[0] == job.rows.start;
    for block in 0..weights[0].layout.blocks {
        let x = x.map(|(values, height)| {
            values[block * height..(block + 1) * height].as_ptr().cast::<u16>()
        });
        let w = weights.map(|tile| tile.block(block));
        if first {
            w.iter().for_each(|block| prefetch(block));
        }
        let w = w.map(<[u8]>::as_ptr);
        // SAFETY: a row tile's block is its height in rows of 64 bytes, a weight's 16 of them.
        unsafe { bf16_step(x, w) };
    }
    let mut sums = [[[0.0; LANES]; LANES]; 4];
    // SAFETY: as the caller promises.
    unsafe { bf16_store(&mut sums) };
    for (at, sums) in sums.iter().enumerate() {
        let (row, column) = (at / 2, at % 2);
        let copy = row > 0 && rows[0] == rows[1] || column > 0 && columns[0] == columns[1];
        for (r, sums) in sums.iter().enumerate().take(if copy { 0 } else { x[row].1 }) {
            job.store(rows[row] + r, columns[column], sums);
        }
    }
}
