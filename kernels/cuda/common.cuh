// What every kernel shares: number formats, vector loads, warp sums, tensor-core products and
// asynchronous copies.
//
// Each function that needs a GPU instruction has two bodies: PTX for the device, and one for the
// host emulation (`emulate/simt.h`), which runs the same kernels in tests on machines without a
// GPU. Kernels themselves have one source and never ask which of the two they run on.
//
// A kernel is declared with KERNEL: one argument, a struct that the launcher mirrors with
// `#[repr(C)]`. Shared memory is dynamic only (`shared_memory`), its size told by the launcher.
#pragma once

#include <cstdint>

#ifdef LOCKSTEP_EMULATE
#include "simt.h"
#define DEVICE inline
#else
#define DEVICE __device__ __forceinline__
// KERNEL(name, Args, threads) { body; `args` is the argument }
// A fourth value is the number of blocks that an SM shall have room for: it limits registers.
#define KERNEL(name, Args, ...)                                \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__) \
        name(const __grid_constant__ Args args)
#endif

constexpr int WARP = 32;
constexpr uint32_t ALL_LANES = 0xffffffffu;
// Tokens in one KV block; `BLOCK_TOKENS` of the crate.
constexpr int BLOCK_TOKENS = 16;

// ---- number formats -------------------------------------------------------------------------

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
DEVICE float high_bf16(uint32_t packed) { return to_float(bf16{static_cast<uint16_t>(packed >> 16)}); }

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

// fp8 is e4m3: sign, 4 bits of exponent with bias 7, 3 of mantissa; ±448 at most, no infinities,
// 0x7f and 0xff are NaN (Micikevicius et al., FP8 Formats for Deep Learning). Hopper converts in
// one instruction, older devices and the emulation with integers, to the same bits.

// Four e4m3, the first in the low byte, as two pairs of bf16. Exact.
DEVICE void fp8x4_to_bf16(uint32_t packed, uint32_t (&pairs)[2]);

// Four e4m3, the first in the low byte, as f32. Exact.
DEVICE void unpack_fp8x4(uint32_t packed, float (&x)[4]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    uint32_t halves[2];
    asm("{\n\t.reg .b16 low, high;\n\tmov.b32 {low, high}, %2;\n\t"
        "cvt.rn.f16x2.e4m3x2 %0, low;\n\tcvt.rn.f16x2.e4m3x2 %1, high;\n\t}"
        : "=r"(halves[0]), "=r"(halves[1])
        : "r"(packed));
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
        // The two bytes at the top of the halves.
        const uint32_t pair = packed >> 16 * i;
        const uint32_t high = (pair & 0xff00u) << 16 | (pair & 0xffu) << 8;
        // Exponent and mantissa where bf16 has its own: 2^-120 of the value, subnormals too.
        const uint32_t magnitude = high >> 4 & 0x07f007f0u;
        const uint32_t value = mul_bf16x2((high & 0x80008000u) | magnitude, 0x7b807b80u);
        // A NaN's magnitude alone carries into bit 11; there the exponent becomes all ones.
        const uint32_t nan = (magnitude + 0x00100010u) & 0x08000800u;
        pairs[i] = value | ((nan << 4) - (nan >> 4));
    }
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

