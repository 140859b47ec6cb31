//! Passes over a whole row of logits, written so that the compiler turns them into SIMD.

/// Values compared together; a row's tail is handled one by one.
const LANES: usize = 16;
/// Weights computed before they are summed: apart, both loops become SIMD.
const BLOCK: usize = 64;
/// Running sums in f64.
const SUMS: usize = 4;

/// The largest value, or `None` where the row is empty or a value is NaN or infinite.
pub fn finite_peak(row: &[f32]) -> Option<f32> {
    let mut peaks = [f32::NEG_INFINITY; LANES];
    // A finite value times zero is zero; NaN and infinities leave NaN behind.
    let mut zeros = [0.0f32; LANES];
    let (chunks, tail) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            peaks[lane] = if chunk[lane] > peaks[lane] { chunk[lane] } else { peaks[lane] };
            zeros[lane] += chunk[lane] * 0.0;
        }
    }
    for (lane, &value) in tail.iter().enumerate() {
        peaks[lane] = if value > peaks[lane] { value } else { peaks[lane] };
        zeros[lane] += value * 0.0;
    }
    let finite = zeros.iter().all(|&zero| zero == 0.0);
    let peak = peaks.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    (finite && peak.is_finite()).then_some(peak)
}

/// -infinity for every id whose bit in `allowed` is not set, or that lies past its end; the largest
/// value left, or `None` where none is.
pub fn forbid(row: &mut [f32], allowed: &[u32]) -> Option<f32> {
    let words = allowed.iter().copied().chain(std::iter::repeat(0));
    let mut peak = f32::NEG_INFINITY;
    for (logits, word) in row.chunks_mut(u32::BITS as usize).zip(words) {
        for (bit, logit) in logits.iter_mut().enumerate() {
            if word >> bit & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
            peak = peak.max(*logit);
        }
    }
    peak.is_finite().then_some(peak)
}

/// The lowest index that holds `value`; 0 where none does.
pub fn first_at(row: &[f32], value: f32) -> u32 {
    row.iter().position(|&x| x == value).unwrap_or(0) as u32
}

/// ln Σ exp(row), the sum taken in f64.
pub fn log_normalizer(row: &[f32], peak: f32) -> f64 {
    f64::from(peak) + mass(row, peak, 1.0).ln()
}

/// Σ exp((row - peak) / temperature). Rounding of the single terms is 1e-7, of the sum f64's.
pub fn mass(row: &[f32], peak: f32, temperature: f32) -> f64 {
    let mut sums = [0.0f64; SUMS];
    let mut weights = [0.0f32; BLOCK];
    let (blocks, tail) = row.as_chunks::<BLOCK>();
    for block in blocks {
        for lane in 0..BLOCK {
            weights[lane] = weight(block[lane], peak, temperature);
        }
        for some in weights.as_chunks::<SUMS>().0 {
            for lane in 0..SUMS {
                sums[lane] += f64::from(some[lane]);
            }
        }
    }
    for (index, &logit) in tail.iter().enumerate() {
        sums[index % SUMS] += f64::from(weight(logit, peak, temperature));
    }
    sums.iter().sum()
}

/// exp((logit - peak) / temperature), in [0, 1]; 1 at the peak whatever the temperature.
#[inline(always)]
pub fn weight(logit: f32, peak: f32, temperature: f32) -> f32 {
    exp_nonpositive((logit - peak) / temperature)
}

/// e^x for x ≤ 0, within 2 units in the last place; 0 where e^x is below the normal numbers.
///
/// Cody–Waite reduction and a minimax polynomial (the coefficients are those of Cephes' `expf`),
/// without branches and without table, so that a loop over it becomes SIMD.
#[inline(always)]
fn exp_nonpositive(x: f32) -> f32 {
    /// 1.5 · 2²³: adding it rounds to an integer, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    const SMALLEST: f32 = -87.0;
    let clamped = if x > SMALLEST { x } else { SMALLEST };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * LN_2_HIGH - n * LN_2_LOW;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_2e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let mantissa = p * r * r + r + 1.0;
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < SMALLEST { 0.0 } else { mantissa * power }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_of_the_last_place() {
        let mut worst = 0.0f64;
        for step in 0..=870_000 {
            let x = -(step as f32) * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max(((f64::from(exp_nonpositive(x)) - exact) / exact).abs());
        }
        assert!(worst < 2.4e-7, "worst relative error {worst:e}");
        assert_eq!(exp_nonpositive(0.0), 1.0);
        assert_eq!(exp_nonpositive(-88.0), 0.0);
        assert_eq!(exp_nonpositive(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn the_peak_is_the_largest_value_and_refuses_what_is_not_finite() {
        for len in [1, 15, 16, 17, 100] {
            let mut row: Vec<f32> = (0..len).map(|i| -((i * 7 % 13) as f32)).collect();
            row[len - 1] = 5.0;
            assert_eq!(finite_peak(&row), Some(5.0));
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                row[len / 2] = bad;
                assert_eq!(finite_peak(&row), None);
            }
        }
        assert_eq!(finite_peak(&[]), None);
    }

    #[test]
    fn the_normalizer_matches_a_sum_in_f64() {
        let row: Vec<f32> = (0..1003).map(|i| ((i * 37 % 101) as f32) * 0.13 - 20.0).collect();
        let peak = finite_peak(&row).unwrap();
        let exact = row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
        assert!((log_normalizer(&row, peak) - exact).abs() < 1e-7);
    }
}
