//! Numbers into the formats of checkpoints, each rounded to the nearest.

use half::{bf16, f16};

use crate::{Result, source::Tensor};

/// Columns that share a scale and a zero point, and the side of blocks of e4m3.
const GROUP: usize = 128;
/// The largest number of e4m3.
const E4M3_MAX: f32 = 448.0;
/// Columns of a block of GGUF.
const BLOCK: usize = 32;

/// One tensor of the output.
pub struct Encoded {
    /// What follows the stem and a dot.
    pub ending: &'static str,
    /// As safetensors and GGUF call the type.
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

pub fn f32s(tensor: &Tensor) -> Encoded {
    let data = tensor.values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Encoded { ending: tensor.ending, dtype: "F32", shape: tensor.shape.clone(), data }
}

pub fn f16s(tensor: &Tensor) -> Encoded {
    let halves = tensor.values.iter().map(|value| f16::from_f32(*value));
    let data = halves.flat_map(f16::to_le_bytes).collect();
    Encoded { ending: tensor.ending, dtype: "F16", shape: tensor.shape.clone(), data }
}

/// A matrix as integers of 4 bits.
struct Int4 {
    rows: usize,
    cols: usize,
    /// [N, K].
    q: Vec<u8>,
    /// [G, N].
    scales: Vec<f16>,
    /// [G, N], 1 to 15.
    zeros: Vec<u8>,
}

impl Int4 {
    fn of(tensor: &Tensor) -> Result<Self> {
        let (rows, cols) = (tensor.shape[0], tensor.shape[1]);
        if !rows.is_multiple_of(8) || !cols.is_multiple_of(8) {
            let stem = &tensor.stems[0];
            return Err(format!("{stem} [{rows}, {cols}] does not fill words of 8").into());
        }
        let groups = cols.div_ceil(GROUP);
        let mut q = Vec::with_capacity(rows * cols);
        let (mut scales, mut zeros) = (vec![f16::ZERO; groups * rows], vec![0; groups * rows]);
        for (n, row) in tensor.values.chunks_exact(cols).enumerate() {
            for (group, values) in row.chunks(GROUP).enumerate() {
                let (scale, zero) = scale_and_zero(values);
                let at = group * rows + n;
                (scales[at], zeros[at]) = (scale, zero);
                let (scale, zero) = (scale.to_f32(), f32::from(zero));
                q.extend(values.iter().map(|w| nearest(w / scale + zero, 15.0)));
            }
        }
        Ok(Self { rows, cols, q, scales, zeros })
    }

    fn groups(&self) -> usize {
        self.cols.div_ceil(GROUP)
    }

    fn scales(&self) -> Encoded {
        let data = self.scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
        Encoded { ending: "scales", dtype: "F16", shape: vec![self.groups(), self.rows], data }
    }
}

/// Of asymmetric integers of 4 bits for a group that may hold zero. A zero point of 0 is avoided:
/// AutoGPTQ's layout cannot tell it from 16.
fn scale_and_zero(values: &[f32]) -> (f16, u8) {
    let min = values.iter().fold(0.0f32, |min, value| min.min(*value));
    let max = values.iter().fold(0.0f32, |max, value| max.max(*value));
    // A scale of zero is none, even of a group of zeros.
    let scale = f16::from_f32((max - min) / 15.0).max(f16::MIN_POSITIVE_SUBNORMAL);
    (scale, nearest(-min / scale.to_f32(), 15.0).max(1))
}

fn nearest(value: f32, max: f32) -> u8 {
    value.round_ties_even().clamp(0.0, max) as u8
}

fn words(ending: &'static str, shape: [usize; 2], word: impl Fn(usize, usize) -> u32) -> Encoded {
    let [rows, cols] = shape;
    let each = (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col)));
    let data = each.flat_map(|(row, col)| word(row, col).to_le_bytes()).collect();
    Encoded { ending, dtype: "I32", shape: shape.to_vec(), data }
}