// As fp8x4_to_bf16, to f16: exact, and fewer instructions.
DEVICE void fp8x4_to_f16(uint32_t packed, uint32_t (&pairs)[2]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm("{\n\t.reg .b16 low, high;\n\tmov.b32 {low, high}, %2;\n\t"
        "cvt.rn.f16x2.e4m3x2 %0, low;\n\tcvt.rn.f16x2.e4m3x2 %1, high;\n\t}"
        : "=r"(pairs[0]), "=r"(pairs[1])
        : "r"(packed));
#else
    for (int i = 0; i < 2; ++i) {
        const uint32_t pair = packed >> 16 * i;
        const uint32_t high = (pair & 0xff00u) << 16 | (pair & 0xffu) << 8;
        // 2^-8 of the value, subnormals too.
        const uint32_t magnitude = high >> 1 & 0x3f803f80u;
        const uint32_t value = mul_f16x2((high & 0x80008000u) | magnitude, 0x5c005c00u);
        const uint32_t nan = (magnitude + 0x00800080u) & 0x40004000u;
        pairs[i] = value | ((nan << 1) - (nan >> 5));
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

// ---- memory ---------------------------------------------------------------------------------

// 16 bytes: what one thread moves at a time.
struct alignas(16) Bytes16 {
    uint32_t words[4];
};

DEVICE Bytes16 load16(const void* from) {
#ifdef LOCKSTEP_EMULATE
    return *static_cast<const Bytes16*>(simt::aligned(from, 16));
#else
    const uint4 v = *static_cast<const uint4*>(from);
    return {{v.x, v.y, v.z, v.w}};
#endif
}

// As load16, for global memory that is read once and written by nobody meanwhile: past the L1.
DEVICE Bytes16 load16_stream(const void* from) {
#ifdef LOCKSTEP_EMULATE
    return load16(from);
#else
    Bytes16 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
        : "l"(from));
    return v;
#endif
}

// Two neighbouring bf16.
DEVICE uint32_t load_pair(const bf16* from) {
#ifdef LOCKSTEP_EMULATE
    return *static_cast<const uint32_t*>(simt::aligned(from, 4));
#else
    return *reinterpret_cast<const uint32_t*>(from);
#endif
}

// As load16, for global memory that other blocks of this kernel have written: past the L1.
DEVICE Bytes16 load16_shared_by_blocks(const void* from) {
#ifdef LOCKSTEP_EMULATE
    return load16(from);
#else
    Bytes16 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
                 : "l"(from)
                 : "memory");
    return v;
#endif
}

DEVICE void store16(void* to, const Bytes16& v) {
#ifdef LOCKSTEP_EMULATE
    *static_cast<Bytes16*>(const_cast<void*>(simt::aligned(to, 16))) = v;
#else
    *static_cast<uint4*>(to) = make_uint4(v.words[0], v.words[1], v.words[2], v.words[3]);
#endif
}

// As store16, for global memory, and one instruction always: behind branches the compiler takes the
// other one apart.
DEVICE void store16_global(void* to, const Bytes16& v) {
#ifdef LOCKSTEP_EMULATE
    store16(to, v);
#else
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.words[0]),
                 "r"(v.words[1]), "r"(v.words[2]), "r"(v.words[3])
                 : "memory");
#endif
}

// 8 bytes, where 16 would be more than a thread has.
struct alignas(8) Bytes8 {
    uint32_t words[2];
};

DEVICE Bytes8 load8(const void* from) {
#ifdef LOCKSTEP_EMULATE
    return *static_cast<const Bytes8*>(simt::aligned(from, 8));
#else
    const uint2 v = *static_cast<const uint2*>(from);
    return {{v.x, v.y}};
#endif
}

DEVICE void store8(void* to, const Bytes8& v) {
#ifdef LOCKSTEP_EMULATE
    *static_cast<Bytes8*>(const_cast<void*>(simt::aligned(to, 8))) = v;
#else
    *static_cast<uint2*>(to) = make_uint2(v.words[0], v.words[1]);
#endif
}

// The block's dynamic shared memory, aligned to 1024 bytes. Its contents are undefined at first.
template <typename T>
DEVICE T* shared_memory() {
#ifdef LOCKSTEP_EMULATE
    return static_cast<T*>(simt::shared(sizeof(T)));
#else
    extern __shared__ __align__(1024) unsigned char dynamic_shared[];
    return reinterpret_cast<T*>(dynamic_shared);
#endif
}

// An address in shared memory, for arithmetic in 32 bits.
#ifdef LOCKSTEP_EMULATE
using SharedAddress = uintptr_t;
DEVICE SharedAddress shared_address(const void* p) { return reinterpret_cast<uintptr_t>(p); }
#else
using SharedAddress = uint32_t;
DEVICE SharedAddress shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

DEVICE Bytes16 load16_shared(SharedAddress from) {
#ifdef LOCKSTEP_EMULATE
    return load16(reinterpret_cast<const void*>(from));
#else
    Bytes16 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
                 : "r"(from)
                 : "memory");
    return v;
