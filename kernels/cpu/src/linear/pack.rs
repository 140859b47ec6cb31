//! Stored rows into tiles, once, at load.

mod groups;

use super::{
    Precision,
    packed::{BLOCK, LANES, NO_COLUMN, Part, Scales, TileFormat, TileLayout, quantised},
};
use crate::memory::Aligned;
use groups::Placed;
use half::f16;
use kernels::{Format, Grouped, KernelError, Scaled, Stored, WeightPart, plain::dequant::e4m3};

/// Packs the rows of `part`, whose first one makes output `first`. `part` is whole.
///
/// # Errors
/// No memory.
pub(super) fn pack(
    part: &WeightPart<'_>,
    first: usize,
    precision: Precision,
) -> Result<Part, KernelError> {
    match &part.stored {
        Stored::Plain { format, data } => plain(part, first, *format, data),
        Stored::Grouped(grouped) => integers(part, first, grouped),
        Stored::Scaled(scaled) if precision == Precision::Fast => rounded(part, first, scaled),
        Stored::Scaled(scaled) => codes(part, first, scaled),
        Stored::Random(_) => pack(&part.made(), first, precision),
    }
}

/// Makes the tiles: `lane` is called with the bytes of a tile, its lane, and the row that goes
/// there.
fn tiles(
    (rows, first): (usize, usize),
    format: TileFormat,
    layout: TileLayout,
    mut lane: impl FnMut(&mut [u8], usize, usize),
) -> Result<Part, KernelError> {
    let bytes = rows
        .div_ceil(LANES)
        .checked_mul(layout.bytes)
        .ok_or(KernelError::Memory { what: "a weight", bytes: usize::MAX })?;
    let mut data = Aligned::zeroed("a weight", bytes)?.in_large_pages();
    for (tile, bytes) in data.chunks_exact_mut(layout.bytes.max(1)).enumerate() {
        for row in tile * LANES..rows.min((tile + 1) * LANES) {
            lane(bytes, row % LANES, row);
        }
    }
    Ok(Part { format, first, rows, layout, order: None, data })
}

fn plain(
    part: &WeightPart<'_>,
    first: usize,
    stored: Format,
    data: &[u8],
) -> Result<Part, KernelError> {
    let format = TileFormat::from(stored);
    let layout = TileLayout::new(format, part.cols, 0);
    let row_bytes = stored.row_bytes(part.cols);
    tiles((part.rows, first), format, layout, |tile, lane, row| {
        let row = &data[row * row_bytes..][..row_bytes];
        match quantised(format) {
            None => pack_plain(stored, &layout, tile, lane, row),
            Some((bits, scales)) => Column { bits, scales, lane }.pack(stored, &layout, tile, row),
        }
    })
}

/// Integers in groups, in an order of columns in which no block is of two groups.
fn integers(
    part: &WeightPart<'_>,
    first: usize,
    grouped: &Grouped<'_>,
) -> Result<Part, KernelError> {
    let (format, zero) = match grouped.bits {
        4 => (TileFormat::Int4, 0),
        _ => (TileFormat::Int8, 128),
    };
    let Placed { order, groups, shift } = Placed::new(&grouped.groups, part.cols);
    let layout = TileLayout::new(format, groups.len() * BLOCK, shift);
    let count = grouped.count(part.rows);
    let mut values = Vec::new();
    let mut packed = tiles((part.rows, first), format, layout, |tile, lane, row| {
        values.clear();
        values.extend(grouped.integers(row, part.cols));
        let column = Column { bits: grouped.bits, scales: Scales::GroupZero, lane };
        for (block, group) in groups.iter().enumerate() {
            // A place without a column meets an activation of zero.
            let q = std::array::from_fn(|i| {
                let place = block * BLOCK + i;
                let col = order.as_ref().map_or(place, |order| order[place] as usize);
                values.get(col).copied().unwrap_or(zero)
            });
            let to = &mut tile[block * layout.block_bytes..][..layout.block_bytes];
            column.put(to, &q);
            let (scale, zero) = (row * count + group, layout.scales_of(Scales::GroupZero, block));
            let halves = [grouped.scales[scale], f16::from_f32(f32::from(grouped.zeros[scale]))];
            for (at, half) in halves.into_iter().enumerate() {
                tile[zero + (at * LANES + lane) * 2..][..2].copy_from_slice(&half.to_le_bytes());
            }
        }
    })?;
    packed.order = order;
    Ok(packed)
}

