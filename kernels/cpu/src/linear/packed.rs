//! The packed weight: tiles of 16 outputs, so that a vector register holds the same k of 16
//! columns.
//!
//! A tile is a run of blocks, each 32 values of k for 16 columns, and after them the scales:
//! - f32, f16: [32][16]; bf16: [16][16][2], the pairs of k side by side that tile products want.
//! - quantised: [8][16][4] unsigned bytes (k in fours), cut into planes: the low nibbles of group g
//!   lie in word row g % 4, shifted by 4 (g / 4); bit 4 of group g is bit g of one more word row,
//!   bits 4 and 5 are pair g % 4 of word row g / 4. Eight-bit values lie as they are, offset by
//!   128.
//! - e4m3: [32][16] codes.
//! - scales stay as stored, f16 and, for super-blocks of 256, one byte for each sub-block. Groups
//!   of columns and runs of e4m3 have theirs once for 2^`group_shift` blocks.
//!
//! K is padded to whole blocks and N to whole tiles with zeros. Where groups are no runs of whole
//! blocks, columns lie in another order than the matrix has them (`Part::order`).

use crate::memory::Aligned;
use kernels::Format;

/// Columns of a tile.
pub(super) const LANES: usize = 16;
/// Values of k in a block.
pub(super) const BLOCK: usize = 32;
/// Blocks in a super-block of a K-quant.
const SUPER: usize = 8;

/// One value for each column of a tile.
pub(super) type Lanes = [f32; LANES];

/// What the scales of a block consist of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scales {
    /// d as f16.
    Half,
    /// d and m as f16.
    HalfMin,
    /// d and dmin as f16 for a super-block, a scale and a min byte for each block.
    SuperMin,
    /// d as f16 for a super-block, two signed bytes for each block: its first and second 16 values.
    SuperHalves,
    /// d and a zero point as f16, for some blocks together: min = d · (ZERO − zero point), exact in
    /// f32.
    GroupZero,
}

impl Scales {
    /// Whether a value is more than d · (q − ZERO).
    pub const fn has_min(self) -> bool {
        matches!(self, Self::HalfMin | Self::SuperMin | Self::GroupZero)
    }
}

/// How the values of a tile are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TileFormat {
    F32,
    F16,
    Bf16,
    E4m3,
    Q40,
    Q41,
    Q50,
    Q51,
    Q80,
    Q4K,
    Q5K,
    Q6K,
    Int4,
    Int8,
}

impl From<Format> for TileFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::F32 => Self::F32,
            Format::F16 => Self::F16,
            Format::Bf16 => Self::Bf16,
            Format::Q4_0 => Self::Q40,
            Format::Q4_1 => Self::Q41,
            Format::Q5_0 => Self::Q50,
            Format::Q5_1 => Self::Q51,
            Format::Q8_0 => Self::Q80,
            Format::Q4K => Self::Q4K,
            Format::Q5K => Self::Q5K,
            Format::Q6K => Self::Q6K,
        }
    }
}

/// A quantised format as the kernels see it: value = d · (q − ZERO) + min.
pub(super) trait BlockFormat {
    const BITS: usize;
    const ZERO: i32;
    const SCALES: Scales;
}

macro_rules! block_formats {
    ($($name:ident: $bits:literal, $zero:literal, $scales:ident;)*) => {$(
        pub(super) struct $name;
        impl BlockFormat for $name {
            const BITS: usize = $bits;
            const ZERO: i32 = $zero;
            const SCALES: Scales = Scales::$scales;
        }
    )*};
}

block_formats! {
    Q40: 4, 8, Half;
    Q41: 4, 0, HalfMin;
    Q50: 5, 16, Half;
    Q51: 5, 0, HalfMin;
    Q80: 8, 128, Half;
    Q4K: 4, 0, SuperMin;
    Q5K: 5, 0, SuperMin;
    Q6K: 6, 32, SuperHalves;
    Int4: 4, 0, GroupZero;
    Int8: 8, 128, GroupZero;
}

/// Runs the first expression with `$F` naming a quantised format's type, or the second.
macro_rules! with_block_format {
    ($format:expr, $F:ident => $body:expr, dense => $dense:expr) => {{
        use $crate::linear::packed::{self, TileFormat};
        match $format {
            TileFormat::Q40 => with_block_format!(@ packed::Q40, $F, $body),
            TileFormat::Q41 => with_block_format!(@ packed::Q41, $F, $body),
            TileFormat::Q50 => with_block_format!(@ packed::Q50, $F, $body),
            TileFormat::Q51 => with_block_format!(@ packed::Q51, $F, $body),
            TileFormat::Q80 => with_block_format!(@ packed::Q80, $F, $body),
            TileFormat::Q4K => with_block_format!(@ packed::Q4K, $F, $body),
            TileFormat::Q5K => with_block_format!(@ packed::Q5K, $F, $body),
            TileFormat::Q6K => with_block_format!(@ packed::Q6K, $F, $body),
            TileFormat::Int4 => with_block_format!(@ packed::Int4, $F, $body),
            TileFormat::Int8 => with_block_format!(@ packed::Int8, $F, $body),
            TileFormat::F32 | TileFormat::F16 | TileFormat::Bf16 | TileFormat::E4m3 => $dense,
        }
    }};
    (@ $type:path, $F:ident, $body:expr) => {{
        type $F = $type;
        $body
    }};
}
pub(super) use with_block_format;

