// Number formats: bf16, f16 and e4m3, one by one, in pairs and in fours.
#pragma once

#include "target.cuh"

// bfloat16: the upper half of an f32.
struct bf16 {
    uint16_t bits;
};

DEVICE float to_float(bf16 x) {
#ifdef LOCKSTEP_EMULATE
    return simt::bits_to_float(static_cast<uint32_t>(x.bits) << 16);
#else
    return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
#endif
}

DEVICE float to_float(float x) { return x; }

// Two bf16 in one register, the first in the low half; round to nearest even.
DEVICE uint32_t pack_bf16(float low, float high) {
#ifdef LOCKSTEP_EMULATE
    return simt::bf16_bits(low) | static_cast<uint32_t>(simt::bf16_bits(high)) << 16;
#else
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
#endif
}

DEVICE bf16 to_bf16(float x) {
#ifdef LOCKSTEP_EMULATE
    return {simt::bf16_bits(x)};
#else
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return {bits};
#endif
}

DEVICE float low_bf16(uint32_t packed) { return to_float(bf16{static_cast<uint16_t>(packed)}); }
DEVICE float high_bf16(uint32_t packed) {
    return to_float(bf16{static_cast<uint16_t>(packed >> 16)});
}

// Products of two pairs of bf16, rounded to nearest even; subnormal factors count in full.
DEVICE uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
#ifdef LOCKSTEP_EMULATE
    return pack_bf16(low_bf16(a) * low_bf16(b), high_bf16(a) * high_bf16(b));
#else
    uint32_t product;
    // Adding -0 keeps every product's sign.
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
    return product;
#endif
}

// The larger of each of two pairs of bf16; of a number and a NaN, the number.
DEVICE uint32_t max_bf16x2(uint32_t a, uint32_t b) {
#ifdef LOCKSTEP_EMULATE
    return pack_bf16(fmaxf(low_bf16(a), low_bf16(b)), fmaxf(high_bf16(a), high_bf16(b)));
#else
    uint32_t larger;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
    return larger;
#endif
}

// Differences of two pairs of bf16, rounded to nearest even.
DEVICE uint32_t sub_bf16x2(uint32_t a, uint32_t b) {
#ifdef LOCKSTEP_EMULATE
    return pack_bf16(low_bf16(a) - low_bf16(b), high_bf16(a) - high_bf16(b));
#else
    uint32_t difference;
    // b · -1 + a: sm_80 has no subtraction of its own.
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(difference) : "r"(b), "r"(0xbf80bf80u), "r"(a));
    return difference;
#endif
}

// (x & mask) | bits in one instruction, which the compiler makes two of where both are constants.
template <uint32_t mask, uint32_t bits>
DEVICE uint32_t and_or(uint32_t x) {
#ifdef LOCKSTEP_EMULATE
    return (x & mask) | bits;
#else
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(x), "n"(mask), "r"(bits));
    return result;
#endif
}

// The f16 in the low half of `bits`. Exact.
DEVICE float half_to_float(uint32_t bits) {
#ifdef LOCKSTEP_EMULATE
    return simt::half_to_float(static_cast<uint16_t>(bits));
#else
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(bits)));
    return x;
#endif
}

// Two f16 in one register, the first in the low half; round to nearest even.
DEVICE uint32_t pack_f16(float low, float high) {
#ifdef LOCKSTEP_EMULATE
    return simt::f16_bits(low) | static_cast<uint32_t>(simt::f16_bits(high)) << 16;
#else
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
#endif
}

// Products of two pairs of f16, as mul_bf16x2.
DEVICE uint32_t mul_f16x2(uint32_t a, uint32_t b) {
#ifdef LOCKSTEP_EMULATE
    const auto half = [](uint32_t x, int i) {
        return simt::half_to_float(static_cast<uint16_t>(x >> 16 * i));
    };
    return pack_f16(half(a, 0) * half(b, 0), half(a, 1) * half(b, 1));
#else
    uint32_t product;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
    return product;
#endif
}

// The largest number of e4m3.
constexpr float FP8_MAX = 448.0f;

// fp8 is e4m3: sign, 4 bits of exponent with bias 7, 3 of mantissa; ±448 at most, no infinities,
// 0x7f and 0xff are NaN (Micikevicius et al., FP8 Formats for Deep Learning). Hopper converts in
// one instruction, older devices and the emulation with integers, to the same bits.

// The e4m3 of `pair`'s lower two bytes, each at the top of a half.
DEVICE uint32_t spread_fp8x2(uint32_t pair) {
    return (pair & 0xff00u) << 16 | (pair & 0xffu) << 8;
}

