//! Packed values to numbers, 16 columns at a time, in code that any vector unit can run.
//!
//! Everything is inlined into its caller, so it compiles to the caller's instruction set.

use super::packed::{
    BLOCK, BlockFormat, LANES, Lanes, Scales, Tile, TileFormat, with_block_format,
};

/// Scales of a block: value = d · (q − ZERO) + min, with d `low` for its first 16 k and `high`
/// after.
pub(super) struct BlockScales {
    pub low: Lanes,
    pub high: Lanes,
    pub min: Lanes,
}

/// f16 to f32, exact, without branches: the exponent is moved by a product with 2¹¹².
#[inline(always)]
pub(super) fn widen_half(half: u16) -> f32 {
    let half = u32::from(half);
    let moved = f32::from_bits((half & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
    let special = if half & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(moved.to_bits() | special | (half & 0x8000) << 16)
}

/// 16 f16 at `at`.
#[inline(always)]
fn halves(bytes: &[u8], at: usize) -> Lanes {
    let bytes = &bytes[at..at + 2 * LANES];
    std::array::from_fn(|i| widen_half(u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]])))
}

/// The scales of `block`.
#[inline(always)]
pub(super) fn block_scales<F: BlockFormat>(tile: Tile<'_>, block: usize) -> BlockScales {
    let at = tile.layout.scales_of(F::SCALES, block);
    let d = halves(tile.bytes, at);
    let zero = [0.0; LANES];
    match F::SCALES {
        Scales::Half => BlockScales { low: d, high: d, min: zero },
        Scales::HalfMin => BlockScales { low: d, high: d, min: halves(tile.bytes, at + 2 * LANES) },
        Scales::SuperMin => {
            let dmin = halves(tile.bytes, at + 2 * LANES);
            let subs = &tile.bytes[tile.layout.subs_of(block)..][..2 * LANES];
            let d = std::array::from_fn(|i| d[i] * f32::from(subs[i]));
            let min = std::array::from_fn(|i| -(dmin[i] * f32::from(subs[LANES + i])));
            BlockScales { low: d, high: d, min }
        }
        Scales::GroupZero => {
            let zeros = halves(tile.bytes, at + 2 * LANES);
            let min = std::array::from_fn(|i| d[i] * (F::ZERO as f32 - zeros[i]));
            BlockScales { low: d, high: d, min }
        }
        Scales::SuperHalves => {
            let subs = &tile.bytes[tile.layout.subs_of(block)..][..2 * LANES];
            let low = std::array::from_fn(|i| d[i] * f32::from(subs[i] as i8));
            let high = std::array::from_fn(|i| d[i] * f32::from(subs[LANES + i] as i8));
            BlockScales { low, high, min: zero }
        }
    }
}

/// One word of four values for each column, from row `row` of a block's words.
#[inline(always)]
fn word_row(block: &[u8], row: usize) -> [u32; LANES] {
    let bytes = &block[row * LANES * 4..][..LANES * 4];
    std::array::from_fn(|i| {
        u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
    })
}

/// Values 4 g to 4 g + 3 of each column as the bytes of a word, unsigned.
#[inline(always)]
pub(super) fn group<F: BlockFormat>(block: &[u8], g: usize) -> [u32; LANES] {
    if F::BITS == 8 {
        return word_row(block, g);
    }
    let low = word_row(block, g % 4);
    let low: [u32; LANES] = std::array::from_fn(|i| low[i] >> (g / 4 * 4) & 0x0f0f_0f0f);
    match F::BITS {
        5 => {
            let high = word_row(block, 4);
            std::array::from_fn(|i| low[i] | (high[i] >> g & 0x0101_0101) << 4)
        }
        6 => {
            let high = word_row(block, 4 + g / 4);
            std::array::from_fn(|i| low[i] | (high[i] >> (g % 4 * 2) & 0x0303_0303) << 4)
        }
        _ => low,
    }
}