#endif
}

DEVICE void store16_shared(SharedAddress to, const Bytes16& v) {
#ifdef LOCKSTEP_EMULATE
    store16(reinterpret_cast<void*>(to), v);
#else
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.words[0]),
                 "r"(v.words[1]), "r"(v.words[2]), "r"(v.words[3])
                 : "memory");
#endif
}

// Copies 16 bytes from global to shared memory in the background; zeros where `valid` is false,
// and then `from` is not read. Visible to this thread after cp_async_wait, to others after a
// barrier behind it.
DEVICE void cp_async_16(SharedAddress shared, const void* global, bool valid = true) {
#ifdef LOCKSTEP_EMULATE
    simt::cp_async(reinterpret_cast<void*>(shared), global, 16, valid);
#else
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
                 "r"(bytes)
                 : "memory");
#endif
}
DEVICE void cp_async_16(void* shared, const void* global, bool valid = true) {
    cp_async_16(shared_address(shared), global, valid);
}

// Ends a group of copies.
DEVICE void cp_async_commit() {
#ifdef LOCKSTEP_EMULATE
    simt::cp_async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `pending` of this thread's groups are unfinished.
template <int pending>
DEVICE void cp_async_wait() {
#ifdef LOCKSTEP_EMULATE
    simt::cp_async_wait(pending);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// ---- barriers and warps ---------------------------------------------------------------------

// A barrier of `threads` threads (whole warps) with a number of its own, 1 to 15.
DEVICE void named_barrier(int id, int threads) {
#ifdef LOCKSTEP_EMULATE
    simt::named_barrier(id, threads);
#else
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Sum over the lanes of aligned groups of `width` lanes; every lane gets it. Every lane of the warp
// takes part. The order is fixed.
template <int width = WARP>
DEVICE float warp_sum(float x) {
#pragma unroll
    for (int step = width / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

template <int width = WARP>
DEVICE float warp_max(float x) {
#pragma unroll
    for (int step = width / 2; step > 0; step /= 2)
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

// Sum over a block of `threads` threads, a multiple of 32, in a fixed order; every thread gets it.
// `scratch`: threads / 32 floats of shared memory, not in use by others.
template <int threads>
DEVICE float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    if constexpr (threads > WARP) {
        __syncthreads();
        if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
        __syncthreads();
        x = 0.0f;
        for (int w = 0; w < threads / WARP; ++w) x += scratch[w];
    }
    return x;
}

// ---- tensor cores ---------------------------------------------------------------------------

// Four 8×8 matrices of 16-bit elements from shared memory into a warp's registers: lane l gives the
// address of row l % 8 of matrix l / 8, 16 bytes aligned; matrix i lands in r[i], where lane l has
// row l / 4, columns 2 (l % 4) and the next (PTX ISA, ldmatrix).
DEVICE void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) {
#ifdef LOCKSTEP_EMULATE
    simt::ldmatrix_x4(r, reinterpret_cast<const void*>(row), false);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
#endif
}
DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    ldmatrix_x4(r, shared_address(row));
}

// As ldmatrix_x4, each matrix transposed.
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row) {
#ifdef LOCKSTEP_EMULATE
    simt::ldmatrix_x4(r, reinterpret_cast<const void*>(row), true);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
#endif
}
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    ldmatrix_x4_trans(r, shared_address(row));
}

// d [16, 8] += a [16, 16] · b [16, 8] for a warp: bf16 in, f32 sums. Lane l with g = l / 4 and
// t = l % 4 holds a: {(g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..)}, two columns a
// register; b: {(2t.., g), (2t + 8.., g)}, two rows a register; d: {(g, 2t), (g, 2t + 1),
// (g + 8, 2t), (g + 8, 2t + 1)} (PTX ISA, mma.m16n8k16).
DEVICE void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef LOCKSTEP_EMULATE
    simt::mma_16816(d, a, b0, b1);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// As mma_16816, of f16.
DEVICE void mma_16816_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef LOCKSTEP_EMULATE
    simt::mma_16816_f16(d, a, b0, b1);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