// Four e4m3, the first in the low byte, as two pairs of f16. Exact.
DEVICE void fp8x4_to_f16(uint32_t packed, uint32_t (&pairs)[2]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm("{\n\t.reg .b16 low, high;\n\tmov.b32 {low, high}, %2;\n\t"
        "cvt.rn.f16x2.e4m3x2 %0, low;\n\tcvt.rn.f16x2.e4m3x2 %1, high;\n\t}"
        : "=r"(pairs[0]), "=r"(pairs[1])
        : "r"(packed));
#else
    for (int i = 0; i < 2; ++i) {
        const uint32_t high = spread_fp8x2(packed >> 16 * i);
        // 2^-8 of the value, subnormals too.
        const uint32_t magnitude = high >> 1 & 0x3f803f80u;
        const uint32_t value = mul_f16x2((high & 0x80008000u) | magnitude, 0x5c005c00u);
        const uint32_t nan = (magnitude + 0x00800080u) & 0x40004000u;
        pairs[i] = value | ((nan << 1) - (nan >> 5));
    }
#endif
}

// As fp8x4_to_f16, to bf16: exact too, with more instructions.
DEVICE void fp8x4_to_bf16(uint32_t packed, uint32_t (&pairs)[2]);

// Four e4m3, the first in the low byte, as f32. Exact.
DEVICE void unpack_fp8x4(uint32_t packed, float (&x)[4]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    uint32_t halves[2];
    fp8x4_to_f16(packed, halves);
    for (int i = 0; i < 2; ++i) {
        asm("{\n\t.reg .b16 low, high;\n\tmov.b32 {low, high}, %2;\n\t"
            "cvt.f32.f16 %0, low;\n\tcvt.f32.f16 %1, high;\n\t}"
            : "=f"(x[2 * i]), "=f"(x[2 * i + 1])
            : "r"(halves[i]));
    }
#else
    uint32_t pairs[2];
    fp8x4_to_bf16(packed, pairs);
    for (int i = 0; i < 2; ++i) {
        x[2 * i] = low_bf16(pairs[i]);
        x[2 * i + 1] = high_bf16(pairs[i]);
    }
#endif
}

DEVICE void fp8x4_to_bf16(uint32_t packed, uint32_t (&pairs)[2]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    float x[4];
    unpack_fp8x4(packed, x);
    pairs[0] = pack_bf16(x[0], x[1]);
    pairs[1] = pack_bf16(x[2], x[3]);
#else
    for (int i = 0; i < 2; ++i) {
        const uint32_t high = spread_fp8x2(packed >> 16 * i);
        // Exponent and mantissa where bf16 has its own: 2^-120 of the value, subnormals too.
        const uint32_t magnitude = high >> 4 & 0x07f007f0u;
        const uint32_t value = mul_bf16x2((high & 0x80008000u) | magnitude, 0x7b807b80u);
        // A NaN's magnitude alone carries into bit 11; there the exponent becomes all ones.
        const uint32_t nan = (magnitude + 0x00100010u) & 0x08000800u;
        pairs[i] = value | ((nan << 4) - (nan >> 4));
    }
#endif
}

#if !defined(__CUDA_ARCH_FEAT_SM90_ALL)
// The e4m3 nearest to x, ties to even; beyond ±448 that, NaN for NaN.
DEVICE uint32_t fp8_bits(float x) {
    const uint32_t bits = __float_as_uint(x), sign = bits >> 24 & 0x80u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7f;
    magnitude = min(magnitude, 0x43e00000u);  // 448
    if (magnitude < 0x3c800000u) {
        // Below 2^-6 e4m3 counts in steps of 2^-9, as f32 does from 2^14 on.
        const float rounded = __uint_as_float(magnitude) + 16384.0f;
        return sign | (__float_as_uint(rounded) - 0x46800000u);
    }
    // 20 bits of mantissa go; the exponent's bias falls from 127 to 7.
    return sign | (((magnitude + 0x7ffffu + (magnitude >> 20 & 1)) >> 20) - (120u << 3));
}
#endif

// Four f32 as e4m3, the first in the low byte: nearest, ties to even; beyond ±448 that, NaN for
// NaN.
DEVICE uint32_t pack_fp8x4(const float (&x)[4]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    uint32_t packed;
    asm("{\n\t.reg .b16 low, high;\n\tcvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n\t"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n\tmov.b32 %0, {low, high};\n\t}"
        : "=r"(packed)
        : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]));
    return packed;
#else
    return fp8_bits(x[0]) | fp8_bits(x[1]) << 8 | fp8_bits(x[2]) << 16 | fp8_bits(x[3]) << 24;
#endif
}

// Bytes 0, 2, 1, 3.
DEVICE uint32_t swap_middle_bytes(uint32_t x) {
#ifdef LOCKSTEP_EMULATE
    return (x & 0xff0000ffu) | (x >> 8 & 0xff00u) | (x << 8 & 0xff0000u);
#else
    return __byte_perm(x, 0, 0x3120);
#endif
}

template <typename T>
DEVICE T from_float(float x);
template <>
DEVICE bf16 from_float<bf16>(float x) { return to_bf16(x); }
template <>
DEVICE float from_float<float>(float x) { return x; }

// 2^x within two units in the last place; 0 for -infinity and where the result would be subnormal.
DEVICE float exp2_approx(float x) {
#ifdef LOCKSTEP_EMULATE
    return std::exp2(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// log2(x), within 2^-22 absolute near 1 and relative elsewhere.
DEVICE float log2_approx(float x) {
#ifdef LOCKSTEP_EMULATE
    return log2f(x);
#else
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}
