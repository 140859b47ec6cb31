//! The oracle of e4m3: its 256 values, and the nearest to a number by looking it up among them.

use std::sync::LazyLock;

/// What a code stands for; `None` for the two NaNs.
pub fn value(code: u8) -> Option<f64> {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    let magnitude = match exponent {
        0 => mantissa * 2f64.powi(-9),
        _ => (8.0 + mantissa) * 2f64.powi(exponent - 10),
    };
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    (code & 0x7f != 0x7f).then_some(sign * magnitude)
}

/// The largest number.
pub const MAX: f32 = 448.0;

/// The code nearest to a number; of two the one with an even mantissa; beyond ±448 that. `None` for
/// NaN.
pub fn nearest(x: f32) -> Option<u8> {
    if x.is_nan() {
        return None;
    }
    // Those that are not negative, in the order of their codes, which is their own.
    static VALUES: LazyLock<Vec<f64>> = LazyLock::new(|| (0..0x7f).filter_map(value).collect());
    let magnitude = f64::from(x).abs();
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    let above = VALUES.partition_point(|v| *v < magnitude).min(0x7e);
    let below = above.saturating_sub(1);
    let (to_above, to_below) = (VALUES[above] - magnitude, magnitude - VALUES[below]);
    let takes_below = to_below < to_above || (to_below == to_above && below % 2 == 0);
    Some(sign | if takes_below { below } else { above } as u8)
}

/// `Ok` where `codes` are the nearest to `wanted`, and NaN where that is.
///
/// # Errors
/// Names the first that is not.
pub fn compare(what: &str, codes: &[u8], wanted: &[f32]) -> Result<(), String> {
    if codes.len() != wanted.len() {
        return Err(format!("{what}: {} codes, wanted {}", codes.len(), wanted.len()));
    }
    for (at, (&code, &wanted)) in codes.iter().zip(wanted).enumerate() {
        let nearest = nearest(wanted);
        if nearest != Some(code) && (nearest.is_some() || value(code).is_some()) {
            return Err(format!("{what}: code {at} is {code:#04x} for {wanted}, not {nearest:x?}"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_finds_ends_ties_and_subnormals() {
        assert_eq!(nearest(1.0), Some(0x38));
        assert_eq!(nearest(-448.0), Some(0xfe));
        assert_eq!(nearest(f32::INFINITY), Some(0x7e));
        assert_eq!(nearest(f32::NAN), None);
        // 17 and 19 lie in the middle of 16, 18 and 20.
        assert_eq!(nearest(17.0).and_then(value), Some(16.0));
        assert_eq!(nearest(19.0).and_then(value), Some(20.0));
        assert_eq!(nearest(2f32.powi(-10)), Some(0));
        assert_eq!(nearest(-0.0), Some(0x80));
        assert_eq!(nearest(3.0 * 2f32.powi(-10)), Some(2));
        for code in (0..=255).filter(|code| code & 0x7f != 0x7f) {
            assert_eq!(value(code).and_then(|v| nearest(v as f32)), Some(code));
        }
    }
}
