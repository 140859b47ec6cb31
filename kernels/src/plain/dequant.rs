//! Stored weights to f32, one obvious loop for each format: what every packed layout is compared
//! with.
//!
//! The block layouts are the public ones of GGUF (ggml): 32 elements with one scale, or 256 with a
//! scale of scales. Products are rounded before the minimum is added, as the format's reference
//! does.

use crate::{Format, Stored, WeightPart};
use half::{bf16, f16};

/// Row `n` of a part.
///
/// # Panics
/// Where the part is not whole (`WeightPart::check`), has no row `n`, or `out` is not K long.
pub fn part_row(part: &WeightPart<'_>, n: usize, out: &mut [f32]) {
    let cols = part.cols;
    assert_eq!(out.len(), cols, "a row has {cols} columns");
    match &part.stored {
        Stored::Plain { format, data } => {
            let bytes = format.row_bytes(cols);
            dequantize_row(*format, &data[n * bytes..][..bytes], out);
        }
        Stored::Grouped(grouped) => {
            let count = grouped.count(part.rows);
            for (k, (out, q)) in out.iter_mut().zip(grouped.integers(n, cols)).enumerate() {
                let at = n * count + grouped.groups.of(k);
                let zero = f32::from(grouped.zeros[at]);
                *out = grouped.scales[at].to_f32() * (f32::from(q) - zero);
            }
        }
        Stored::Scaled(scaled) => {
            let scales = &scaled.scales[n * scaled.count(cols)..];
            let values = &scaled.values[n * cols..][..cols];
            for (k, (out, code)) in out.iter_mut().zip(values).enumerate() {
                *out = e4m3(*code) * scales[k / scaled.run];
            }
        }
        Stored::Random(random) => {
            out.iter_mut().enumerate().for_each(|(k, out)| *out = random.number(n, k));
        }
    }
}

/// What a code of e4m3 stands for: a sign, four bits of exponent with bias 7, three of mantissa;
/// no infinities, 0x7f and 0xff are NaN.
pub fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// Widens one stored row. `bytes` holds whole blocks and `out` as many elements.
///
/// # Panics
/// When the two lengths do not belong together.
pub fn dequantize_row(format: Format, bytes: &[u8], out: &mut [f32]) {
    let (elements, size) = (format.block_elements(), format.block_bytes());
    assert!(
        bytes.len().is_multiple_of(size) && bytes.len() / size * elements == out.len(),
        "{} bytes of {format:?} are not {} elements",
        bytes.len(),
        out.len()
    );
    for (block, out) in bytes.chunks_exact(size).zip(out.chunks_exact_mut(elements)) {
        match format {
            Format::F32 => out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]),
            Format::F16 => out[0] = half_at(block, 0),
            Format::Bf16 => out[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32(),
            Format::Q4_0 => q4_0(block, out),
            Format::Q4_1 => q4_1(block, out),
            Format::Q5_0 => q5_0(block, out),
            Format::Q5_1 => q5_1(block, out),
            Format::Q8_0 => q8_0(block, out),
            Format::Q4K => q4_k(block, out),
            Format::Q5K => q5_k(block, out),
            Format::Q6K => q6_k(block, out),
        }
    }
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Element `i` of 32 in 16 bytes: the low halves come first, then the high ones.
fn nibble(bytes: &[u8], i: usize) -> u8 {
    if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 }
}

/// d, 16 bytes of nibbles: d · (q − 8).
fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (i, out) in out.iter_mut().enumerate() {
        *out = d * (f32::from(nibble(&block[2..], i)) - 8.0);
    }
}

/// d, m, 16 bytes of nibbles: d · q + m.
fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (i, out) in out.iter_mut().enumerate() {
        *out = d * f32::from(nibble(&block[4..], i)) + m;
    }
}

/// Nibble `i` with bit `i` of the 32 high bits above it.
fn five_bits(high: &[u8], low: &[u8], i: usize) -> f32 {
    let bit = high[i / 8] >> (i % 8) & 1;
    f32::from(nibble(low, i) | bit << 4)
}

/// d, 4 bytes of high bits, 16 bytes of nibbles: d · (q − 16).
fn q5_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (i, out) in out.iter_mut().enumerate() {
        *out = d * (five_bits(&block[2..6], &block[6..], i) - 16.0);
    }
}

/// d, m, 4 bytes of high bits, 16 bytes of nibbles: d · q + m.
fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (i, out) in out.iter_mut().enumerate() {
        *out = d * five_bits(&block[4..8], &block[8..], i) + m;
    }
}

/// d, 32 signed bytes: d · q.
fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (out, &q) in out.iter_mut().zip(&block[2..]) {
        *out = d * f32::from(q as i8);
    }
}

/// Six-bit scale and minimum of sub-block `s` of 8, out of 12 bytes.
fn six_bit_scales(packed: &[u8], s: usize) -> (f32, f32) {
    let (scale, min) = if s < 4 {
        (packed[s] & 63, packed[s + 4] & 63)
    } else {
        let scale = packed[s + 4] & 15 | packed[s - 4] >> 6 << 4;
        let min = packed[s + 4] >> 4 | packed[s] >> 6 << 4;
        (scale, min)
    };
    (f32::from(scale), f32::from(min))
}

/// Element `i` of 256 in 128 bytes: each 32 bytes hold 32 low halves, then 32 high ones.
fn long_nibble(bytes: &[u8], i: usize) -> u8 {
    let byte = bytes[i / 64 * 32 + i % 32];
    if i % 64 < 32 { byte & 15 } else { byte >> 4 }
}

