//! Stored rows into tiles, once, at load.

use super::packed::{BLOCK, LANES, Part, Scales, TileLayout, quantised};
use crate::memory::Aligned;
use kernels::{Format, KernelError, WeightPart};

/// Packs the rows of `part`, whose first one makes output `first`.
///
/// # Errors
/// Columns that split a block or lie outside the row, data of another length, no memory.
pub(super) fn pack(part: &WeightPart<'_>, first: usize) -> Result<Part, KernelError> {
    let row_bytes = check(part)?;
    let layout = TileLayout::new(part.format, part.cols.start, part.cols.len());
    let tiles = part.rows.div_ceil(LANES);
    let bytes = tiles
        .checked_mul(layout.bytes)
        .ok_or(KernelError::Memory { what: "a weight", bytes: usize::MAX })?;
    let mut data = Aligned::zeroed("a weight", bytes)?.in_large_pages();
    if row_bytes > 0 && layout.bytes > 0 {
        let stored = part.data.chunks(row_bytes * LANES);
        for (tile, rows) in data.chunks_exact_mut(layout.bytes).zip(stored) {
            for (lane, row) in rows.chunks_exact(row_bytes).enumerate() {
                match quantised(part.format) {
                    None => pack_plain(part, &layout, tile, lane, row),
                    Some((bits, scales)) => {
                        let column = Column { format: part.format, bits, scales, lane };
                        column.pack(part.cols.start, &layout, tile, row);
                    }
                }
            }
        }
    }
    Ok(Part { format: part.format, first, rows: part.rows, layout, data })
}

/// Bytes of one stored row, once everything about the part has been found to fit.
fn check(part: &WeightPart<'_>) -> Result<usize, KernelError> {
    let (format, cols) = (part.format, &part.cols);
    let refuse = |why: String| Err(KernelError::Weight(why));
    if !part.stored_cols.is_multiple_of(format.block_elements()) {
        return refuse(format!(
            "{} columns are not whole {format:?} blocks of {}",
            part.stored_cols,
            format.block_elements()
        ));
    }
    let split = format.split_elements();
    if cols.start > cols.end || cols.end > part.stored_cols {
        return refuse(format!("columns {cols:?} lie outside the {} stored", part.stored_cols));
    }
    if !cols.start.is_multiple_of(split) || !cols.end.is_multiple_of(split) {
        return refuse(format!("columns {cols:?} split a {format:?} block of {split}"));
    }
    let row_bytes = (part.stored_cols / format.block_elements()).checked_mul(format.block_bytes());
    match row_bytes.and_then(|bytes| bytes.checked_mul(part.rows).map(|all| (bytes, all))) {
        Some((row_bytes, all)) if all == part.data.len() => Ok(row_bytes),
        _ => refuse(format!(
            "{} rows of {} {format:?} columns do not take {} bytes",
            part.rows,
            part.stored_cols,
            part.data.len()
        )),
    }
}

/// f32, f16 and bf16: the same bits in another order.
fn pack_plain(
    part: &WeightPart<'_>,
    layout: &TileLayout,
    tile: &mut [u8],
    lane: usize,
    row: &[u8],
) {
    let size = part.format.block_bytes();
    let values = &row[part.cols.start * size..part.cols.end * size];
    for (k, value) in values.chunks_exact(size).enumerate() {
        let at = match part.format {
            Format::Bf16 => (k / 2 * LANES + lane) * 2 + k % 2,
            _ => k * LANES + lane,
        };
        debug_assert!((at + 1) * size <= layout.bytes);
        tile[at * size..][..size].copy_from_slice(value);
    }
}

/// 32 stored values: unsigned, with their scales.
struct Stored {
    q: [u8; BLOCK],
    /// d and m or dmin, as f16 bytes.
    halves: [[u8; 2]; 2],
    /// Scale and min of the block, or the scales of its two halves.
    subs: [u8; 2],
}

/// One column of a tile, of a quantised format.
struct Column {
    format: Format,
    bits: usize,
    scales: Scales,
    lane: usize,
}

impl Column {
    fn pack(&self, start: usize, layout: &TileLayout, tile: &mut [u8], row: &[u8]) {
        let lane = self.lane;
        for block in 0..layout.blocks {
            let stored = read_block(self.format, row, start + block * BLOCK);
            let values = &mut tile[block * layout.block_bytes..][..layout.block_bytes];
            self.put(values, &stored.q);
            let at = layout.scales_of(self.scales, block) + lane * 2;
            tile[at..at + 2].copy_from_slice(&stored.halves[0]);
            if matches!(self.scales, Scales::HalfMin | Scales::SuperMin) {
                tile[at + 2 * LANES..][..2].copy_from_slice(&stored.halves[1]);
            }
            if matches!(self.scales, Scales::SuperMin | Scales::SuperHalves) {
                let at = layout.subs_of(block) + lane;
                tile[at] = stored.subs[0];
                tile[at + LANES] = stored.subs[1];
            }
        }
    }