/// Bits of a quantised value and what scales it; `None` for plain numbers and e4m3.
pub(super) fn quantised(format: TileFormat) -> Option<(usize, Scales)> {
    with_block_format!(format, F => Some((F::BITS, F::SCALES)), dense => None)
}

/// Where things lie in a tile, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct TileLayout {
    /// Blocks along K.
    pub blocks: usize,
    pub block_bytes: usize,
    /// Where the scales start.
    pub scales_at: usize,
    /// Where the scale bytes of K-quants start.
    pub subs_at: usize,
    /// 2^this blocks have one scale, in formats of groups.
    pub group_shift: u32,
    /// Of the whole tile, a multiple of 64.
    pub bytes: usize,
}

impl TileLayout {
    /// Of `cols` columns.
    pub fn new(format: TileFormat, cols: usize, group_shift: u32) -> Self {
        let blocks = cols.div_ceil(BLOCK);
        let (supers, groups) = (blocks.div_ceil(SUPER), blocks.div_ceil(1 << group_shift));
        let halves = LANES * 2;
        let (block_bytes, scales, subs) = match quantised(format) {
            None => match format {
                TileFormat::E4m3 => (BLOCK * LANES, groups * LANES * 4, 0),
                TileFormat::F32 => (BLOCK * LANES * 4, 0, 0),
                _ => (BLOCK * LANES * 2, 0, 0),
            },
            Some((bits, scales)) => {
                let (scales, subs) = match scales {
                    Scales::Half => (blocks * halves, 0),
                    Scales::HalfMin => (blocks * 2 * halves, 0),
                    Scales::GroupZero => (groups * 2 * halves, 0),
                    Scales::SuperMin => (supers * 2 * halves, blocks * 2 * LANES),
                    Scales::SuperHalves => (supers * halves, blocks * 2 * LANES),
                };
                (BLOCK * LANES * bits / 8, scales, subs)
            }
        };
        let scales_at = blocks * block_bytes;
        let subs_at = scales_at + scales;
        let bytes = (subs_at + subs).next_multiple_of(64);
        Self { blocks, block_bytes, scales_at, subs_at, group_shift, bytes }
    }

    /// Where the f16 scales of `block` start.
    #[inline(always)]
    pub fn scales_of(&self, scales: Scales, block: usize) -> usize {
        self.scales_at
            + match scales {
                Scales::Half => block * 2 * LANES,
                Scales::HalfMin => block * 4 * LANES,
                Scales::GroupZero => (block >> self.group_shift) * 4 * LANES,
                Scales::SuperMin => block / SUPER * 4 * LANES,
                Scales::SuperHalves => block / SUPER * 2 * LANES,
            }
    }

    /// Whether `block` has other scales than the one before it.
    #[inline(always)]
    pub fn begins_scales(&self, scales: Scales, block: usize) -> bool {
        scales != Scales::GroupZero || block.is_multiple_of(1 << self.group_shift)
    }

    /// Where the f32 scales of e4m3 start that `block` has.
    #[inline(always)]
    pub fn run_scales_of(&self, block: usize) -> usize {
        self.scales_at + (block >> self.group_shift) * 4 * LANES
    }

    /// Where the two scale bytes of `block` start.
    #[inline(always)]
    pub fn subs_of(&self, block: usize) -> usize {
        self.subs_at + block * 2 * LANES
    }
}

/// Outputs of one format, packed.
pub(super) struct Part {
    pub format: TileFormat,
    /// The output that this part's first row makes.
    pub first: usize,
    /// N of this part.
    pub rows: usize,
    pub layout: TileLayout,
    /// The column of the matrix at each column of the tiles, [`NO_COLUMN`] where there is none;
    /// `None` where they lie as they are.
    pub order: Option<Vec<u32>>,
    /// [tiles][layout.bytes]
    pub data: Aligned<u8>,
}

/// A column of tiles that no column of the matrix lies in.
pub(super) const NO_COLUMN: u32 = u32::MAX;

impl Part {
    pub fn tiles(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    #[inline(always)]
    pub fn tile(&self, tile: usize) -> Tile<'_> {
        let bytes = &self.data[tile * self.layout.bytes..][..self.layout.bytes];
        Tile { bytes, layout: self.layout }
    }

    /// Outputs of `tile` that exist.
    #[inline(always)]
    pub fn width(&self, tile: usize) -> usize {
        (self.rows - tile * LANES).min(LANES)
    }
}

/// The bytes of one tile.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a> {
    pub bytes: &'a [u8],
    pub layout: TileLayout,
}

impl<'a> Tile<'a> {
    /// The values of `block`.
    #[inline(always)]
    pub fn block(&self, block: usize) -> &'a [u8] {
        &self.bytes[block * self.layout.block_bytes..][..self.layout.block_bytes]
    }
}
