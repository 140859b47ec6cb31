//! Vectors of AVX2, FMA and F16C: two registers each.

use super::{Kernel, LANES, Simd};
use std::arch::x86_64::*;

/// Exists only inside [`run`].
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

/// Compiles and runs `kernel` for this level.
///
/// # Safety
/// The processor has every feature named below.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx2(()))
}

/// An intrinsic without memory operands.
macro_rules! have {
    ($call:expr) => {
        // SAFETY: a `Avx2` is made where the features are known to be there, and nowhere else.
        unsafe { $call }
    };
}

/// Two halves.
type V = [__m256; 2];

impl Simd for Avx2 {
    type V = V;
    const SCORE_QUERIES: usize = 2;
    const VALUE_QUERIES: usize = 1;

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        have!([_mm256_set1_ps(x); 2])
    }
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> V {
        let from = from.as_ptr();
        // SAFETY: the features as above; the array holds the 64 bytes read.
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; LANES], v: V) {
        let to = to.as_mut_ptr();
        // SAFETY: the features as above; the array holds the 64 bytes written.
        unsafe {
            _mm256_storeu_ps(to, v[0]);
            _mm256_storeu_ps(to.add(8), v[1]);
        }
    }
    #[inline(always)]
    fn load_half(self, from: &[u16; LANES]) -> V {
        let from = from.as_ptr().cast::<__m128i>();
        // SAFETY: the features as above; the array holds the 32 bytes read.
        unsafe {
            let [low, high] = [_mm_loadu_si128(from), _mm_loadu_si128(from.add(1))];
            [_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)]
        }
    }
    #[inline(always)]
    fn store_half(self, to: &mut [u16; LANES], v: V) {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT;
        let to = to.as_mut_ptr().cast::<__m128i>();
        // SAFETY: the features as above; the array holds the 32 bytes written.
        unsafe {
            _mm_storeu_si128(to, _mm256_cvtps_ph::<NEAREST>(v[0]));
            _mm_storeu_si128(to.add(1), _mm256_cvtps_ph::<NEAREST>(v[1]));
        }
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        have!([_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        have!([_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        have!([_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        have!([_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        have!([_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])])
    }
    #[inline(always)]
    fn neg_fma(self, a: V, b: V, c: V) -> V {
        have!([_mm256_fnmadd_ps(a[0], b[0], c[0]), _mm256_fnmadd_ps(a[1], b[1], c[1])])
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        have!([_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        have!([_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn round(self, v: V) -> V {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        have!([_mm256_round_ps::<NEAREST>(v[0]), _mm256_round_ps::<NEAREST>(v[1])])
    }
    #[inline(always)]
    fn exp2_int(self, v: V) -> V {
        [exp2_int(v[0]), exp2_int(v[1])]
    }
    #[inline(always)]
    fn max_lane(self, v: V) -> f32 {
        have!({
            let four = _mm256_max_ps(v[0], v[1]);
            let four = _mm_max_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps::<1>(four));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        })
    }
}

#[inline(always)]
fn exp2_int(v: __m256) -> __m256 {
    have!({
        let biased = _mm256_add_epi32(_mm256_cvtps_epi32(v), _mm256_set1_epi32(127));
        _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
    })
}