/// Eight integers, the first in the lowest bits.
fn packed(q: impl Fn(usize) -> u8) -> u32 {
    (0..8).fold(0, |word, i| word | u32::from(q(i)) << (4 * i))
}

/// AutoGPTQ's first layout: inputs packed along K, zero points less one along N.
pub fn gptq(tensor: &Tensor) -> Result<Vec<Encoded>> {
    let int4 = Int4::of(tensor)?;
    let Int4 { rows, cols, q, zeros, .. } = &int4;
    let (rows, cols) = (*rows, *cols);
    let groups = (0..cols).flat_map(|k| ((k / GROUP) as u32).to_le_bytes()).collect();
    Ok(vec![
        words("qweight", [cols / 8, rows], |at, n| packed(|i| q[n * cols + at * 8 + i])),
        words("qzeros", [int4.groups(), rows / 8], |group, at| {
            packed(|i| zeros[group * rows + at * 8 + i] - 1)
        }),
        int4.scales(),
        Encoded { ending: "g_idx", dtype: "I32", shape: vec![cols], data: groups },
    ])
}

/// AutoAWQ's GEMM layout: outputs packed along N, in an order of its own.
pub fn awq(tensor: &Tensor) -> Result<Vec<Encoded>> {
    const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
    let int4 = Int4::of(tensor)?;
    let Int4 { rows, cols, q, zeros, .. } = &int4;
    let (rows, cols) = (*rows, *cols);
    Ok(vec![
        words("qweight", [cols, rows / 8], |k, at| packed(|i| q[(at * 8 + ORDER[i]) * cols + k])),
        words("qzeros", [int4.groups(), rows / 8], |group, at| {
            packed(|i| zeros[group * rows + at * 8 + ORDER[i]])
        }),
        int4.scales(),
    ])
}

/// e4m3 with a bf16 scale for each 128 rows and columns.
pub fn fp8_blocks(tensor: &Tensor) -> Vec<Encoded> {
    fp8(tensor, "weight_scale_inv", [GROUP, GROUP])
}

/// e4m3 with a bf16 scale for each row.
pub fn fp8_rows(tensor: &Tensor) -> Vec<Encoded> {
    fp8(tensor, "weight_scale", [1, tensor.shape[1]])
}

fn fp8(tensor: &Tensor, ending: &'static str, block: [usize; 2]) -> Vec<Encoded> {
    let cols = tensor.shape[1];
    let across = cols.div_ceil(block[1]);
    let shape = vec![tensor.shape[0].div_ceil(block[0]), across];
    let places =
        || (0..tensor.values.len()).map(|at| at / cols / block[0] * across + at % cols / block[1]);
    let mut largest = vec![0.0f32; shape[0] * across];
    for (at, value) in places().zip(&tensor.values) {
        largest[at] = largest[at].max(value.abs());
    }
    let scale = |largest: &f32| bf16::from_f32(largest / E4M3_MAX).max(bf16::MIN_POSITIVE);
    let scales: Vec<bf16> = largest.iter().map(scale).collect();
    let codes = places().zip(&tensor.values).map(|(at, value)| e4m3(value / scales[at].to_f32()));
    let weight = Encoded {
        ending: "weight",
        dtype: "F8_E4M3",
        shape: tensor.shape.clone(),
        data: codes.collect(),
    };
    let data = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
    vec![weight, Encoded { ending, dtype: "BF16", shape, data }]
}

/// The nearest code, of two the even one; the largest for what is beyond it.
fn e4m3(value: f32) -> u8 {
    let magnitude = value.abs().min(E4M3_MAX);
    let code = match magnitude < 2f32.powi(-6) {
        true => (magnitude * 512.0).round_ties_even() as u32,
        false => {
            // Three bits of mantissa stay of 23; the exponent's bias is 7 instead of 127.
            let bits = magnitude.to_bits();
            ((bits + 0x7_ffff + (bits >> 20 & 1)) >> 20) - (120 << 3)
        }
    };
    code as u8 | if value.is_sign_negative() { 0x80 } else { 0 }
}