/// e4m3 as it is, with its scales.
fn codes(part: &WeightPart<'_>, first: usize, scaled: &Scaled<'_>) -> Result<Part, KernelError> {
    let shift = groups::shift(part.cols.div_ceil(BLOCK), |block| block * BLOCK / scaled.run);
    let layout = TileLayout::new(TileFormat::E4m3, part.cols, shift);
    let count = scaled.count(part.cols);
    tiles((part.rows, first), TileFormat::E4m3, layout, |tile, lane, row| {
        let values = &scaled.values[row * part.cols..][..part.cols];
        for (k, code) in values.iter().enumerate() {
            tile[k * LANES + lane] = *code;
        }
        for block in 0..layout.blocks {
            let scale = scaled.scales[row * count + block * BLOCK / scaled.run];
            let at = layout.run_scales_of(block) + lane * 4;
            tile[at..at + 4].copy_from_slice(&scale.to_le_bytes());
        }
    })
}

/// e4m3 rounded to blocks of 32 integers of 8 bits, as activations are: within 1/254 of the block's
/// largest value, where e4m3 itself is within 1/16 of each.
fn rounded(part: &WeightPart<'_>, first: usize, scaled: &Scaled<'_>) -> Result<Part, KernelError> {
    const { assert!(BLOCK == 32) };
    let layout = TileLayout::new(TileFormat::Q80, part.cols, 0);
    let count = scaled.count(part.cols);
    let mut row_values = vec![0.0; layout.blocks * BLOCK];
    tiles((part.rows, first), TileFormat::Q80, layout, |tile, lane, row| {
        let codes = &scaled.values[row * part.cols..][..part.cols];
        for (k, (value, code)) in row_values.iter_mut().zip(codes).enumerate() {
            *value = e4m3(*code) * scaled.scales[row * count + k / scaled.run];
        }
        let column = Column { bits: 8, scales: Scales::Half, lane };
        for (block, values) in row_values.as_chunks::<BLOCK>().0.iter().enumerate() {
            let (d, q) = nearest_integers(values);
            column.put(&mut tile[block * layout.block_bytes..][..layout.block_bytes], &q);
            let at = layout.scales_of(Scales::Half, block) + lane * 2;
            tile[at..at + 2].copy_from_slice(&d.to_le_bytes());
        }
    })
}

/// d and q + 128 so that d · q is nearest to each value; d is rounded before q is found.
fn nearest_integers(values: &[f32; BLOCK]) -> (f16, [u8; BLOCK]) {
    let largest = values.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    let d = f16::from_f32(largest / 127.0);
    let inverse = if d.to_f32() > 0.0 { d.to_f32().recip() } else { 0.0 };
    let q = values.map(|value| ((value * inverse).round().clamp(-128.0, 127.0) as i32 + 128) as u8);
    (d, q)
}

/// f32, f16 and bf16: the same bits in another order.
fn pack_plain(format: Format, layout: &TileLayout, tile: &mut [u8], lane: usize, row: &[u8]) {
    let size = format.block_bytes();
    for (k, value) in row.chunks_exact(size).enumerate() {
        let at = match format {
            Format::Bf16 => (k / 2 * LANES + lane) * 2 + k % 2,
            _ => k * LANES + lane,
        };
        debug_assert!((at + 1) * size <= layout.bytes);
        tile[at * size..][..size].copy_from_slice(value);
    }
}

/// 32 stored values: unsigned, with their scales.
struct StoredBlock {
    q: [u8; BLOCK],
    /// d and m or dmin, as f16 bytes.
    halves: [[u8; 2]; 2],
    /// Scale and min of the block, or the scales of its two halves.
    subs: [u8; 2],
}

/// One column of a tile, of a quantised format.
struct Column {
    bits: usize,
    scales: Scales,
    lane: usize,
}

impl Column {
    fn pack(&self, format: Format, layout: &TileLayout, tile: &mut [u8], row: &[u8]) {
        let lane = self.lane;
        for block in 0..layout.blocks {
            let stored = read_block(format, row, block * BLOCK);
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
fn read_block(format: Format, row: &[u8], at: usize) -> StoredBlock {
    let size = format.block_bytes();
    let block = &row[at / format.block_elements() * size..][..size];
    let half = |at: usize| [block[at], block[at + 1]];
    let mut stored = StoredBlock { q: [0; BLOCK], halves: [half(0), half(2)], subs: [0; 2] };
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