/// d, dmin, 12 bytes of scales, 128 bytes of nibbles: d · scale · q − dmin · min.
fn q4_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (i, out) in out.iter_mut().enumerate() {
        let (scale, min) = six_bit_scales(&block[4..16], i / 32);
        let q = long_nibble(&block[16..], i);
        *out = d * scale * f32::from(q) - dmin * min;
    }
}

/// As Q4_K with 32 bytes of high bits before the nibbles: bit `s` of byte `l` is element 32 s +
/// l's.
fn q5_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (i, out) in out.iter_mut().enumerate() {
        let (scale, min) = six_bit_scales(&block[4..16], i / 32);
        let high = block[16 + i % 32] >> (i / 32) & 1;
        let q = long_nibble(&block[48..], i) | high << 4;
        *out = d * scale * f32::from(q) - dmin * min;
    }
}

/// 128 bytes of nibbles, 64 of high pairs, 16 signed scales, d: d · scale · (q − 32).
fn q6_k(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 208);
    for (i, out) in out.iter_mut().enumerate() {
        let (half, within) = (i / 128, i % 128);
        let low = block[half * 64 + within % 64];
        let low = if within < 64 { low & 15 } else { low >> 4 };
        let high = block[128 + half * 32 + within % 32] >> (within / 32 * 2) & 3;
        let scale = f32::from(block[192 + i / 16] as i8);
        *out = d * scale * (f32::from(low | high << 4) - 32.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks by hand: the stored bytes and some of the elements that they stand for.
    fn check(format: Format, block: &[u8], expected: &[(usize, f32)]) {
        let mut out = vec![f32::NAN; format.block_elements()];
        dequantize_row(format, block, &mut out);
        for &(at, value) in expected {
            assert_eq!(out[at], value, "{format:?} element {at}");
        }
        assert!(out.iter().all(|v| v.is_finite()), "{format:?}");
    }

    fn halves(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect()
    }

    #[test]
    fn plain_numbers() {
        check(Format::F32, &1.5f32.to_le_bytes(), &[(0, 1.5)]);
        check(Format::F16, &halves(&[-0.25]), &[(0, -0.25)]);
        check(Format::Bf16, &bf16::from_f32(3.0).to_le_bytes(), &[(0, 3.0)]);
    }

    #[test]
    fn blocks_of_32() {
        // Byte j is j in the low half and 15 − j in the high one.
        let nibbles: Vec<u8> = (0..16).map(|j| j | (15 - j) << 4).collect();
        let high = 0x8000_0001u32.to_le_bytes();
        let with = |head: Vec<u8>, high: &[u8]| [&head[..], high, &nibbles[..]].concat();
        check(
            Format::Q4_0,
            &with(halves(&[0.5]), &[]),
            &[(0, -4.0), (9, 0.5), (16, 3.5), (31, -4.0)],
        );
        check(
            Format::Q4_1,
            &with(halves(&[0.5, -1.0]), &[]),
            &[(0, -1.0), (3, 0.5), (16, 6.5), (31, -1.0)],
        );
        check(
            Format::Q5_0,
            &with(halves(&[2.0]), &high),
            &[(0, 0.0), (1, -30.0), (16, -2.0), (31, 0.0)],
        );
        check(
            Format::Q5_1,
            &with(halves(&[2.0, 1.0]), &high),
            &[(0, 33.0), (1, 3.0), (16, 31.0), (31, 33.0)],
        );
        let signed: Vec<u8> = (0..32).map(|j| (j * 8 - 128) as i8 as u8).collect();
        check(
            Format::Q8_0,
            &[halves(&[0.25]), signed].concat(),
            &[(0, -32.0), (16, 0.0), (31, 30.0)],
        );
    }

    #[test]
    fn blocks_of_256() {
        let mut scales = [0u8; 12];
        scales[0] = 3 | 2 << 6; // scale 0 is 3; high bits of scale 4
        scales[4] = 5 | 1 << 6; // min 0 is 5; high bits of min 4
        scales[8] = 7 | 9 << 4; // low bits of scale 4 and min 4: 7 + 32, 9 + 16
        let head = [halves(&[0.5, 0.25]), scales.to_vec()].concat();
        let q4 = [head.clone(), vec![0x42; 128]].concat();
        check(Format::Q4K, &q4, &[(0, 1.75), (32, 0.0), (128, 39.0 - 6.25)]);
        let mut high = vec![0; 32];
        high[1] = 1 | 1 << 4;
        let q5 = [head, high, vec![0x42; 128]].concat();
        check(Format::Q5K, &q5, &[(0, 1.75), (1, 25.75), (128, 32.75), (129, 344.75)]);
        let mut q6 = vec![0x21; 128];
        q6.extend([0b11_10_01_00; 64]);
        q6.extend((0..16).map(|s| (s - 8) as i8 as u8));
        q6.extend(halves(&[0.5]));
        check(
            Format::Q6K,
            &q6,
            &[
                (0, -4.0 * -31.0),
                (32, -3.0 * -15.0),
                (64, -2.0 * 2.0),
                (96, -18.0),
                (128, 0.0),
                (255, 3.5 * 18.0),
            ],
        );
    }

    #[test]
    #[should_panic(expected = "are not")]
    fn lengths_must_fit() {
        dequantize_row(Format::Q8_0, &[0; 34], &mut [0.0; 31]);
    }
}