/// GGUF blocks of 32 columns, each made by `block`.
pub fn blocks(
    tensor: &Tensor,
    dtype: &'static str,
    block: fn(&[f32; BLOCK], &mut Vec<u8>),
) -> Result<Encoded> {
    let mut data = Vec::new();
    if !tensor.shape[1].is_multiple_of(BLOCK) {
        return Err(
            format!("{} {:?} is no whole {dtype} blocks", tensor.stems[1], tensor.shape).into()
        );
    }
    tensor.values.as_chunks().0.iter().for_each(|values| block(values, &mut data));
    Ok(Encoded { ending: tensor.ending, dtype, shape: tensor.shape.clone(), data })
}

/// d · (q − 8), where the value of the largest magnitude is at q = 0.
pub fn q4_0(values: &[f32; BLOCK], data: &mut Vec<u8>) {
    let larger = |a: f32, b: &f32| if b.abs() > a.abs() { *b } else { a };
    let d = values.iter().fold(0.0, larger) / -8.0;
    data.extend(f16::from_f32(d).to_le_bytes());
    nibbles(data, values.map(|value| (value * inverse(d) + 8.5).clamp(0.0, 15.0) as u8));
}

/// d · q + m, where m is the least value.
pub fn q4_1(values: &[f32; BLOCK], data: &mut Vec<u8>) {
    let min = values.iter().copied().fold(f32::INFINITY, f32::min);
    let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let d = (max - min) / 15.0;
    data.extend(f16::from_f32(d).to_le_bytes());
    data.extend(f16::from_f32(min).to_le_bytes());
    nibbles(data, values.map(|value| ((value - min) * inverse(d) + 0.5).clamp(0.0, 15.0) as u8));
}

/// d · q with q from −127 to 127.
pub fn q8_0(values: &[f32; BLOCK], data: &mut Vec<u8>) {
    let d = values.iter().fold(0.0f32, |largest, value| largest.max(value.abs())) / 127.0;
    data.extend(f16::from_f32(d).to_le_bytes());
    data.extend(values.iter().map(|value| (value * inverse(d)).round() as i8 as u8));
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { d.recip() }
}

/// The first 16 in the low halves.
fn nibbles(data: &mut Vec<u8>, q: [u8; BLOCK]) {
    data.extend((0..BLOCK / 2).map(|i| q[i] | q[i + BLOCK / 2] << 4));
}

#[cfg(test)]
mod tests {
    use super::*;
    use kernels::plain::dequant;

    #[test]
    fn e4m3_is_the_nearest_code() {
        let codes = || (0..=0xffu8).filter(|code| code & 0x7f != 0x7f);
        for code in codes() {
            assert_eq!(e4m3(dequant::e4m3(code)), code);
        }
        for i in -5000..5000 {
            let value = i as f32 * 0.1 * if i % 3 == 0 { 0.01 } else { 1.0 };
            let off = |code: u8| (dequant::e4m3(code) - value).abs();
            let best = codes().map(off).fold(f32::INFINITY, f32::min);
            assert_eq!(off(e4m3(value)), best, "{value}");
        }
        // Halfway, the even one.
        assert_eq!((e4m3(17.0), e4m3(19.0), e4m3(-0.5 * 2f32.powi(-9))), (0x58, 0x5a, 0x80));
    }

    #[test]
    fn a_group_of_one_sign_keeps_a_zero_point_that_the_layout_can_tell() {
        let above: Vec<f32> = (0..GROUP).map(|k| 1.0 + k as f32).collect();
        let below: Vec<f32> = above.iter().map(|value| -value).collect();
        assert_eq!((scale_and_zero(&above).1, scale_and_zero(&below).1), (1, 15));
        assert!(scale_and_zero(&[0.0; GROUP]).0 > f16::ZERO);
    }
}
