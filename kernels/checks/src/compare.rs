//! Tolerances, and messages that say where and by how much one was missed.

/// How far a result may lie from the oracle's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Tolerance {
    /// Bit for bit the oracle's value rounded to bf16.
    Rounded,
    /// At most this many steps of bf16 between the two.
    Ulps(u32),
    /// As `Ulps`, or at most this apart.
    UlpsOr(u32, f32),
    /// At most this, absolutely.
    Absolute(f32),
}

/// `Ok` where every value of `got` is as near to `wanted` as `tolerance` says.
///
/// # Errors
/// Names the worst element.
pub fn compare(
    what: &str,
    got: &[f32],
    wanted: &[f32],
    tolerance: Tolerance,
) -> Result<(), String> {
    if got.len() != wanted.len() {
        return Err(format!("{what}: {} values, wanted {}", got.len(), wanted.len()));
    }
    let excess = |got: f32, wanted: f32| match tolerance {
        Tolerance::Rounded => f64::from(ulps(got, wanted)),
        Tolerance::Ulps(most) => f64::from(ulps(got, wanted)) - f64::from(most),
        Tolerance::UlpsOr(_, near) if (got - wanted).abs() <= near => 0.0,
        Tolerance::UlpsOr(most, _) => f64::from(ulps(got, wanted)) - f64::from(most),
        Tolerance::Absolute(most) if got.is_nan() || wanted.is_nan() => {
            if got.is_nan() == wanted.is_nan() { 0.0 } else { f64::from(most) + f64::INFINITY }
        }
        Tolerance::Absolute(most) => f64::from((got - wanted).abs()) - f64::from(most),
    };
    let excesses = got.iter().zip(wanted).map(|(&got, &wanted)| excess(got, wanted));
    let worst = excesses.enumerate().max_by(|a, b| a.1.total_cmp(&b.1));
    match worst {
        Some((at, excess)) if excess > 0.0 => Err(format!(
            "{what}: element {at} is {}, wanted {} within {tolerance:?}",
            got[at], wanted[at]
        )),
        _ => Ok(()),
    }
}

/// Steps of bf16 between two values; many where one is NaN and the other is not.
fn ulps(a: f32, b: f32) -> u32 {
    let place = |v: f32| {
        let bits = half::bf16::from_f32(v).to_bits();
        let magnitude = i32::from(bits & 0x7fff);
        if bits & 0x8000 == 0 { magnitude } else { -magnitude }
    };
    match (a.is_nan(), b.is_nan()) {
        (true, true) => 0,
        (false, false) => place(a).abs_diff(place(b)),
        _ => u32::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_one_ulp_apart_across_zero_too() {
        assert_eq!(ulps(1.0, 1.0078125), 1);
        assert_eq!(ulps(0.0, -0.0), 0);
        assert_eq!(ulps(f32::NAN, 1.0), u32::MAX);
        assert!(compare("x", &[1.0], &[1.0078125], Tolerance::Rounded).is_err());
        assert!(compare("x", &[f32::NAN], &[1.0], Tolerance::Absolute(1.0)).is_err());
        assert!(compare("x", &[0.5], &[1.0], Tolerance::Absolute(0.25)).is_err());
        assert!(compare("x", &[1e-7], &[2e-7], Tolerance::UlpsOr(1, 1e-6)).is_ok());
        assert!(compare("x", &[1.0], &[1.1], Tolerance::UlpsOr(1, 1e-6)).is_err());
        assert!(compare("x", &[f32::NAN], &[1.0], Tolerance::UlpsOr(1, 1e-6)).is_err());
        assert!(compare("x", &[0.9], &[1.0], Tolerance::Absolute(0.25)).is_ok());
    }
}