/// A format whose blocks can be widened to f32.
pub(super) trait Widen {
    /// The 32 × 16 values of `block`, each the f32 that the stored format stands for.
    fn widen(tile: Tile<'_>, block: usize, out: &mut [Lanes; BLOCK]);
}

impl<F: BlockFormat> Widen for F {
    #[inline(always)]
    fn widen(tile: Tile<'_>, block: usize, out: &mut [Lanes; BLOCK]) {
        let scales = block_scales::<F>(tile, block);
        let values = tile.block(block);
        for g in 0..BLOCK / 4 {
            let words = group::<F>(values, g);
            let d = if g < 4 { &scales.low } else { &scales.high };
            for byte in 0..4 {
                let out = &mut out[g * 4 + byte];
                for i in 0..LANES {
                    let q = (words[i] >> (8 * byte) & 255) as i32 - F::ZERO;
                    let value = d[i] * q as f32;
                    out[i] = if F::SCALES.has_min() { value + scales.min[i] } else { value };
                }
            }
        }
    }
}

/// The 32 × 16 values of `block`, in whatever format.
pub(super) fn widen(format: TileFormat, tile: Tile<'_>, block: usize, out: &mut [Lanes; BLOCK]) {
    match format {
        TileFormat::F32 => F32::widen(tile, block, out),
        TileFormat::F16 => F16::widen(tile, block, out),
        TileFormat::Bf16 => Bf16::widen(tile, block, out),
        TileFormat::E4m3 => E4m3::widen(tile, block, out),
        format => with_block_format!(format, F => F::widen(tile, block, out), dense => ()),
    }
}

/// f32 as stored.
pub(super) struct F32;
/// f16.
pub(super) struct F16;
/// bf16, pairs of k side by side.
pub(super) struct Bf16;
/// e4m3 with f32 scales.
pub(super) struct E4m3;

impl Widen for F32 {
    #[inline(always)]
    fn widen(tile: Tile<'_>, block: usize, out: &mut [Lanes; BLOCK]) {
        let values = tile.block(block);
        for (k, out) in out.iter_mut().enumerate() {
            *out = word_row(values, k).map(f32::from_bits);
        }
    }
}

impl Widen for F16 {
    #[inline(always)]
    fn widen(tile: Tile<'_>, block: usize, out: &mut [Lanes; BLOCK]) {
        let values = tile.block(block);
        for (k, out) in out.iter_mut().enumerate() {
            *out = halves(values, k * LANES * 2);
        }
    }
}

/// e4m3 to f32, exact for every code but NaN: the exponent is moved by a product with 2¹²⁰.
#[inline(always)]
fn widen_e4m3(code: u8) -> f32 {
    let code = u32::from(code);
    let moved = f32::from_bits((code & 0x7f) << 20) * f32::from_bits(0x7b80_0000);
    f32::from_bits(moved.to_bits() | (code & 0x80) << 24)
}

impl Widen for E4m3 {
    #[inline(always)]
    fn widen(tile: Tile<'_>, block: usize, out: &mut [Lanes; BLOCK]) {
        let values = tile.block(block);
        let scales = &tile.bytes[tile.layout.run_scales_of(block)..];
        let scales = word_row(scales, 0).map(f32::from_bits);
        for (k, out) in out.iter_mut().enumerate() {
            let codes = &values[k * LANES..][..LANES];
            *out = std::array::from_fn(|i| widen_e4m3(codes[i]) * scales[i]);
        }
    }
}

impl Widen for Bf16 {
    #[inline(always)]
    fn widen(tile: Tile<'_>, block: usize, out: &mut [Lanes; BLOCK]) {
        let values = tile.block(block);
        for pair in 0..BLOCK / 2 {
            let words = word_row(values, pair);
            out[pair * 2] = words.map(|word| f32::from_bits(word << 16));
            out[pair * 2 + 1] = words.map(|word| f32::from_bits(word & 0xffff_0000));
        }
    }
}
