//! Sixteen floats at a time, in one vocabulary for every instruction set.
//!
//! A kernel is written once as safe code over [`Simd`] and compiled for each level by [`dispatch`].
//! Everything that a kernel calls must be `#[inline(always)]`: only what is inlined is compiled
//! with the level's instructions. Each operation gives the same bits on every level, because all of
//! them multiply and add with one rounding and `exp` is the same polynomial everywhere.

use super::Isa;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

/// Floats in one vector.
pub(crate) const LANES: usize = 16;

/// Leaves e^x at 2^-126 from here on down.
const EXP_LOW: f32 = -87.3;
/// Leaves e^x finite, at about 1.7e38, from here on up.
const EXP_HIGH: f32 = 88.0;
/// ln 2 in two parts: products of the first with small integers are exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;

/// A proof that the processor has a level's instructions, and the operations they make.
pub(crate) trait Simd: Copy {
    type V: Copy;
    /// Queries whose scores against one block fit the registers.
    const SCORE_QUERIES: usize;
    /// Queries whose sums over values fit the registers.
    const VALUE_QUERIES: usize;

    fn splat(self, x: f32) -> Self::V;
    fn load(self, from: &[f32; LANES]) -> Self::V;
    fn store(self, to: &mut [f32; LANES], v: Self::V);
    /// Widens IEEE half-precision bits.
    fn load_half(self, from: &[u16; LANES]) -> Self::V;
    /// Rounds to the nearest half, ties to even.
    fn store_half(self, to: &mut [u16; LANES], v: Self::V);
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// a · b + c, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// c − a · b, rounded once.
    fn neg_fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The smaller; b where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// The larger; b where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest integer, ties to even.
    fn round(self, v: Self::V) -> Self::V;
    /// 2^v for integers v in −126..=127.
    fn exp2_int(self, v: Self::V) -> Self::V;
    /// The largest lane.
    fn max_lane(self, v: Self::V) -> f32;

    /// The sum of all lanes, halves added to halves.
    #[inline(always)]
    fn sum_lanes(self, v: Self::V) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes, v);
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
        }
        lanes[0]
    }

    /// Up to sixteen values, zeros after them.
    #[inline(always)]
    fn load_some(self, from: &[f32]) -> Self::V {
        let mut lanes = [0.0; LANES];
        lanes[..from.len()].copy_from_slice(from);
        self.load(&lanes)
    }

    /// The first `to.len()` lanes.
    #[inline(always)]
    fn store_some(self, to: &mut [f32], v: Self::V) {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes, v);
        to.copy_from_slice(&lanes[..to.len()]);
    }

    /// e^v within 2e-7 relative; clamped to the finite normal numbers.
    #[inline(always)]
    fn exp(self, v: Self::V) -> Self::V {
        let v = self.max(self.splat(EXP_LOW), v);
        let v = self.min(self.splat(EXP_HIGH), v);
        let n = self.round(self.mul(v, self.splat(std::f32::consts::LOG2_E)));
        let r = self.neg_fma(n, self.splat(LN2_HIGH), v);
        let r = self.neg_fma(n, self.splat(LN2_LOW), r);
        // |r| ≤ ln 2 / 2: the Taylor series to r^7 / 7! leaves 5e-9.
        let mut p = self.splat(1.0 / 5040.0);
        for inverse in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            p = self.fma(p, r, self.splat(inverse));
        }
        self.mul(p, self.exp2_int(n))
    }
}

/// Code to be compiled for every level. `run` must be `#[inline(always)]`.
pub(crate) trait Kernel {
    type Output;
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// A level that this machine has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Level(Isa);

impl Level {
    /// The highest level that machine and `cap` both allow.
    pub fn new(cap: Isa) -> Self {
        Self(cap.min(Isa::detect()))
    }

    pub fn isa(self) -> Isa {
        self.0
    }
}

/// Runs `kernel` with the instructions of `level`.
#[inline]
pub(crate) fn dispatch<K: Kernel>(level: Level, kernel: K) -> K::Output {
    match level.0 {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a `Level` is at most what was detected.
        Isa::Avx512 | Isa::Amx => unsafe { avx512::run(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { avx2::run(kernel) },
        _ => kernel.run(portable::Portable),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Everything<'a>(&'a [[f32; LANES]; 3]);

    /// One array of lanes per operation.
    impl Kernel for Everything<'_> {
        type Output = Vec<[u32; LANES]>;
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            let [a, b, c] = [s.load(&self.0[0]), s.load(&self.0[1]), s.load(&self.0[2])];
            let mut half = [0; LANES];
            s.store_half(&mut half, a);
            let n = s.min(s.splat(127.0), s.max(s.splat(-126.0), s.round(b)));
            let all = [
                s.add(a, b),
                s.sub(a, b),
                s.mul(a, b),
                s.div(a, b),
                s.fma(a, b, c),
                s.neg_fma(a, b, c),
                s.min(a, b),
                s.max(a, b),
                s.round(a),
                s.exp2_int(n),
                s.exp(a),
                s.load_half(&half),
                s.splat(s.max_lane(b)),
                s.splat(s.sum_lanes(c)),
                s.load_some(&self.0[0][..7]),
            ];
            let lanes = |v| {
                let mut to = [0.0; LANES];
                s.store(&mut to, v);
                to.map(f32::to_bits)
            };
            all.into_iter().map(lanes).collect()
        }
    }

    #[test]
    fn every_level_gives_the_same_bits() {
        let mut x = 1u32;
        let mut next = || {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x as f32 / u32::MAX as f32 - 0.5) * [1.0, 10.0, 300.0, 1e-3][(x >> 9) as usize % 4]
        };
        for _ in 0..1000 {
            let values = std::array::from_fn(|_| std::array::from_fn(|_| next()));
            let want = dispatch(Level::new(Isa::Portable), Everything(&values));
            for isa in Isa::ALL {
                let got = dispatch(Level::new(isa), Everything(&values));
                assert_eq!(got, want, "{isa:?} {values:?}");
            }
        }
    }

    struct Exp([f32; LANES]);

    impl Kernel for Exp {
        type Output = [f32; LANES];
        #[inline(always)]
        fn run<S: Simd>(mut self, s: S) -> Self::Output {
            let v = s.exp(s.load(&self.0));
            s.store(&mut self.0, v);
            self.0
        }
    }

    #[test]
    fn exp_is_close_everywhere_and_passes_nan_on() {
        for step in -8700..8800 {
            let x = step as f32 * 0.01;
            let got = dispatch(Level::new(Isa::Amx), Exp([x; LANES]))[3];
            let want = f64::from(x).exp();
            assert!((f64::from(got) / want - 1.0).abs() < 2e-7, "{x}: {got} {want}");
        }
        let edges = [f32::NEG_INFINITY, -1e30, 1e30, f32::INFINITY, f32::NAN, 0.0];
        let got = dispatch(Level::new(Isa::Amx), Exp(std::array::from_fn(|i| edges[i % 6])));
        assert!(got[0] > 0.0 && got[0] < 2e-38 && got[1] == got[0], "{got:?}");
        assert!(got[2].is_finite() && got[3] == got[2] && got[2] > 1e38, "{got:?}");
        assert!(got[4].is_nan() && got[5] == 1.0, "{got:?}");
    }
}