    /// Spreads 32 values over the planes of a tile's block.
    fn put(&self, block: &mut [u8], q: &[u8; BLOCK]) {
        let group =
            |g: usize| u32::from_le_bytes([q[g * 4], q[g * 4 + 1], q[g * 4 + 2], q[g * 4 + 3]]);
        let mut or = |row: usize, bits: u32| {
            let word = &mut block[(row * LANES + self.lane) * 4..][..4];
            let old = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            word.copy_from_slice(&(old | bits).to_le_bytes());
        };
        for g in 0..BLOCK / 4 {
            let word = group(g);
            match self.bits {
                8 => or(g, word),
                bits => {
                    or(g % 4, (word & 0x0f0f_0f0f) << (g / 4 * 4));
                    match bits {
                        5 => or(4, (word >> 4 & 0x0101_0101) << g),
                        6 => or(4 + g / 4, (word >> 4 & 0x0303_0303) << (g % 4 * 2)),
                        _ => {}
                    }
                }
            }
        }
    }
}

/// The 32 values of a stored row that start at element `at`.
fn read_block(format: Format, row: &[u8], at: usize) -> Stored {
    let size = format.block_bytes();
    let block = &row[at / format.block_elements() * size..][..size];
    let half = |at: usize| [block[at], block[at + 1]];
    let mut stored = Stored { q: [0; BLOCK], halves: [half(0), half(2)], subs: [0; 2] };
    let q = &mut stored.q;
    match format {
        Format::Q4_0 => nibbles(q, &block[2..18]),
        Format::Q4_1 => nibbles(q, &block[4..20]),
        Format::Q5_0 => {
            nibbles(q, &block[6..22]);
            fifth_bits(q, &block[2..6]);
        }
        Format::Q5_1 => {
            nibbles(q, &block[8..24]);
            fifth_bits(q, &block[4..8]);
        }
        Format::Q8_0 => q.iter_mut().zip(&block[2..34]).for_each(|(q, &b)| *q = b ^ 0x80),
        Format::Q4K | Format::Q5K => {
            let sub = at / BLOCK % 8;
            stored.subs = six_bit_scales(&block[4..16], sub);
            let low = if format == Format::Q4K { 16 } else { 48 };
            let bytes = &block[low + sub / 2 * 32..][..32];
            q.iter_mut().zip(bytes).for_each(|(q, &b)| *q = b >> (sub % 2 * 4) & 15);
            if format == Format::Q5K {
                let high = &block[16..48];
                q.iter_mut().zip(high).for_each(|(q, &b)| *q |= (b >> sub & 1) << 4);
            }
        }
        Format::Q6K => {
            let sub = at / BLOCK % 8;
            let (half, quarter) = (sub / 4, sub % 4);
            let low = &block[half * 64 + quarter % 2 * 32..][..32];
            let high = &block[128 + half * 32..][..32];
            for (q, (&low, &high)) in q.iter_mut().zip(low.iter().zip(high)) {
                *q = low >> (quarter / 2 * 4) & 15 | (high >> (quarter * 2) & 3) << 4;
            }
            stored.subs = [block[192 + sub * 2], block[193 + sub * 2]];
            stored.halves[0] = [block[208], block[209]];
        }
        Format::F32 | Format::F16 | Format::Bf16 => unreachable!("plain numbers have no blocks"),
    }
    stored
}

/// The low halves of 16 bytes, then the high ones.
fn nibbles(q: &mut [u8; BLOCK], bytes: &[u8]) {
    for (i, &byte) in bytes.iter().enumerate() {
        q[i] = byte & 15;
        q[i + 16] = byte >> 4;
    }
}

/// Adds bit 4 of each value from 32 bits.
fn fifth_bits(q: &mut [u8; BLOCK], bits: &[u8]) {
    for (i, q) in q.iter_mut().enumerate() {
        *q |= (bits[i / 8] >> (i % 8) & 1) << 4;
    }
}

/// Scale and min of sub-block `sub` of 8, six bits each, in 12 bytes.
fn six_bit_scales(packed: &[u8], sub: usize) -> [u8; 2] {
    if sub < 4 {
        [packed[sub] & 63, packed[sub + 4] & 63]
    } else {
        [
            packed[sub + 4] & 15 | packed[sub - 4] >> 6 << 4,
            packed[sub + 4] >> 4 | packed[sub] >> 6 << 4,
        ]
    }
}
